"""Going on in the data: the number of optimiser steps tells the epoch and the batch.

Order, crops and flips depend on (seed, epoch, index) alone, so a loader has no state that would
have to be kept. After s steps, of a batches each, in epochs of b batches, the next batch is the
first of step s: epoch and step in it are s divided by ceil(b / a), as the last step of an epoch may
have fewer batches. That holds as long as b and a are the same in all epochs.

Lightning makes the training loader before it restores its counters where something asks for the
number of steps (`estimated_stepping_batches`, in `configure_optimizers`), and it restores the data
module before them. So the sampler asks for the place only when a pass begins, and the step is the
larger of the trainer's and the one that the data module has kept.
"""

import math
from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler


def accumulation(trainer: Any) -> int:
    """Batches in an optimiser step; 1 without a trainer.

    Raises:
        ValueError: If it changes between epochs.
    """
    if trainer is None:
        return 1
    if any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):
        raise ValueError(
            "with GradientAccumulationScheduler the number of steps does not tell the place in "
            "the data: use trainer.accumulate_grad_batches"
        )
    return int(trainer.accumulate_grad_batches)


def next_batch(trainer: Any, kept_step: int, batches: int) -> tuple[int, int] | None:
    """Tell where a pass begins, as (epoch, batch); None without a trainer.

    Args:
        trainer: The trainer.
        kept_step: Optimiser steps that the data module's state says were made.
        batches: In an epoch, before `limit_train_batches`.
    """
    if trainer is None:
        return None
    batches = max(limited(batches, trainer.limit_train_batches), 1)
    return position(max(trainer.global_step, kept_step), batches, accumulation(trainer))


def position(global_step: int, batches: int, accumulation: int) -> tuple[int, int]:
    """Tell which batch comes after so many optimiser steps.

    Args:
        global_step: Optimiser steps that were made.
        batches: In an epoch, as the trainer counts them.
        accumulation: Batches in a step; the last step of an epoch may have fewer.

    Returns:
        The epoch and the batch in it, both counted from 0.
    """
    epoch, step = divmod(global_step, math.ceil(batches / accumulation))
    return epoch, step * accumulation


def limited(batches: int, limit: int | float) -> int:
    """Apply Lightning's `limit_train_batches`: a number of batches, or a share of them."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
