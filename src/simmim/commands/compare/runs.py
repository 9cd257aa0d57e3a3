"""One run of a comparison: an arm, trained with some of the labels by the recipe of all arms."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from simmim.base.files import read_config
from simmim.classify import Classifier
from simmim.command_line.configuration import find_config
from simmim.commands.compare.significance import Result
from simmim.data.classification import ClassificationData
from simmim.evaluation.readout import init_head_
from simmim.training.inner_runs import make, quiet

OF_THE_ENCODER = ("encoder", "img_size", "in_chans", "encoder_kwargs")
OF_THE_TRAINER = ("gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches")
ASKED = 1000  # training images that an arm is asked about to see whether it has learned them


@dataclass(frozen=True)
class Budget:
    """Some of the labels.

    Attributes:
        amount: As `data.labels_per_class` takes it; None: all.
        images: Training images with a label.
        share: Of all training images.
        least: Images of the smallest class.
        most: Images of the largest class.
    """

    amount: float | None
    images: int
    share: float
    least: int
    most: int

    def __str__(self) -> str:
        each = f"{self.least:,}" if self.least == self.most else f"{self.least:,} to {self.most:,}"
        percent = f"{100 * self.share:.2g}" if self.share < 0.1 else f"{100 * self.share:.0f}"
        return f"{self.images:,} labels ({percent} %, {each} a class)"


def choose_budgets(amounts: Sequence[float], class_counts: Sequence[int]) -> list[Budget]:
    """Count what budgets come to, the smallest first; those that come to the same are one.

    Args:
        amounts: Whole numbers are images of each class; numbers with a point are shares, 1.0 = all,
            but at least one image of each class.
        class_counts: Training images of each class.

    Raises:
        ValueError: If a number is neither, or a class has fewer images.
    """
    counts = [n for n in class_counts if n]
    found: dict[int, Budget] = {}
    for amount in amounts:
        whole = isinstance(amount, int)
        if not amount > 0 or (not whole and amount > 1):
            raise ValueError(
                f"budgets: {amount} is neither a share nor a number of images of each class: use "
                "0.1 for a tenth, 1.0 for all, 10 for ten of each class"
            )
        if whole and amount > min(counts):
            raise ValueError(
                f"budgets: {amount} is more than the {min(counts)} training images of the smallest "
                f"class: use {min(counts)} or fewer, or a share such as 0.5"
            )
        each = [int(amount) if whole else max(round(amount * n), 1) for n in counts]
        images = sum(each)
        kept = None if images == sum(counts) else amount
        budget = Budget(kept, images, images / sum(counts), min(each), max(each))
        found.setdefault(images, budget)
    return [found[images] for images in sorted(found)]


@dataclass(frozen=True)
class Arm:
    """What is compared: an encoder, with weights or without.

    Attributes:
        encoder: Classifier's options that build it.
        origin: Where its weights are from, and what became of each tensor.
        tensors: Its weights; None: new ones, by the seed.
        statistics: Mean and standard deviation of the pixels; None: the data's.
    """

    encoder: dict[str, Any]
    origin: str
    tensors: dict[str, Tensor] | None = field(default=None, repr=False)
    statistics: tuple[Tensor, Tensor] | None = None

    def from_scratch(self) -> "Arm":
        """The same encoder and pixel statistics without the weights."""
        return Arm(self.encoder, f"{self.encoder['encoder']}, new weights", None, self.statistics)


def open_arm(weights: str, options: Mapping[str, Any]) -> Arm:
    """Open weights once, for all runs: a file may be written on meanwhile.

    Args:
        weights: As Classifier takes them.
        options: Its other options.
    """
    with quiet():
        model = make(Classifier, {**options, "weights": weights})
    if not model.own_head:
        model.model.reset_classifier(0)  # each run gets a new one
    return Arm(
        {name: model.hparams[name] for name in OF_THE_ENCODER} | {"trust": model.trust},
        f"{model.hparams['encoder']} of {model.origin}",
        {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()},
        (model.mean, model.std) if model.has_statistics else None,
    )


@dataclass(frozen=True)
class Recipe:
    """How every run of a mode is trained, whatever the arm.

    Attributes:
        model: Options of Classifier.
        data: Options of ClassificationData.
        trainer: Options of Lightning's Trainer.
        length: Epochs that the warm-up and the milestones refer to.
        epochs: Of each budget.
        min_steps: Optimiser steps of the smallest budget at least.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    trainer: dict[str, Any]
    length: float
    epochs: float
    min_steps: int

    @property
    def accumulation(self) -> int:
        """Batches of an optimiser step."""
        return int(self.trainer.get("accumulate_grad_batches") or 1)

    def steps_per_epoch(self, images: int) -> int:
        """Optimiser steps in an epoch, as ClassificationData counts its batches."""
        batches = images // int(self.data.get("batch_size", 128))
        return max(batches // self.accumulation, 1)

    def steps(self, images: int) -> int:
        """Optimiser steps of a run with so many labels, the same in all arms."""
        return max(round(self.epochs * self.steps_per_epoch(images)), self.min_steps)


def read_recipe(name: str) -> dict[str, dict[str, Any]]:
    """Read a config of `simmim classify`: its groups model, data and trainer.

    Raises:
        ArgumentError: If there is no such config.
        ValueError: If it is for several labels an image.
    """
    config = read_config(find_config(name, "classify"))
    groups = {group: dict(config.get(group) or {}) for group in ("model", "data", "trainer")}
    if groups["model"].pop("multi_label", False):
        raise ValueError(f"config {name}: compare is for one class an image, not for multi_label")
    for ours in ("weights", "encoder", "num_classes", "seed"):
        groups["model"].pop(ours, None)
    return groups


def open_data(recipe: Recipe, arm: Arm, amount: float | None, seed: int) -> ClassificationData:
    """The images of a run.

    Args:
        recipe: Says where they are.
        arm: Says their size and channels.
        amount: Labels, as `data.labels_per_class` takes them.
        seed: Chooses the labels, the order and the crops.
    """
    sizes = {name: arm.encoder[name] for name in ("img_size", "in_chans")}
    chosen = {"labels_per_class": amount, "seed": seed}
    data = make(ClassificationData, {**recipe.data, **sizes, **chosen})
    data.setup("fit")
    return data


def open_model(recipe: Recipe, arm: Arm, data: ClassificationData, seed: int) -> Classifier:
    """The classifier of a run: the weights are all that differs between arms of one architecture.

    Args:
        recipe: How it is to be trained.
        arm: The encoder.
        data: The images.
        seed: Of new weights, the head and dropout.
    """
    stretch = recipe.steps(data.num_train) / recipe.steps_per_epoch(data.num_train) / recipe.length
    schedule: dict[str, Any] = {"warmup_epochs": recipe.model.get("warmup_epochs", 20) * stretch}
    if milestones := recipe.model.get("milestones"):
        schedule["milestones"] = [round(epoch * stretch) for epoch in milestones]
    torch.manual_seed(seed)
    model = make(Classifier, {**recipe.model, **arm.encoder, **schedule, "seed": seed})
    if arm.tensors is not None:
        model.encoder.load_state_dict(arm.tensors)
    if arm.statistics is not None:
        model.mean.copy_(arm.statistics[0])
        model.std.copy_(arm.statistics[1])
        model.has_statistics = True
    torch.manual_seed(seed)
    model.set_classes(data.classes)
    if not model.own_head:
        init_head_(model.model.get_classifier(), model.hparams["head_init_scale"])
    return model


def train(
    recipe: Recipe, arm: Arm, budget: Budget, seed: int, *, mode: str, name: str, bar: Any
) -> Result:
    """Train an arm, and ask it about the validation images after the last step.

    Args:
        recipe: How.
        arm: What.
        budget: With how many labels.
        seed: Which labels, which initial weights, which order.
        mode: The recipe's name in the result.
        name: The arm's name in the result.
        bar: A progress bar that counts optimiser steps.
    """
    with quiet():
        data = open_data(recipe, arm, budget.amount, seed)
        model, hits = open_model(recipe, arm, data, seed), Hits()
        trainer = L.Trainer(
            **recipe.trainer,
            devices=1,
            max_steps=recipe.steps(budget.images),
            max_epochs=-1,
            limit_val_batches=0,  # nothing is chosen by looking at them
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[Advance(bar), hits],
        )
        began = time.perf_counter()
        trainer.fit(model, datamodule=data)
        seconds = time.perf_counter() - began
        trainer.predict(model, data.val_dataloader(), return_predictions=False)
        correct, labels = hits.take()
        trainer.predict(model, data.probe_dataloader(ASKED), return_predictions=False)
        learned = hits.take()[0]
    return Result(
        mode=mode,
        arm=name,
        budget=1.0 if budget.amount is None else budget.amount,
        images=budget.images,
        seed=seed,
        steps=int(trainer.global_step),
        top1=float(correct.mean()),
        top1_balanced=float(np.mean([correct[labels == k].mean() for k in np.unique(labels)])),
        train_top1=float(learned.mean()),
        seconds=round(seconds, 1),
        correct=correct,
    )


class Hits(Callback):
    """Collects which images are recognised, in the order of the data."""

    def __init__(self) -> None:
        self.batches: list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]] = []

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Compare the predictions of a batch with its labels."""
        labels = batch["label"].cpu().numpy()
        self.batches.append((outputs["probabilities"].argmax(1).cpu().numpy() == labels, labels))

    def take(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Whether each image is recognised, and its class; then begin anew."""
        correct, labels = (np.concatenate(part) for part in zip(*self.batches, strict=True))
        self.batches = []
        return correct, labels


class Advance(Callback):
    """Moves a progress bar on, an optimiser step at a time."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.seen = bar, 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Count what was done since."""
        self.bar.update(trainer.global_step - self.seen)
        self.seen = trainer.global_step
