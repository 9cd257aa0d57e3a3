"""When a run's state is saved, how it is written, and how a run stops where it can go on."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from simmim.base.errors import FULL
from simmim.base.files import sync_folder, written_whole
from simmim.weights.shards import is_sharded, read_sharded

CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
BEFORE = ".before"  # what an earlier folder's name ends with while a later one takes its place

NOTHING, SAVE, INTERRUPT, STOP, REQUEUE = range(5)  # what is to be done before the next step


# When --------------------------------------------------------------------------------------------


class KeepLast(Checkpoint):
    """Keep the run's last state in `checkpoints/last.ckpt`: each epoch, and within long ones.

    It is written between two optimiser steps, when all that belongs to the one before is done,
    validation and logs included: what goes on from there becomes, to the bit, what it would have
    become. There SIGTERM, SLURM's signal before a job's time is over, and the first Ctrl+C end the
    run as well; the second Ctrl+C ends it at once.

    Args:
        every_n_minutes: Minutes between two of them, where an epoch is longer. 0: at every step.
    """

    def __init__(self, every_n_minutes: float = 30.0) -> None:
        if every_n_minutes < 0:
            raise ValueError(f"every_n_minutes {every_n_minutes} is negative: use 0 for every step")
        self.every_n_minutes = every_n_minutes
        self._path = Path(LAST)
        self._asked = NOTHING  # by a signal, in this process
        self._saved_at, self._saved_step = 0.0, 0  # by time.monotonic, and in optimiser steps
        self._is_listening = False  # for Ctrl+C

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run's folder, and listen."""
        folder: str = trainer.strategy.broadcast(str(trainer.default_root_dir))
        self._path, self._asked = Path(folder, CHECKPOINTS, LAST), NOTHING
        if stage == "fit":
            self._listen(trainer)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen again: Lightning has put its own handlers there."""
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._listen(trainer)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        self._is_listening = False  # before the first step there is nothing to save

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save or stop before an optimiser step begins, all processes at once."""
        if batch_idx % trainer.accumulate_grad_batches or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self._is_listening:
            self._listen_to_the_keyboard()
        todo = self._agree(
            trainer, max(self._asked, SAVE if self._is_due(trainer, batch_idx) else 0)
        )
        if todo >= SAVE:
            self._save(trainer)
        if todo == REQUEUE and trainer.is_global_zero:
            requeue()
        if todo == INTERRUPT:
            raise KeyboardInterrupt
        if todo >= STOP:
            raise SIGTERMException

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state."""
        if trainer.global_step != self._saved_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Make any checkpoint say that an optimiser step has just ended or is about to begin.

        Gradients that are being accumulated are not kept: a checkpoint from among them goes back to
        where they began, with the same weights (but a BatchNorm's averages, which move on).
        """
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        current, total = progress["current"], progress["total"]
        begun = current["ready"] > current["started"]
        over = current["processed"] % trainer.accumulate_grad_batches
        if begun or (over and not progress["is_last_batch"]):
            for counts in (current, total):
                batches = counts["processed"] - over
                counts.update(dict.fromkeys(counts, batches))
            progress["is_last_batch"] = False
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
        if epochs["completed"] == epochs["ready"] > 0:  # the last epoch that was trained
            checkpoint["epoch"] = epochs["completed"] - 1

    def _is_due(self, trainer: Trainer, batch_idx: int) -> bool:
        late = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        return (late or batch_idx == 0) and trainer.global_step != self._saved_step

    def _agree(self, trainer: Trainer, todo: int) -> int:
        """What the most demanding process wants."""
        if trainer.world_size == 1:
            return todo
        wish = torch.tensor(todo, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(wish, reduce_op="max"))

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self._path, weights_only=False)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    # Signals -------------------------------------------------------------------------------------

    def _listen(self, trainer: Trainer) -> None:
        """Only note what is asked: Lightning's handlers would save in the middle of a step."""
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGTERM, lambda *_: self._ask(STOP))
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            assert environment.requeue_signal is not None
            signal.signal(environment.requeue_signal, lambda *_: self._ask(REQUEUE))

    def _listen_to_the_keyboard(self) -> None:
        """Let the first Ctrl+C wait for the end of the step, and the second for nothing."""
        self._is_listening = True
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._ask(INTERRUPT)
        rank_zero_info("\nCtrl+C: saves and stops after this step; Ctrl+C again stops at once")

    def _ask(self, todo: int) -> None:
        self._asked = max(self._asked, todo)


@contextmanager
def signals_put_back() -> Iterator[None]:
    """Put back, at the end, how this process answers the signals that a run answers."""
    names = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def requeue() -> None:
    """Ask SLURM to start this job again."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = os.environ["SLURM_JOB_ID"]
    if array is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
        rank_zero_info(f"SLURM starts job {job} again, which goes on with this run")
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"SLURM does not start job {job} again: {error}")


class KeepBest(ModelCheckpoint):
    """Lightning's, which also takes up the last score: it keeps it, and forgets to read it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint holds of it."""
        super().load_state_dict(state_dict)
        self.current_score = state_dict["current_score"]


def best_checkpoint(folder: Path, monitor: str, mode: str) -> ModelCheckpoint:
    """Keep the best state.

    Args:
        folder: Of the run.
        monitor: The metric that tells the best.
        mode: Whether its least is best, or its greatest: min or max.
    """
    return KeepBest(
        folder / CHECKPOINTS,
        filename="best",
        monitor=monitor,
        mode=mode,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )


# How ---------------------------------------------------------------------------------------------


class DurableCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint such that it is whole, or the earlier one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Save a checkpoint.

        Raises:
            OSError: If the disk is full; nothing is left behind then.
        """
        if "://" in str(path):  # a remote store has no rename
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with written_whole(Path(path)) as part, part.open("wb") as file:
                torch.save(checkpoint, file)
        except Exception as error:
            if full := _full_disk(error):
                raise OSError(full.errno, "no room for a checkpoint", str(path)) from error
            raise

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint; one in shards is put together."""
        if is_sharded(path):
            return read_sharded(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)


def put_in_place(beside: Path, path: Path) -> None:
    """Give a folder of shards its name, which an earlier checkpoint may have.

    No folder can replace another at one stroke: between the two renames there is the earlier one
    under another name, which `there_is` puts back.
    """
    before = path.with_name(f".{path.name}{BEFORE}")
    shutil.rmtree(before, ignore_errors=True)
    if path.exists():
        path.rename(before)
    beside.rename(path)
    sync_folder(path.parent)
    remove(before)


def there_is(path: Path) -> bool:
    """Whether there is a checkpoint; one whose replacement was cut short is put back."""
    before = path.with_name(f".{path.name}{BEFORE}")
    if not path.exists() and before.exists():
        with suppress(OSError):  # another process was quicker
            before.rename(path)
    return path.exists()


def remove(path: Path) -> None:
    """Remove a checkpoint, a file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _full_disk(error: BaseException | None) -> OSError | None:
    """The error that says so: torch raises one of its own on top of it."""
    while error is not None and not (isinstance(error, OSError) and error.errno in FULL):
        error = error.__context__
    return error
