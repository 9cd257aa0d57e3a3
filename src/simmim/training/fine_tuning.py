"""What classification, segmentation and detection share: an encoder from weights, and a head."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from simmim.optim import param_groups
from simmim.training.base import (
    MovingAverage,
    Trainable,
    imagenet_statistics,
    optimizer_and_schedule,
)
from simmim.weights.backbone import Backbone


class Downstream(Trainable):
    """An encoder with a head (a decoder, a detector) on it, trained for a task.

    A task's `__init__` keeps its options, sets `frozen`, `seed`, `optimizer` and `trust`, calls
    `take_encoder`, and builds the head.

    Attributes:
        UNTRAINED: What is wrong with a model that was never trained, as a sentence begins.
        NAME: What it is called in a sentence.
        NAMED_BY: What of the data says the classes.
        REMEDY: What to do where the data have other classes.
        classes: Names of the classes; [] until they are known.
        origin: Where the encoder's weights are from, for the reader of a log.
        has_statistics: Whether mean and std are those that the weights were made with.
        head_is_trained: Whether the head is no longer random.
        head_is_inherited: Whether the head came with the weights.
    """

    UNTRAINED: ClassVar[str]
    NAME: ClassVar[str]
    NAMED_BY: ClassVar[str]
    REMEDY: ClassVar[str]

    set_classes: Callable[..., None]  # names, may_renew, and what else a task keeps of its classes
    frozen: bool

    # The encoder -------------------------------------------------------------------------------

    def take_encoder(self, backbone: Backbone) -> None:
        """Take a timm model to go on with, what describes it, and its pixel statistics."""
        self.hparams.update(
            encoder=backbone.encoder,
            img_size=backbone.img_size,
            in_chans=backbone.in_chans,
            encoder_kwargs=backbone.options,
        )
        # As in SimMIM timm's names come behind "encoder.model.": load_encoder reads both.
        self.encoder = nn.ModuleDict({"model": backbone.model})
        if self.frozen:
            self.encoder.requires_grad_(False)
        self.register_buffer("mean", torch.zeros(1, backbone.in_chans, 1, 1))
        self.register_buffer("std", torch.ones(1, backbone.in_chans, 1, 1))
        self.set_statistics(*(backbone.statistics or imagenet_statistics(backbone.in_chans)))
        self.has_statistics = backbone.statistics is not None
        self.origin = str(backbone.report or "from scratch")
        self.classes: list[str] = []
        self.head_is_trained = self.head_is_inherited = False

    @property
    def model(self) -> Any:
        """The timm model."""
        return self.encoder["model"]

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen encoder always evaluates."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def take_statistics(self, data: Any) -> None:
        """Take the data's pixel statistics, where the weights have none of their own."""
        if not self.has_statistics and getattr(data, "mean", None) is not None:
            self.set_statistics(data.mean, data.std)

    # Classes -----------------------------------------------------------------------------------

    @property
    def class_names(self) -> list[str]:
        """Names of the classes: the data's, or numbers."""
        return self.classes or [str(i) for i in range(self.hparams["num_classes"] or 0)]

    def check_classes(self, names: Sequence[str], *, may_renew: bool) -> tuple[list[str], bool]:
        """Refuse other classes than those that it was trained with, unless it may forget those.

        Returns:
            The names as text, and whether a head for others is given up.
        """
        names = [str(name) for name in names]
        renew = bool(self.classes) and names != self.classes and may_renew
        if renew:
            rank_zero_info(f"the weights know the classes {shortened(self.classes)}: a new head")
            self.classes, self.hparams["num_classes"] = [], None
        if self.classes and names != self.classes:
            raise ValueError(
                f"the data has the classes {shortened(names)}, {self.NAME} knows "
                f"{shortened(self.classes)}: {self.REMEDY}"
            )
        return names, renew

    def take_classes(self, data: Any, stage: str, **looks: Any) -> None:
        """Take the classes of the data, or let the data number theirs as the model does.

        A head that came with the weights may be given up in training, but not in going on.

        Raises:
            ValueError: If nobody says how many there are.
        """
        names = getattr(data, "classes", None)
        if names and not self.match_classes(data):
            renew = stage == "fit" and not self.trainer.ckpt_path and self.head_is_inherited
            self.set_classes(names, may_renew=renew, **looks)
        if not self.hparams["num_classes"]:
            raise ValueError(f"num_classes is not known: give it, or data with {self.NAMED_BY}")

    def load_classes(self, checkpoint: Mapping[str, Any], **looks: Any) -> None:
        """Take the classes of a checkpoint, and compare them with the data's.

        Args:
            checkpoint: The file's content.
            looks: As `set_classes` takes them.
        """
        of_data, self.classes = self.classes, []  # Lightning sets the data up first
        if names := checkpoint.get("classes"):
            self.set_classes(names, **looks)
        if names := self.unmatched_classes(of_data):
            self.set_classes(names, **looks)

    def match_classes(self, data: Any, *, is_loaded: bool = False) -> bool:
        """Let data to evaluate number its classes as the model does, which may know more of them.

        Args:
            data: The data module.
            is_loaded: Whether the checkpoint, which knows the model's classes, was read.

        Returns:
            Whether that is done, or waits for the checkpoint.
        """
        if self.trainer.state.fn == "fit":
            return False
        if not self.classes and not self.head_is_trained and not is_loaded:
            return bool(self.hparams["num_classes"])  # else a checkpoint of this call has heads
        names = [str(name) for name in data.classes]
        if not hasattr(data, "number_classes_as") or not set(names) <= set(self.classes):
            return False
        if names != self.classes:
            rank_zero_info(
                f"{len(names)} of the model's {len(self.classes)} classes are in the data"
            )
            data.number_classes_as(self.classes)
        return True

    def unmatched_classes(self, of_data: list[str]) -> list[str]:
        """Classes of the data that are still to be compared with those of a loaded model."""
        if self._trainer is None or self.trainer.state.fn not in ("validate", "test"):
            return of_data
        data = getattr(self.trainer, "datamodule", None)
        names = getattr(data, "classes", None) or []
        return [] if not names or self.match_classes(data, is_loaded=True) else names

    def check_num_classes(self, names: list[str]) -> None:
        """Refuse another number of classes than the user gave."""
        given = self.hparams["num_classes"]
        if given and len(names) != given:
            raise ValueError(
                f"num_classes {given} does not go with the {len(names)} classes of the data "
                f"({shortened(names)}): leave it out"
            )

    # Optimisation ------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser, each block with its learning rate, and the per-step schedule."""
        hp = self.hparams
        rank_zero_info(f"encoder {hp['encoder']}: {self.origin}")
        names = ("base_lr", "schedule", "warmup_epochs", "warmup_lr", "min_lr", "milestones")
        return optimizer_and_schedule(
            self, self.optimizer, self.param_groups(), **{name: hp[name] for name in names}
        )

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups, each with its weight decay and the scale of its learning rate."""
        hp = self.hparams
        return param_groups(self, hp["weight_decay"], layer_decay=hp["layer_decay"])

    def configure_callbacks(self) -> list[L.Callback]:
        """Average the weights, if asked."""
        decay = self.hparams.get("ema_decay")
        return [MovingAverage(decay=decay)] if decay else []

    # Trained or not ----------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Remember that the head is no longer random."""
        self.head_is_trained = True
        if self.frozen:  # Lightning trains in the mode that it finds, and warns of eval before
            self.encoder.eval()

    def on_validation_start(self) -> None:
        """Refuse to score a model that was never trained."""
        self._refuse_untrained()

    def on_test_start(self) -> None:
        """Refuse to score a model that was never trained."""
        self._refuse_untrained()

    def on_predict_start(self) -> None:
        """Refuse to predict with a model that was never trained."""
        self._refuse_untrained()

    def _refuse_untrained(self) -> None:
        if self.trainer.state.fn != "fit" and not self.head_is_trained:
            raise ValueError(
                f"{self.UNTRAINED} would be random: give a trained one with --ckpt_path (a run's "
                "folder, or last)"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep classes, origin and the optimiser's name and options as plain values."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["classes"], checkpoint["origin"] = self.classes, self.origin

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the optimiser that the file has; a task has built its heads before."""
        self.origin = checkpoint.get("origin", self.origin)
        self.head_is_trained = self.has_statistics = True
        super().on_load_checkpoint(checkpoint)


def check_training(hparams: Mapping[str, Any], probe: str = "") -> None:
    """Refuse what options of all tasks cannot be.

    Args:
        hparams: The options.
        probe: The config that trains on a frozen encoder, where there is one.
    """
    decay, rate, ema = hparams["layer_decay"], hparams["drop_path_rate"], hparams.get("ema_decay")
    if decay is not None and hparams["frozen"]:
        instead = f", or use -c {probe}" if probe else ""
        raise ValueError(f"layer_decay does nothing to a frozen encoder: leave it out{instead}")
    if decay is not None and not 0 < decay <= 1:
        raise ValueError(f"layer_decay {decay} is not between 0 and 1: use 0.65 to 0.9, or none")
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate {rate} is no share: use 0 for none, or 0.1")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"ema_decay {ema} is not between 0 and 1: use 0.999, or none")


def shortened(names: Sequence[str]) -> str:
    """The first four names, and how many more there are."""
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
