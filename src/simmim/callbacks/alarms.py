"""Say early when a run is lost: a loss that is no number, features that are all alike."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from simmim.callbacks.base import Samples, call, fixed_samples, is_logging_step, undisturbed
from simmim.evaluation.probe import effective_rank
from simmim.loss import masked_mean
from simmim.masking import upsample_mask
from simmim.training.strategies import gradient_norm


class NonFiniteLoss(ValueError):
    """The run cannot go on: its loss or its weights are infinite or not a number."""


class StopOnNonFinite(L.Callback):
    """Stop the run at a loss that is infinite or not a number, and keep the last good checkpoint.

    Each step notes on the device whether its loss is finite; the note is read only where Lightning
    waits for the device anyway: at logging steps, before a validation and at the end of an epoch.
    Weights are looked at before any checkpoint is written, so none is overwritten with NaN.
    """

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None  # step of the first bad loss, on the device; -1: none

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget earlier runs."""
        self._first_bad = torch.full((), -1, device=pl_module.device)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note on the device whether the loss is finite."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is None or self._first_bad is None:
            return
        bad = ~loss.detach().isfinite() & (self._first_bad < 0)
        self._first_bad = torch.where(bad, trainer.global_step, self._first_bad)
        if is_logging_step(trainer):
            self._check(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the note before hours of validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._check(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the note before a checkpoint is written."""
        self._check(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to write weights that are lost: the step after a finite loss may ruin them."""
        if not trainer.training:
            return
        # In shards the bad ones may be in one process only; all of them have to stop.
        parts = [part for t in checkpoint["state_dict"].values() for part in _here(t)]
        lost = any(not part.isfinite().all() for part in parts if part.is_floating_point())
        worst = torch.tensor(int(lost), device=trainer.strategy.root_device)
        if int(trainer.strategy.reduce(worst, reduce_op="max")):
            raise NonFiniteLoss(_explain(trainer, "the weights are", trainer.global_step))

    def _check(self, trainer: L.Trainer) -> None:
        if self._first_bad is None:
            return
        # The loss may be bad in one process only; all of them have to stop.
        worst = trainer.strategy.reduce(self._first_bad.clone(), reduce_op="max")
        if (step := int(worst)) >= 0:
            raise NonFiniteLoss(_explain(trainer, "train/loss became", step))


def _here(tensor: Any) -> list[Tensor]:
    """What this process holds of a tensor, in shards or not."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor]


def _explain(trainer: L.Trainer, what: str, step: int) -> str:
    remedies = []
    base_lr = trainer.lightning_module.hparams.get("base_lr")
    remedies.append("lower the learning rate" + (f" (base_lr is {base_lr:g})" if base_lr else ""))
    if str(trainer.precision).startswith("16"):
        remedies.append("use --trainer.precision bf16-mixed or 32-true instead of 16")
    if not trainer.gradient_clip_val:
        remedies.append("clip the gradients (--trainer.gradient_clip_val 5, the paper's)")
    remedies.append("look for broken images (simmim doctor)")
    return (
        f"{what} infinite or not a number at step {step} (epoch {trainer.current_epoch}), and no "
        f"checkpoint was overwritten with it: {', or '.join(remedies)}"
    )


class CollapseAlarm(L.Callback):
    """Announce a run that has stopped learning anything about its images.

    At the end of each epoch a few fixed validation images are looked at. The run has collapsed
    where, in two epochs after one another,

    - the masked loss is at the level of predicting the target's mean (or median) value, and the
      encoder's gradients have vanished beside the largest ones of the run, or its features differ
      between images a hundred times less than the untrained encoder's; or
    - the features hardly differ at all (a thousand times less), or only along one line (effective
      rank), whatever the loss: it may have learned the mean image; or
    - the loss is far above the untrained model's: it has diverged.

    It is said once, in a warning (and as an alert on W&B); the run goes on. Logged each epoch:
    `collapse/loss_over_mean` (1: the loss of predicting the mean), `collapse/feature_variance`
    (between images, as a share of the features' mean square), `collapse/effective_rank`,
    `collapse/alarm` (0 or 1), and at logging steps `collapse/encoder_grad_norm` (before clipping).

    Args:
        num_images: Validation images to look at. 0 turns the alarm off.
    """

    AT_THE_MEAN = 0.95  # of the mean's loss; a healthy run is below 0.7 within its first epochs
    VANISHED = 1e-3  # of the largest gradient norm; healthy runs fall to a tenth
    ALIKE, SAME = 1e-2, 1e-3  # of the untrained features' variance; healthy runs stay above a tenth
    DIVERGED = 2  # of the untrained model's loss
    ONE_LINE = 1.2  # effective rank; healthy runs have 3 and more

    def __init__(self, num_images: int = 32) -> None:
        if num_images < 0 or num_images in (1, 2, 3):
            raise ValueError(
                f"num_images {num_images} is too few to compare: use at least 4, or 0 for no alarm"
            )
        self.num_images = num_images
        self.announced = False
        self._epochs_in_a_row = 0
        self._start: dict[str, float] = {}  # what the untrained encoder's features were like
        self._grad: Tensor | None = None
        self._largest_grad: Tensor | None = None
        self._samples: Samples | None = None

    def state_dict(self) -> dict[str, Any]:
        """Keep what the run is compared with."""
        return {
            "start": self._start,
            "grad": self._grad,
            "largest_grad": self._largest_grad,
            "announced": self.announced,
            "epochs_in_a_row": self._epochs_in_a_row,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what the run is compared with."""
        self._start, self.announced = state_dict["start"], state_dict["announced"]
        self._grad, self._largest_grad = state_dict["grad"], state_dict["largest_grad"]
        self._epochs_in_a_row = state_dict["epochs_in_a_row"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the encoder before the first step."""
        self._samples = None
        if trainer.global_step == 0:
            self._grad, self._epochs_in_a_row = None, 0
        if self.num_images and not self._start:
            self._start = self._look(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        """Measure the encoder's gradients now and then, without waiting for the device."""
        due = is_logging_step(trainer, ahead=1) or trainer.is_last_batch or self._grad is None
        if not self.num_images or not due:
            return
        encoder: Any = pl_module.encoder
        norm = gradient_norm(encoder)
        pl_module.log("collapse/encoder_grad_norm", norm)
        self._grad = norm
        largest = self._largest_grad.to(norm) if self._largest_grad is not None else norm * 0
        self._largest_grad = torch.where(norm.isfinite(), torch.maximum(largest, norm), largest)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look, log, and announce what is wrong."""
        found = self._look(trainer, pl_module) if self._start else {}
        if not found:
            return
        reason = self._judge(found)
        self._epochs_in_a_row = self._epochs_in_a_row + 1 if reason else 0
        alarm = self._epochs_in_a_row >= 2
        metrics = {f"collapse/{name}": value for name, value in found.items()}
        pl_module.log_dict({**metrics, "collapse/alarm": float(alarm)}, sync_dist=True)
        if alarm and not self.announced:
            self.announced = True
            _announce(trainer, reason)

    def _judge(self, found: dict[str, float]) -> str:
        """Say what is wrong, or nothing."""
        loss, start = found.get("loss_over_mean", 0.0), self._start
        variance = found["feature_variance"] / max(start["feature_variance"], 1e-30)
        gradient = self._gradient()
        signs = {
            f"the loss is {loss:.2f} x that of predicting the mean": loss >= self.AT_THE_MEAN,
            f"the encoder's gradients are {gradient:.1g} of what they were": gradient
            < self.VANISHED,
            f"its features differ between images {variance:.1g} x as before": variance < self.ALIKE,
            "its features of all images lie on one line": found["effective_rank"] < self.ONE_LINE,
        }
        at_the_mean, vanished, alike, on_a_line = signs.values()
        collapsed = (at_the_mean and (vanished or alike)) or variance < self.SAME
        collapsed |= on_a_line and start["effective_rank"] > 2
        collapsed |= loss > self.DIVERGED * start.get("loss_over_mean", float("inf"))
        return ", ".join(sign for sign, seen in signs.items() if seen) if collapsed else ""

    def _gradient(self) -> float:
        """Norm of the encoder's last gradient, as a share of the largest."""
        if self._grad is None or self._largest_grad is None:
            return 1.0
        return float(self._grad) / max(float(self._largest_grad), 1e-12)

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        with undisturbed(pl_module):
            if self._samples is None:
                self._samples = fixed_samples(trainer, self.num_images)
                _warn_of_one_colour(self._samples)
            if self._samples is None or len(self._samples.images) < 4:
                return {}
            return call(trainer, lambda *samples: measure(pl_module, *samples), *self._samples)


@torch.no_grad()
def measure(module: Any, images: Tensor, mask: Tensor, keys: Tensor) -> dict[str, float]:
    """Measure how far a `SimMIM` is from a collapse.

    Args:
        module: The module.
        images: Normalised images, (B, C, H, W).
        mask: Cells, (B, h, w), True = hidden.
        keys: One key an image, (B,).

    Returns:
        loss_over_mean (where the target is not classes), feature_variance, effective_rank; nothing
        where one of them is no number, which is `StopOnNonFinite`'s business, or where the target
        is the same everywhere: no loss is better than another then.
    """
    embedding = module.encoder(images).mean((2, 3)).float().cpu()
    size = embedding.square().mean(0).sum().clamp_min(1e-30)  # of a dead encoder: 0
    found = {
        "feature_variance": float(embedding.var(0).sum() / size),
        "effective_rank": float(effective_rank(embedding)),
    }
    target = module.target(images)
    if torch.is_floating_point(target):
        region = mask if module.loss_region == "hidden" else None
        loss = masked_mean(module.error(module(images, mask, keys), target), region)
        level = mean_level(module.error, target, mask)
        if level == 0:
            return {}
        found["loss_over_mean"] = float(loss) / level
    return found if all(math.isfinite(value) for value in found.values()) else {}


def mean_level(error: Any, target: Tensor, mask: Tensor) -> float:
    """Loss of the best constant prediction: each channel's mean or median over hidden elements.

    Args:
        error: The loss of each element: (prediction, target) -> (B, C, h, w).
        target: (B, C, h, w).
        mask: Cells, (B, h, w), True = hidden.

    Returns:
        The smaller of the two masked means.
    """
    hidden = upsample_mask(mask, (target.shape[-2], target.shape[-1]))
    values = target.float().movedim(1, 0)[:, hidden[:, 0]]  # (C, hidden elements)
    levels = []
    for constant in (values.mean(1), values.median(1).values):
        prediction = constant.view(1, -1, 1, 1).expand_as(target)
        levels.append(float(masked_mean(error(prediction, target.float()), mask)))
    return min(levels)


def _warn_of_one_colour(samples: Samples | None) -> None:
    """Say that there is nothing to learn, where every image that was looked at is of one colour."""
    images = samples.images if samples is not None else torch.empty(0)
    if len(images) and bool((images == images[..., :1, :1]).all()):
        rank_zero_warn(
            f"each of the {len(images)} validation images that were looked at is of one colour: "
            "there is nothing to learn from them. See in reconstructions/ how they were read, and "
            "what simmim doctor --root DIR says of them"
        )


def _announce(trainer: L.Trainer, reason: str) -> None:
    message = (
        f"the model has collapsed after {trainer.current_epoch + 1} epochs: {reason}. It rarely "
        "recovers: stop, and lower base_lr, lengthen warmup_epochs, or clip the gradients"
    )
    rank_zero_warn(message)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            logger.experiment.alert(title="collapse", text=message)
