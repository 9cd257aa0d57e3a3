"""What the downstream tasks do alike while they train: optimiser, schedule, seeds, kept values."""

from collections.abc import Sequence
from functools import partial
from inspect import signature
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer

from simmim.optim import LayerRow, Schedule, scaled_lr
from simmim.parts import find_part


def seed_of(*place: int) -> int:
    """Mix numbers (seed, step, rank, ...) into one seed of 32 bits."""
    return int(np.random.SeedSequence(place).generate_state(1)[0])


def seed_step(module: L.LightningModule, seed: int, batch_idx: int) -> None:
    """Seed dropout and drop path from the step, so that a resumed run draws the same."""
    torch.manual_seed(seed_of(seed, module.global_step, batch_idx, module.global_rank))


def global_batch_size(trainer: L.Trainer) -> int:
    """Images that one optimiser step sees, over all processes."""
    loader: Any = trainer.train_dataloader
    batch = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size
    return int(batch) * trainer.world_size * int(trainer.accumulate_grad_batches)


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

    Returns:
        What `configure_optimizers` returns.

    Raises:
        ValueError: If nothing is left to train.
    """
    if not groups:
        raise ValueError("nothing is left to train: all parameters are frozen")
    trainer = module.trainer
    total_steps = int(trainer.estimated_stepping_batches)  # sets the loader up
    batch = global_batch_size(trainer)
    steps = -(-trainer.num_training_batches // int(trainer.accumulate_grad_batches))
    scale = scaled_lr(1.0, batch)
    built = optimizer(groups)
    _fuse(built, str(trainer.precision))
    curve = Schedule(
        built,
        schedule=schedule,
        lr=base_lr * scale,
        total_steps=total_steps,
        warmup_steps=round(warmup_epochs * steps),
        warmup_lr=warmup_lr * scale,
        min_lr=min_lr * scale,
        milestones=[round(epoch * steps) for epoch in milestones or ()],
    )
    rank_zero_info(
        f"lr {base_lr * scale:.3g} = base_lr {base_lr:g} x global batch {batch} / 512; "
        f"{total_steps} steps\n" + format_table(table_of(groups), base_lr * scale)
    )
    return {"optimizer": built, "lr_scheduler": {"scheduler": curve, "interval": "step"}}


def table_of(groups: list[dict[str, Any]]) -> list[LayerRow]:
    """Say of each parameter group how it is optimised, as `layer_table` does of a model."""
    return [
        LayerRow(g["name"], g["lr_scale"], g["weight_decay"], sum(p.numel() for p in g["params"]))
        for g in groups
    ]


def format_table(rows: list[LayerRow], lr: float) -> str:
    """Write the groups below each other: peak learning rate, weight decay, parameters."""
    width = max(len(row.name) for row in rows)
    head = f"  {'group':<{width}}  {'lr':>9}  {'weight decay':>12}  {'parameters':>11}"
    return "\n".join(
        [head]
        + [
            f"  {name:<{width}}  {lr * scale:>9.3g}  {decay:>12g}  {count:>11,}"
            for name, scale, decay, count in rows
        ]
    )


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
    return partial(kind, **spec["init_args"])


def _fuse(optimizer: Optimizer, precision: str) -> None:
    """Use the fused kernel where it exists: one launch instead of hundreds."""
    if optimizer.defaults.get("fused", False) is None and precision != "16-mixed":
        optimizer.defaults["fused"] = True  # with 16-mixed Lightning could no longer clip
        for group in optimizer.param_groups:
            group["fused"] = True
