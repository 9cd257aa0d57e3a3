"""What all tasks share: normalisation, optimiser, schedule, seeds, checkpoints."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from math import inf
from typing import Any, Self

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from simmim.optim import Compat, Schedule, scaled_lr
from simmim.parts.names import find_part
from simmim.training.strategies import refuse_fsdp, shard
from simmim.training.xla import run_xla
from simmim.weights.files import load_safely


class Trainable(L.LightningModule):
    """The base of every LightningModule here; a subclass's constructor sets the attributes.

    Attributes:
        mean: Of each channel of pixels in 0..1, (1, C, 1, 1).
        std: Likewise, their standard deviation.
        optimizer: Makes the optimiser from parameter groups.
        seed: Of what is drawn in a step.
        trust: Whether a checkpoint may name an encoder, parts or an optimiser of a user's own.
    """

    mean: Tensor
    std: Tensor
    optimizer: OptimizerCallable
    seed: int
    trust: bool

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: Any, *args: Any, trust: bool = False, **kwargs: Any
    ) -> Self:
        """Open a checkpoint as Lightning does, but run no code in it, by path and by URL alike.

        With trust=True what it names by an import path is imported, which runs its code. What the
        file says of trust itself does not count.
        """
        load = super().load_from_checkpoint
        return load_safely(load, checkpoint_path, *args, trust=trust, **kwargs)

    def normalize(self, raw: Tensor) -> Tensor:
        """Turn uint8, or float in 0..1, into what the encoder sees: zero mean, unit variance."""
        return normalize(raw, self.mean, self.std)

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the mean and standard deviation of each channel, for pixels in 0..1."""
        self.mean.copy_(torch.tensor(mean).view_as(self.mean))
        self.std.copy_(torch.tensor(std).view_as(self.std))

    def configure_model(self) -> None:
        """Share the weights out, where the strategy does."""
        if self._trainer is not None:
            refuse_fsdp(self.trainer.strategy)
        shard(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed what is drawn from the step, so that a resumed run draws the same."""
        torch.manual_seed(seed_of(self.seed, self.global_step, batch_idx, self.global_rank))

    def on_validation_batch_end(self, *_: Any) -> None:
        """Compute each batch by itself."""
        run_xla(self.device)

    def log_lr(self) -> None:
        """Log the learning rate, of several the last group's: the head's.

        It stays on the host. Lightning copies a plain number to the device, which then has to be
        waited for at every step.
        """
        rate = self.optimizers().param_groups[-1]["lr"]  # type: ignore[union-attr]
        self.log("lr", torch.tensor(rate, dtype=torch.float32, device="cpu"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the optimiser's name and options as plain values, so that the file opens safely."""
        if self.trainer.optimizers:  # a trainer that only validated has none
            checkpoint["optimizer_spec"] = optimizer_spec(self.trainer.optimizers[0])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the optimiser that the checkpoint was made with."""
        if spec := checkpoint.get("optimizer_spec"):
            self.optimizer = optimizer_from(spec, trust=self.trust)


def imagenet_statistics(in_chans: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of ImageNet; for other than three channels that of the three."""
    mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    if in_chans == 3:
        return mean, std
    return [sum(mean) / 3] * in_chans, [sum(std) / 3] * in_chans


def normalize(raw: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn uint8, or float in 0..1, into zero mean and unit variance, in the type of `mean`."""
    images = raw.float() / 255 if raw.dtype == torch.uint8 else raw.float()
    return ((images - mean) / std).to(mean.dtype)  # bf16 in bf16-true


def seed_of(*place: int) -> int:
    """Mix numbers (seed, step, rank, ...) into one seed of 32 bits."""
    return int(np.random.SeedSequence(place).generate_state(1)[0])


def global_batch_size(trainer: L.Trainer) -> int:
    """Images that one optimiser step sees, over all processes."""
    data: Any = getattr(trainer, "datamodule", None)
    loader: Any = trainer.train_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    batch = getattr(data, "batch_size", None) or getattr(loader, "batch_size", None)
    batch = batch or getattr(sampler, "batch_size", None)
    if batch is None:
        raise ValueError(
            "the learning rate follows the global batch, and neither the data module nor its "
            "loader says a batch_size: give the data module an attribute batch_size"
        )
    batch = int(batch)
    if images := getattr(data, "num_train", None):  # a batch cannot be larger than what there is
        batch = min(batch, max(images // trainer.world_size, 1))
    return batch * trainer.world_size * int(trainer.accumulate_grad_batches)


def count_steps(trainer: L.Trainer) -> tuple[int, int]:
    """Optimiser steps in an epoch and in the run.

    A data module that has `batches_per_epoch(world_size)` is asked. For plain loaders there is
    Lightning's own estimate: it starts the loader, before a checkpoint says where in the epoch it
    should, and so does not go on exactly within an epoch.
    """
    check_length(trainer)
    data: Any = getattr(trainer, "datamodule", None)
    total = None
    if hasattr(data, "batches_per_epoch"):
        whole, limit = data.batches_per_epoch(trainer.world_size), trainer.limit_train_batches
        batches = min(whole, limit) if isinstance(limit, int) else int(whole * limit)
    else:
        estimate = trainer.estimated_stepping_batches
        trainer.fit_loop.setup_data()  # which the estimate leaves out where max_steps says it all
        if inf in (estimate, trainer.num_training_batches):
            raise ValueError(
                "the training data has no length, so that nothing says where an epoch ends: use "
                "--trainer.limit_train_batches 1000 for one of 1,000 batches"
            )
        total, batches = int(estimate), int(trainer.num_training_batches)
    per_epoch = max(1, -(-batches // int(trainer.accumulate_grad_batches)))
    limits = (trainer.max_steps, (trainer.max_epochs or -1) * per_epoch)
    return per_epoch, total or min(steps for steps in limits if steps >= 0)


def check_length(trainer: L.Trainer) -> None:
    """Refuse a training without a step, or without an end.

    Raises:
        ValueError: The learning rate's curve is drawn over the whole run.
    """
    epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
    if (epochs < 1 and trainer.max_steps < 1) or 0 in (epochs, trainer.max_steps):
        raise ValueError(
            f"trainer.max_epochs {epochs} and trainer.max_steps {trainer.max_steps} give no number "
            "of steps to train: use --trainer.max_epochs 100"
        )


def optimizer_and_schedule(
    module: L.LightningModule,
    optimizer: OptimizerCallable,
    groups: list[dict[str, Any]],
    *,
    base_lr: float,
    schedule: str,
    warmup_epochs: float,
    warmup_lr: float,
    min_lr: float,
    milestones: Sequence[float] | None = None,
    compat: Compat = "default",
) -> OptimizerLRScheduler:
    """Build an optimiser and its per-step schedule, and print what each group gets.

    Args:
        module: The module, with its trainer.
        optimizer: Makes the optimiser from parameter groups.
        groups: As `param_groups` gives them; each one's lr is the curve times its `lr_scale`.
        base_lr: Learning rate for a global batch of 512, like warmup_lr and min_lr.
        schedule: cosine or multistep.
        warmup_epochs: Epochs of linear warm-up.
        warmup_lr: Where the warm-up begins.
        min_lr: Where the cosine ends.
        milestones: Epochs at which multistep multiplies by 0.1.
        compat: As in `Schedule`.

    Returns:
        What `configure_optimizers` returns.

    Raises:
        ValueError: If nothing is left to train.
    """
    if not groups:
        raise ValueError("nothing is left to train: all parameters are frozen")
    trainer = module.trainer
    steps, total_steps = count_steps(trainer)
    batch = global_batch_size(trainer)
    scale = scaled_lr(1.0, batch)
    built = optimizer(groups)
    _fuse(built, trainer.strategy.root_device)
    curve = Schedule(
        built,
        schedule=schedule,
        lr=base_lr * scale,
        total_steps=total_steps,
        warmup_steps=round(warmup_epochs * steps),
        warmup_lr=warmup_lr * scale,
        min_lr=min_lr * scale,
        milestones=[round(epoch * steps) for epoch in milestones or ()],
        compat=compat,
    )
    rank_zero_info(
        f"lr {base_lr * scale:.3g} = base_lr {base_lr:g} x global batch {batch} / 512; "
        f"{total_steps} steps\n" + format_groups(groups, base_lr * scale)
    )
    return {"optimizer": built, "lr_scheduler": {"scheduler": curve, "interval": "step"}}


def format_groups(groups: Sequence[Mapping[str, Any]], lr: float) -> str:
    """Write parameter groups below each other: peak learning rate, weight decay, parameters."""
    width = max(len(group["name"]) for group in groups)
    lines = [f"  {'group':<{width}}  {'lr':>9}  {'weight decay':>12}  {'parameters':>11}"]
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        lines.append(
            f"  {group['name']:<{width}}  {lr * group['lr_scale']:>9.3g}  "
            f"{group['weight_decay']:>12g}  {count:>11,}"
        )
    return "\n".join(lines)


def optimizer_spec(optimizer: Optimizer) -> dict[str, Any]:
    """Name an optimiser's class and options as plain values, for a checkpoint that opens safely."""
    kind = type(optimizer)
    options = signature(kind).parameters
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": {k: v for k, v in optimizer.defaults.items() if k in options},
    }


def optimizer_from(spec: dict[str, Any], *, trust: bool) -> OptimizerCallable:
    """Turn what `optimizer_spec` kept into a function of parameter groups.

    Raises:
        ValueError: If the class is neither torch's nor timm's, and the file is not trusted.
    """
    path = str(spec["class_path"])
    safe = path.startswith(("torch.optim.", "timm.optim."))
    kind: Any = find_part(path, {}, "optimizer", trust=safe or trust)
    # Fused is `_fuse`'s to say: Lightning does not clip what was made so, in fp16 or bf16.
    options = {k: v for k, v in spec["init_args"].items() if not (k == "fused" and v)}
    return partial(kind, **options)


class MovingAverage(EMAWeightAveraging):
    """Lightning's moving average of the weights, for a model whose head depends on the data."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the model, whose classes must be known by then: callbacks are set up first."""
        if stage == "fit":
            if isinstance(trainer.strategy, ModelParallelStrategy):
                raise ValueError(
                    "ema_decay averages whole weights, and this strategy has them in shards: leave "
                    "it out, or use --trainer.strategy ddp"
                )
            pl_module.setup(stage)
            self._device = (
                self._device or trainer.strategy.root_device
            )  # the model is not there yet
        with warnings.catch_warnings():  # of shards, which were refused above
            warnings.filterwarnings("ignore", ".*overrides the configure_model", UserWarning)
            super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait: the last checkpoint, which comes now, must still hold both models."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the model."""
        super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, *args: Any) -> None:
        """Keep both models; outside of training there is one."""
        if self._average_model is not None:
            super().on_save_checkpoint(trainer, *args)

    def on_load_checkpoint(self, trainer: L.Trainer, *args: Any) -> None:
        """Take both models; outside of training there is one."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, *args)


def _fuse(optimizer: Optimizer, device: torch.device) -> None:
    """Use the fused kernel where it exists: one launch instead of hundreds.

    Set here and not in the constructor, it leaves the scale of gradients in fp16 to Lightning,
    which can then clip them.
    """
    exists = device.type in _get_fused_kernels_supported_devices()
    if exists and isinstance(optimizer, Adam | SGD) and optimizer.defaults["fused"] is None:
        optimizer.defaults["fused"] = True
        for group in optimizer.param_groups:
            group["fused"] = True
