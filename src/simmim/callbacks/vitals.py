"""Whether a run is healthy and worth going on: best scores, gradients, memory."""

import sys
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any

import lightning as L
import torch

from simmim.callbacks.base import is_logging_step
from simmim.evaluation.metrics import less_is_better
from simmim.training.strategies import gradient_norm

GIB = 2**30


class Vitals(L.Callback):
    """Log what tells a healthy run from a sick one.

    At logging steps `train/grad_norm` (of the whole gradient, before clipping) and `memory/max_gib`
    (the most that this run has held so far: of the GPU, or of the process on a CPU). At the end of
    an epoch with a validation `best/NAME` of each val/NAME, the least loss or error and the
    greatest of anything else, over the whole run, also where it was interrupted: a board's summary
    shows the last value of each curve, and so the last score and the best.
    """

    def __init__(self) -> None:
        self.best: dict[str, float] = {}
        self._validated = False

    def state_dict(self) -> dict[str, Any]:
        """Keep the best scores."""
        return {"best": self.best, "validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best scores."""
        self.best, self._validated = dict(state_dict["best"]), state_dict["validated"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        if trainer.global_step == 0:
            self.best = {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for this epoch's scores."""
        self._validated = False

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        """Measure the gradients at logging steps, without waiting for the device."""
        if is_logging_step(trainer, ahead=1):
            pl_module.log("train/grad_norm", gradient_norm(pl_module))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Read the memory's gauge at logging steps."""
        if is_logging_step(trainer) and (memory := held_memory(pl_module.device)) is not None:
            pl_module.log("memory/max_gib", memory / GIB, rank_zero_only=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that this epoch has scores of its own."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare each score with the best."""
        if not self._validated:
            return
        scores = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        for name, value in scores.items():
            other = name == "val/avg_dist" or name.count("/") > 1  # how hard masks are; classes
            if other or not isfinite(value):
                continue
            better = min if less_is_better(name) else max
            key = name.replace("val/", "best/", 1)
            self.best[key] = better(self.best.get(key, value), value)
        pl_module.log_dict(self.best, sync_dist=True)  # equal on all


def held_memory(device: torch.device) -> int | None:
    """The most bytes held so far: of a GPU by this process's tensors, or of the process itself."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":  # Windows has no such gauge in Python
        return None
    with suppress(OSError):  # Linux; getrusage would count what the process that began it had
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes there, KiB elsewhere
