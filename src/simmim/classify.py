"""What an encoder is worth as a classifier: fine-tuning, or a linear probe of frozen features."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW

from simmim.evaluation.metrics import Scores, balanced_weights, class_accuracy
from simmim.evaluation.readout import Probe, choose_layers, init_head_, read_tokens
from simmim.masking import sample_keys
from simmim.training.base import seed_of
from simmim.training.fine_tuning import Downstream, check_training
from simmim.training.mixing import Mixer, erase
from simmim.weights.backbone import open_backbone

MAIN = "main"  # the head that predicts; the others are those of a sweep over layers
POOLS = {"mean": "avg", "token": "token", "attention": ""}  # ours -> timm's global_pool
FEW = 20  # classes that are logged one by one


class Classifier(Downstream):
    """A classifier on an encoder.

    Fine-tuned as a whole, it is timm's own classification model, so that it exports and reads like
    one. With `frozen` only a linear head is trained on the encoder's features.

    Args:
        weights: Weights of the encoder: a run's folder or checkpoint of ours, an official SimMIM
            or Swin release (.pth), `timm:NAME`, or a Hugging Face or timm folder. None: from
            scratch.
        encoder: Name of a timm model; by default that of the weights, or vit_base_patch16_224.
        img_size: Height and width in pixels, one number or [height, width]; by default those of
            the weights, or 224. Positions are resized as the official code does it.
        in_chans: Channels of the images; by default those of the weights, or 3.
        num_classes: Number of classes; by default the data's.
        frozen: Train a linear probe on features of the encoder, which stays as it is.
        layer: Block (of hierarchical models: stage) whose features a probe reads, counted from 1;
            a list, or `all`, trains one probe for each in one pass (val/top1_layer_08; val/top1 is
            the last one's). None: the last, behind the encoder's final norm. The paper's linear
            probe of ViT-B reads block 8 (its section 4.4).
        pooling: What an image's embedding is: mean (of the patch tokens, the paper's), token (the
            class token), or attention (a learned query).
        batch_norm: A BatchNorm without weights before the probe, as in MAE's linear probing
            (arXiv:2111.06377, appendix A.1).
        multi_label: An image can have several labels; the loss is a binary one for each class.
        class_weights: Weight of each class in the training loss: balanced (by its frequency in
            the training part), or a list. None: all alike.
        label_smoothing: Share of the target that is spread over all classes; with multi_label
            none is. 0.1 (the released fine-tuning).
        mixup: Alpha of mixup; 0 = none. 0.8 (the released fine-tuning).
        cutmix: Alpha of cutmix; 0 = none. 1.0 (the released fine-tuning).
        random_erasing: Probability that an image loses a rectangle. 0.25 (the released
            fine-tuning).
        ema_decay: Decay of a moving average of the weights, which is what is validated and kept;
            None = none. 0.9999 suits runs of 100,000 steps.
        encoder_kwargs: Options of the timm model that differ from those in the weights. The paper
            fine-tunes its ViT with {use_rel_pos_bias: true, use_shared_rel_pos_bias: false}: each
            block gets a copy of the shared table.
        drop_path_rate: Stochastic depth, growing linearly over the blocks. 0.1 (the released
            fine-tuning; 0.2 for Swin-L).
        layer_decay: Factor by which the learning rate falls from each block to the one below; None
            = none. 0.65 for ViT-B, 0.9 for Swin-B after 100 epochs, 0.8 after 800, 0.7 for Swin-L
            (the released configs).
        head_init_scale: Factor of the classifier's initial weights (std 0.02). 0.001 for ViT (the
            released configs).
        optimizer: Optimiser class and its options; its lr and weight decay are set from base_lr
            and weight_decay. AdamW (the paper's appendix).
        base_lr: Learning rate for a global batch of 512; it is scaled linearly with the batch.
            1.25e-3 (the released fine-tuning).
        schedule: cosine, or multistep.
        warmup_epochs: Epochs of linear warm-up. 20 of 100 (the released fine-tuning).
        warmup_lr: Learning rate that the warm-up begins with, for a global batch of 512. 2.5e-7
            (the released configs).
        min_lr: Learning rate at the end of the cosine, for a global batch of 512. 2.5e-7 (the
            released configs).
        milestones: Epochs at which multistep multiplies the learning rate by 0.1.
        weight_decay: AdamW's weight decay; none on biases, norms, tokens and position tables.
            0.05 (the paper's appendix).
        grad_checkpointing: Recompute activations in the backward pass: less memory, more time.
        compile: Compile the model with torch.compile; for fine-tuning.
        seed: Seed of erasing, mixing and dropout. On the command line it is `--seed_everything`.
        trust: Import an encoder that the weights, or an optimiser that a checkpoint, name by an
            import path, which runs their code.
    """

    UNTRAINED = "this classifier is not trained yet, its answers"
    NAME, NAMED_BY = "this classifier", "class folders"
    REMEDY = "give data with the same class folders"

    def __init__(
        self,
        weights: str | None = None,
        encoder: str | None = None,
        img_size: int | list[int] | None = None,
        in_chans: int | None = None,
        num_classes: int | None = None,
        frozen: bool = False,
        layer: int | list[int] | Literal["all"] | None = None,
        pooling: Literal["mean", "token", "attention"] = "mean",
        batch_norm: bool = False,
        multi_label: bool = False,
        class_weights: Literal["balanced"] | list[float] | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        random_erasing: float = 0.0,
        ema_decay: float | None = None,
        encoder_kwargs: dict[str, Any] | None = None,
        drop_path_rate: float = 0.0,
        layer_decay: float | None = None,
        head_init_scale: float = 1.0,
        optimizer: OptimizerCallable = AdamW,
        base_lr: float = 1.25e-3,
        schedule: Literal["cosine", "multistep"] = "cosine",
        warmup_epochs: float = 20,
        warmup_lr: float = 2.5e-7,
        min_lr: float = 2.5e-7,
        milestones: list[int] | None = None,
        weight_decay: float = 0.05,
        grad_checkpointing: bool = False,
        compile: bool = False,
        seed: int = 0,
        trust: bool = False,
    ) -> None:
        super().__init__()
        # `weights` is where this run began: a checkpoint of it must open without that file.
        self.save_hyperparameters(ignore=["optimizer", "weights", "trust"])
        _check(self.hparams)
        self.frozen, self.multi_label, self.seed = frozen, multi_label, seed
        self.optimizer, self.trust = optimizer, trust
        self.mix = Mixer(mixup, cutmix)
        self.own_head = frozen or pooling == "attention"  # else timm's, inside the model

        backbone = open_backbone(
            weights,
            encoder,
            img_size,
            in_chans,
            encoder_kwargs,
            classifier=0 if self.own_head else num_classes,
            drop_path_rate=0.0 if frozen else drop_path_rate,
            global_pool="" if self.own_head else POOLS[pooling],
            class_token=pooling == "token",
            trust=trust,
        )
        self.take_encoder(backbone)
        self.own_head = self.own_head or not hasattr(backbone.model, "reset_classifier")
        if grad_checkpointing:
            backbone.model.set_grad_checkpointing(True)
        self.layers = choose_layers(layer, backbone.model, backbone.encoder)
        self.heads = nn.ModuleDict()
        self.scores = nn.ModuleDict()
        self.class_weights: Tensor
        self.register_buffer("class_weights", torch.ones(()), persistent=False)
        self._confusion: Tensor | None = None
        self._label_scores: dict[str, Tensor] | None = None
        if backbone.num_classes and backbone.report and not self.own_head:
            self.head_is_trained = _classifier_came_along(backbone.report.missing)
            self.classes = backbone.classes if self.head_is_trained else []
        self.head_is_inherited = self.head_is_trained  # from the weights
        if num_classes or self.head_is_trained:
            self.set_num_classes(num_classes or backbone.num_classes)

    # The model ---------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Classify normalised images, (B, C, H, W) -> logits, (B, K)."""
        return self.logits(images)[MAIN]

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of each head: of `main`, and in a sweep of `layer_01`, ..., each (B, K)."""
        if not self.own_head:
            return {MAIN: self.model(images)}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            class_token = self.hparams["pooling"] == "token"
            read = read_tokens(self.model, images, self.layers, class_token=class_token)
        found = {
            name: head(*tokens)
            for (name, head), tokens in zip(self.heads.items(), read, strict=True)
        }
        return found if MAIN in found else {**found, MAIN: found[list(found)[-1]]}

    @property
    def head_names(self) -> list[str]:
        """The probes, in the order of their layers."""
        single = not isinstance(self.hparams["layer"], list | str)
        return [MAIN] if single else [f"layer_{layer:02d}" for layer in self.layers]

    def inputs(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Take a batch apart, a dict of ours or (images, labels): normalised images, and labels.

        Floats of a plain loader count as normalised already.
        """
        if isinstance(batch, Mapping):
            return self.normalize(batch["image"]), batch.get("label")
        images, labels = batch if isinstance(batch, Sequence) else (batch, None)
        return (self.normalize(images) if images.dtype == torch.uint8 else images), labels

    def targets(self, labels: Tensor) -> Tensor:
        """Labels -> shares (one class an image) or presence (several) of each class, (B, K)."""
        if self.multi_label:
            return labels.float()
        smoothing, classes = self.hparams["label_smoothing"], self.hparams["num_classes"]
        return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes

    def loss_of(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Cross-entropy in float32, of the softmax or of each class for itself."""
        logits = logits.float()
        if self.multi_label:
            pos_weight = None if weights is None else weights.expand(logits.shape[1])
            return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight)
        terms = targets * logits.log_softmax(1)
        return -(terms if weights is None else terms * weights).sum(1).mean()

    # Lightning's steps -------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step: erase, mix, classify, compare."""
        images, labels = self.inputs(batch)
        assert labels is not None
        place = (self.seed, self.global_step, batch_idx, self.global_rank)
        if self.hparams["random_erasing"]:
            keys = self._keys(batch, seed_of(*place), images)
            images = erase(images, keys, self.hparams["random_erasing"])
        images, targets = self.mix(images, self.targets(labels), seed_of(*place))
        logits = self.logits(images)
        heads = list(self.heads) or [MAIN]
        losses = [self.loss_of(logits[name], targets, self.class_weights) for name in heads]
        self.log("train/loss", losses[-1], sync_dist=self.trainer.world_size > 1)
        self.log_lr()
        return torch.stack(losses).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and scores on the validation images."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and scores on the test images."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Probability of each class, (B, K)."""
        logits = self(self.inputs(batch)[0]).float()
        return {"probabilities": logits.sigmoid() if self.multi_label else logits.softmax(1)}

    def on_validation_epoch_end(self) -> None:
        """Score each class for itself."""
        self._score_classes("val")

    def on_test_epoch_end(self) -> None:
        """Score each class for itself."""
        self._score_classes("test")

    @property
    def confusion_matrix(self) -> Tensor | None:
        """Counts of (label, prediction) in the last evaluation, int64, (K, K)."""
        return self._confusion

    @property
    def label_scores(self) -> dict[str, Tensor] | None:
        """With several labels an image, what `Scores.take_labels` found in the last evaluation."""
        return self._label_scores

    def _evaluate(self, part: str, batch: Any) -> None:
        images, labels = self.inputs(batch)
        if labels is None:
            raise ValueError(f"the {part} images have no labels: give folders of classes")
        exact = labels.float() if self.multi_label else F.one_hot(labels, self.num_classes).float()
        for name, logits in self.logits(images).items():
            scores = cast(Scores, self.scores[name])
            suffix = "" if name == MAIN else f"_{name}"
            found = scores.update(logits, labels, self.loss_of(logits, exact))
            for metric, value in found.items():
                shown = name == MAIN and metric in ("loss", "top1")
                self.log(f"{part}/{metric}{suffix}", value, prog_bar=shown)

    def _score_classes(self, part: str) -> None:
        for name, scores in self.scores.items():
            if found := cast(Scores, scores).take_labels():
                self._log_labels(part, name, found)
        self._confusion = cast(Scores, self.scores[MAIN]).take_confusion()
        if self._confusion is not None:
            accuracy = class_accuracy(self._confusion)
            self._log_epoch(f"{part}/top1_balanced", accuracy.nanmean())
            self._log_classes(f"{part}/top1_class", accuracy)

    def _log_labels(self, part: str, name: str, found: dict[str, Tensor]) -> None:
        suffix = "" if name == MAIN else f"_{name}"
        for metric, logged in (("ap", "mean_ap"), ("auroc", "auroc"), ("f1", "f1")):
            self._log_epoch(f"{part}/{logged}{suffix}", found[metric].nanmean())
        if name == MAIN:
            self._label_scores = found
            self._log_classes(f"{part}/ap_class", found["ap"])
            self._log_classes(f"{part}/auroc_class", found["auroc"])

    def _log_classes(self, prefix: str, values: Tensor) -> None:
        for name, value in zip(self.class_names, values, strict=True):
            if len(values) <= FEW and not value.isnan():
                self._log_epoch(f"{prefix}/{name}", value)

    def _log_epoch(self, name: str, value: Tensor) -> None:
        shown = name.endswith("/mean_ap")
        self.log(name, value, prog_bar=shown, sync_dist=self.trainer.world_size > 1)

    def _keys(self, batch: Any, fallback: int, images: Tensor) -> Tensor:
        """One random key an image: from its index, or where it has none from the step."""
        if isinstance(batch, Mapping) and "index" in batch:
            return sample_keys(batch["index"], self.seed, self.current_epoch)
        place = torch.arange(len(images), device=images.device)
        return sample_keys(place, fallback, 0)

    # Classes -----------------------------------------------------------------------------------

    def set_num_classes(self, num_classes: int) -> None:
        """Build what depends on the number of classes; a classifier that fits already stays."""
        if num_classes < 1 or (num_classes == 1 and not self.multi_label):
            raise ValueError(
                f"num_classes {num_classes} leaves nothing to tell apart: give images of two "
                "classes or more"
            )
        if self.scores and self.num_classes == num_classes:
            return
        self.hparams["num_classes"] = num_classes
        if self.own_head:
            self.heads = nn.ModuleDict(
                {name: self._new_probe(i, num_classes) for i, name in enumerate(self.head_names)}
            )
        elif not (self.head_is_trained and self.model.num_classes == num_classes):
            self.model.reset_classifier(num_classes)
            init_head_(self.model.get_classifier(), self.hparams["head_init_scale"])
            self.head_is_trained = False
        names = {*self.heads, MAIN}
        self.scores = nn.ModuleDict(
            {
                name: Scores(num_classes, multi_label=self.multi_label, whole=name == MAIN)
                for name in names
            }
        )
        self.to(self.device)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.hparams["num_classes"])

    def set_classes(self, names: Sequence[str], *, may_renew: bool = False) -> None:
        """Take the names of the classes, in the order of their numbers.

        Args:
            names: The names.
            may_renew: Whether a classifier for others, which came with the weights, is given up.

        Raises:
            ValueError: If they are not those that it was trained with.
        """
        names, renew = self.check_classes(names, may_renew=may_renew)
        if renew:
            self.head_is_trained, self.scores = False, nn.ModuleDict()
        if not self.head_is_trained:
            self.check_num_classes(names)
        self.set_num_classes(len(names))
        self.classes = names

    def _new_probe(self, i: int, num_classes: int) -> Probe:
        width = self.model.num_features
        if self.layers:
            width = self.model.feature_info[self.layers[i] - 1]["num_chs"]
        layer = self.layers[i] if self.layers else 0
        with torch.random.fork_rng(devices=[]):  # the same probe, alone or in a sweep
            torch.manual_seed(seed_of(self.seed, layer))
            probe = Probe(width, num_classes, self.hparams["pooling"], self.hparams["batch_norm"])
            init_head_(probe.linear, self.hparams["head_init_scale"])
        return probe

    # Set-up and optimisation -------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take classes, class weights and pixel statistics from the data."""
        data = getattr(self.trainer, "datamodule", None)
        if stage != "predict":
            if getattr(data, "has_labels", True) is False and not getattr(data, "classes", None):
                raise ValueError(
                    f"{getattr(data, 'root', 'the data')} has no labels: put each class's images "
                    "into a folder of its own"
                )
            self.take_classes(data, stage)
        if stage != "fit":
            return
        self.take_statistics(data)
        self.class_weights = self._weigh_classes(data).to(self.device)
        if self.hparams["compile"]:
            self.model.compile()

    def _weigh_classes(self, data: Any) -> Tensor:
        given = self.hparams["class_weights"]
        if given is None:
            return torch.ones(())
        if given == "balanced":
            counts = getattr(data, "class_counts", None)
            if counts is None:
                raise ValueError("class_weights balanced needs data that counts its classes")
            images = int(getattr(data, "num_train", sum(counts)))
            return balanced_weights(counts, multi_label=self.multi_label, images=images)
        if len(given) != self.num_classes:
            raise ValueError(
                f"class_weights {given} are not {self.num_classes}, one for each class"
            )
        return torch.tensor(given, dtype=torch.float32)

    def on_fit_end(self) -> None:
        """Say what each layer of a sweep is worth."""
        metric = "mean_ap" if self.multi_label else "top1"
        logged = self.trainer.callback_metrics
        names = {name: f"val/{metric}_{name}" for name in self.heads}
        found = {name: float(logged[key]) for name, key in names.items() if key in logged}
        for name, value in found.items():
            best = ", the best layer" if value == max(found.values()) else ""
            rank_zero_info(f"{name}: val/{metric} {value:.4f}{best}")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the heads that the file has, and go on with its optimiser."""
        self.set_num_classes(checkpoint["hyper_parameters"]["num_classes"])
        self.load_classes(checkpoint)
        super().on_load_checkpoint(checkpoint)


def _check(hparams: Mapping[str, Any]) -> None:
    """Refuse options that contradict each other or would do nothing."""
    if hparams["layer"] is not None and not hparams["frozen"]:
        raise ValueError(
            f"layer {hparams['layer']} is for probes: add frozen true, or leave it out to "
            "fine-tune the whole encoder"
        )
    if hparams["batch_norm"] and not hparams["frozen"]:
        raise ValueError("batch_norm is for probes: add frozen true, or leave it out")
    check_training(hparams, "linear_probe")
    if hparams["compile"] and (hparams["frozen"] or hparams["pooling"] == "attention"):
        raise ValueError("compile is for fine-tuning with timm's head: leave it out")
    smoothing, erasing = hparams["label_smoothing"], hparams["random_erasing"]
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing {smoothing} is no share below 1: use 0, or 0.1")
    if not 0 <= erasing <= 1:
        raise ValueError(f"random_erasing {erasing} is no probability: use 0 for none, or 0.25")


def _classifier_came_along(missing: Mapping[str, str]) -> bool:
    return not any("head begins anew" in why for why in missing.values())
