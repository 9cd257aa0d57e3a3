"""How good a classifier is: metrics of torchmetrics under the names that are logged."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MultilabelAUROC,
    MultilabelAveragePrecision,
    MultilabelConfusionMatrix,
    MultilabelF1Score,
)

BINS = 15  # of the calibration error (Guo et al., arXiv:1706.04599)


class Scores(nn.Module):
    """Metrics of one classifier, gathered over batches and processes.

    One class an image: loss, top1, top5 (where there are five classes), calibration_error, and
    the confusion matrix. Several labels an image: loss, and of each label average precision, auroc
    and f1.

    Args:
        num_classes: K.
        multi_label: Whether an image can have several labels.
        whole: Also what takes memory: calibration and confusion.
    """

    def __init__(self, num_classes: int, *, multi_label: bool, whole: bool = True) -> None:
        super().__init__()
        self.multi_label = multi_label
        named: dict[str, Metric] = {}
        by_label: dict[str, Metric] = {}
        if multi_label:
            by_label["ap"] = MultilabelAveragePrecision(num_classes, average="none")
            by_label["auroc"] = MultilabelAUROC(num_classes, average="none")
            by_label["f1"] = MultilabelF1Score(num_classes, average="none")
            by_label["confusion"] = MultilabelConfusionMatrix(num_classes)
        else:
            named["top1"] = MulticlassAccuracy(num_classes, average="micro")
            if num_classes >= 5:
                named["top5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
            if whole:
                named["calibration_error"] = MulticlassCalibrationError(num_classes, n_bins=BINS)
        self.loss = MeanMetric()
        self.by_name, self.by_label = nn.ModuleDict(named), nn.ModuleDict(by_label)
        self.confusion = (
            MulticlassConfusionMatrix(num_classes) if whole and not multi_label else None
        )

    def update(self, logits: Tensor, labels: Tensor, loss: Tensor) -> dict[str, Metric]:
        """Take a batch in.

        Args:
            logits: (B, K).
            labels: Classes from 0, (B,); or 0 and 1 for each class, (B, K).
            loss: Mean over the batch.

        Returns:
            The metrics by name, for `self.log`.
        """
        logits, labels = logits.detach().float(), labels.long()
        probabilities = logits.sigmoid() if self.multi_label else logits.softmax(1)
        self.loss.update(loss.detach(), len(logits))
        found: dict[str, Metric] = {"loss": self.loss}
        for name, metric in self.by_name.items():
            assert isinstance(metric, Metric)
            metric.update(probabilities, labels)
            found[name] = metric
        for whole in self.by_label.values():
            assert isinstance(whole, Metric)
            whole.update(probabilities, labels)
        if self.confusion is not None:
            self.confusion.update(probabilities, labels)
        return found

    def take_labels(self) -> dict[str, Tensor] | None:
        """Score each label over all processes, and begin anew.

        Returns:
            `images` that have it, int64, (K,); `ap`, `auroc` and `f1`, (K,), nan for a label that
            none or all of the images have: nothing can be told of it.
        """
        metrics = {name: m for name, m in self.by_label.items() if isinstance(m, Metric)}
        if not metrics or not metrics["confusion"].update_called:
            return None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No (positive|negative) samples")
            found = {name: metric.compute() for name, metric in metrics.items()}
        for metric in metrics.values():
            metric.reset()
        absent, present = found.pop("confusion").sum(2).unbind(1)
        tells = (absent > 0) & (present > 0)
        scores = {name: values.masked_fill(~tells, torch.nan) for name, values in found.items()}
        return {"images": present, **scores}

    def take_confusion(self) -> Tensor | None:
        """Count (label, prediction) pairs, int64, (K, K), over all processes, and begin anew."""
        if self.confusion is None or not self.confusion.update_called:
            return None
        matrix: Tensor = self.confusion.compute()
        self.confusion.reset()
        return matrix


def class_accuracy(confusion: Tensor) -> Tensor:
    """Share of each class's images that are recognised, (K,); nan where it has none."""
    return confusion.diagonal().float() / confusion.sum(1)


def balanced_weights(counts: Sequence[int], *, multi_label: bool, images: int) -> Tensor:
    """Weight of each class in the loss, so that rare classes count as much as frequent ones.

    Args:
        counts: Training images of each class.
        multi_label: With several labels an image: what a class's presence weighs beside its
            absence, (N - n) / n.
        images: N.

    Returns:
        (K,): N / (K n), scikit-learn's "balanced"; their mean over the images is 1.
    """
    n = torch.tensor(list(counts)).clamp_min(1)
    return (images - n).clamp_min(1) / n if multi_label else images / (len(n) * n)


def less_is_better(name: str) -> bool:
    """Whether a metric of this name is a loss or an error."""
    return name.endswith(("loss", "error"))
