"""How fast it goes: images per second in the logs, and a bar with the time left."""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Any, TextIO, cast

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import convert_inf
from torch import Tensor

from simmim.base.progress import Lines, can_redraw
from simmim.callbacks.base import is_logging_step

BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Throughput(L.Callback):
    """Log `throughput/images_per_s`: images of all processes over the last logging window.

    Beside it `throughput/data_wait` (the share of that time in which the loop waited for the
    loader), and `throughput/batch_size` (images of one optimiser step).

    Wall-clock time from loading the images to the optimiser step, without validation, pictures,
    probes and checkpoints. No step waits for the device on its account: Lightning does, at the end
    of each window, to write its metrics.
    """

    def __init__(self) -> None:
        self._images, self._seconds, self._waited = 0, 0.0, 0.0
        self._since: float | None = None  # when the clock was last started
        self._timed: L.Trainer | None = None  # whose loader is timed

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to time the loader."""
        if self._timed is not trainer:
            self._time_loading(trainer)
            self._timed = trainer

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the images, and log at the end of a window."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        logs = is_logging_step(trainer) and stepped
        if logs:
            batch_size = images_in(batch) * trainer.world_size * trainer.accumulate_grad_batches
            pl_module.log("throughput/batch_size", float(batch_size), rank_zero_only=True)
        if self._since is None:  # resumed in the middle of an epoch
            self._since = time.perf_counter()
            return
        self._images += images_in(batch) * trainer.world_size
        if logs:
            self._pause()
            speed = self._images / max(self._seconds, 1e-9)
            waited = min(self._waited / max(self._seconds, 1e-9), 1.0)
            pl_module.log("throughput/images_per_s", speed, rank_zero_only=True)
            pl_module.log("throughput/data_wait", waited, rank_zero_only=True)
            self._images, self._seconds, self._waited = 0, 0.0, 0.0
            self._since = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._pause()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock: what comes between epochs is not training."""
        self._pause()

    def _time_loading(self, trainer: L.Trainer) -> None:
        """Time each call of the loader: no public hook of Lightning's comes before it."""
        loop: Any = trainer.fit_loop.epoch_loop
        before, after = loop._on_before_fetch, loop._on_after_fetch
        began = 0.0

        def start() -> None:
            nonlocal began
            before()
            began = time.perf_counter()

        def stop() -> None:
            after()
            if self._since is not None:  # between epochs the clock stands still
                self._waited += time.perf_counter() - began

        loop._on_before_fetch, loop._on_after_fetch = start, stop

    def _pause(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with the loss, images/s, and the time left of the whole run.

    It is redrawn a few times a second rather than at every step, and only then reads the loss:
    that waits for the device. What is logged with `prog_bar=True` Lightning reads at every step.

    Args:
        seconds: Seconds between two updates.
    """

    def __init__(self, seconds: float = 0.5) -> None:
        super().__init__()
        self.seconds = seconds
        self._drawn = self._run_began = self._epoch_began = 0.0  # by time.monotonic
        self._first_step, self._epoch = 0, -1
        self._images, self._speed = 0, 0.0  # of this epoch, over all processes
        self._loss: Tensor | None = None  # of the last step, in this process

    def on_train_start(self, *args: Any) -> None:
        """Start the clock of the time left."""
        super().on_train_start(*args)
        self._run_began = self._epoch_began = time.monotonic()
        self._first_step, self._epoch = self.trainer.global_step, -1

    def init_train_tqdm(self) -> Any:
        """Leave out tqdm's own speed and time left, which are the epoch's."""
        with _on_any_output(ends=True):
            bar = super().init_train_tqdm()
        bar.bar_format = BAR
        return bar

    def init_sanity_tqdm(self) -> Any:
        """Write lines where there is no terminal."""
        with _on_any_output(ends=False):
            return super().init_sanity_tqdm()

    def init_validation_tqdm(self) -> Any:
        """Likewise."""
        with _on_any_output(ends=self.trainer.state.fn == "validate"):
            return super().init_validation_tqdm()

    def init_test_tqdm(self) -> Any:
        """Likewise."""
        with _on_any_output(ends=True):
            return super().init_test_tqdm()

    def init_predict_tqdm(self) -> Any:
        """Likewise."""
        with _on_any_output(ends=True):
            return super().init_predict_tqdm()

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Say which epoch of how many."""
        self._begin_epoch(trainer)

    def _begin_epoch(self, trainer: L.Trainer) -> None:
        self.train_progress_bar.reset(convert_inf(self.total_train_batches))
        self._epoch_began, self._images, self._epoch = time.monotonic(), 0, trainer.current_epoch
        of = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        self.train_progress_bar.set_description_str(f"Epoch {trainer.current_epoch + 1}{of}")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Redraw if it is time."""
        if self._epoch != trainer.current_epoch:  # resumed within an epoch
            self._begin_epoch(trainer)
        self._loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        self._images += images_in(batch) * trainer.world_size
        self._speed = self._images / max(time.monotonic() - self._epoch_began, 1e-9)
        last = batch_idx + 1 == trainer.num_training_batches
        if self.is_enabled and (last or time.monotonic() - self._drawn >= self.seconds):
            bar = self.train_progress_bar  # drawn once, with what belongs to this step
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.n = batch_idx + 1
            if not last or can_redraw(sys.stdout):  # a file has one line, with this epoch's scores
                bar.refresh()
            self._drawn = time.monotonic()

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Collect what stands behind the bar: losses, images/s, time left."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        metrics.pop("train/loss", None)
        if self._loss is not None:
            # Lightning divides it, so that the gradients of an accumulated step are their mean.
            loss = float(self._loss) * trainer.accumulate_grad_batches
            metrics = {"loss": loss, **metrics}
        if self._speed:
            metrics["images/s"] = round(self._speed)
        if (left := self._seconds_left(trainer)) is not None:
            metrics["left"] = self.train_progress_bar.format_interval(left)
        return metrics

    def _seconds_left(self, trainer: L.Trainer) -> float | None:
        done = trainer.global_step - self._first_step
        if not done:  # before the first step Lightning would load the training data to know
            return None
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            return None
        per_step = (time.monotonic() - self._run_began) / done
        return max(0.0, per_step * (total - trainer.global_step))


def _on_any_output(*, ends: bool) -> AbstractContextManager[object]:
    """Where Lightning makes a bar on stdout, which may be a file; `ends` as in `Lines`."""
    if can_redraw(sys.stdout):
        return nullcontext()
    return redirect_stdout(cast(TextIO, Lines(sys.stdout, ends=ends)))


def images_in(batch: Any) -> int:
    """Count the images of a batch: a dict of ours, (images, labels), or images alone."""
    if isinstance(batch, Mapping):
        return len(batch["image"])
    return len(batch[0]) if isinstance(batch, Sequence) else len(batch)
