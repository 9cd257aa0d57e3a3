"""Throughput and the bar: the arithmetic by a clock of our own, the text as a person sees it."""

import csv
import re
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from callback_parts import DigitsData, MiniSimMIM, trainer
from simmim.callbacks import ProgressBar, Throughput
from simmim.callbacks.progress import images_in


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        for name in ("perf_counter", "monotonic"):
            monkeypatch.setattr(time, name, lambda: self.now)


class Timed(MiniSimMIM):
    """A quarter of a second a training step, a minute a validation step."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = [clock]  # not a submodule's business

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.clock[0].now += 0.25
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock[0].now += 60
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_throughput_counts_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    logger = CSVLogger(tmp_path)
    fit = trainer(
        tmp_path,
        Throughput(),
        logger=logger,
        max_epochs=3,
        log_every_n_steps=3,
        val_check_interval=4,
        accumulate_grad_batches=accumulate,
    )
    model = Timed(Clock(monkeypatch))
    fit.fit(model, datamodule=DigitsData())
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("throughput/images_per_s")
    speeds = [float(row.split(",")[column]) for row in lines[1:] if row.split(",")[column]]
    assert len(speeds) == 24 // accumulate // 3  # windows go on over the end of an epoch
    assert speeds == [pytest.approx(32 / 0.25)] * len(speeds)


class Slow(DigitsData):
    """Loads a batch in three quarters of a second."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def train_dataloader(self) -> Any:
        def collate(samples: Any) -> Any:
            self.clock.now += 0.75
            return default_collate(samples)

        return DataLoader(self.train, batch_size=32, collate_fn=collate)


def test_waiting_for_the_loader_is_a_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, clock = CSVLogger(tmp_path), Clock(monkeypatch)
    fit = trainer(
        tmp_path, Throughput(), logger=logger, log_every_n_steps=2, accumulate_grad_batches=2
    )
    fit.fit(Timed(clock), datamodule=Slow(clock))
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["throughput/data_wait"]]
    assert [float(row["throughput/data_wait"]) for row in rows] == pytest.approx(
        [0.75] * 4, abs=0.1
    )
    assert {float(row["throughput/batch_size"]) for row in rows} == {64.0}


def test_bar_says_loss_speed_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = trainer(tmp_path, ProgressBar(seconds=0), max_epochs=4, enable_progress_bar=True)
    shown: list[dict[str, Any]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            shown.append(trainer.progress_bar_callback.get_metrics(trainer, module))

    fit.callbacks.insert(0, Watch())
    model = Timed(Clock(monkeypatch))
    fit.fit(model, datamodule=DigitsData())
    text = capsys.readouterr().out
    assert re.search(r"Epoch 4/4 100%\|█+\| 8/8 \[.*loss=\d\.\d+, images/s=\d+, left=", text)
    assert "train/loss" not in text
    # Eight steps of 0.25 s are done, 24 are left; validations count from the first one on.
    assert shown[7]["left"] == "00:06"
    # 9.25 steps' worth of time and three validation batches of a minute behind, 23 steps ahead.
    assert shown[8]["left"] == "07:45"
    assert shown[12]["images/s"] == pytest.approx(32 / 0.25)  # of training alone


def test_the_bar_shows_the_whole_loss_where_gradients_are_accumulated(tmp_path: Path) -> None:
    bar = ProgressBar()
    fit = trainer(tmp_path, bar, max_epochs=1, accumulate_grad_batches=4, enable_progress_bar=True)
    model = MiniSimMIM()
    fit.fit(model, datamodule=DigitsData())
    shown = bar.get_metrics(fit, model)["loss"]
    assert shown == pytest.approx(float(fit.callback_metrics["train/loss"]), rel=1e-5)


@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint")  # the bar matters here
def test_the_bar_of_a_run_resumed_within_an_epoch_knows_its_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    trainer(tmp_path, Save(), max_epochs=1).fit(MiniSimMIM(), datamodule=DigitsData())
    second = trainer(tmp_path, ProgressBar(seconds=0), max_epochs=2, enable_progress_bar=True)
    second.fit(MiniSimMIM(), datamodule=DigitsData(), ckpt_path=str(tmp_path / "within.ckpt"))
    text = capsys.readouterr().out
    assert re.search(r"Epoch 1/2 100%.* 8/8 .*loss=", text)
    assert "/?" not in text.replace("0/?", "")


def test_bar_does_not_wait_for_the_device_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0

    class Counting(ProgressBar):
        def get_metrics(self, *args: Any) -> Any:
            nonlocal reads
            reads += 1
            return super().get_metrics(*args)

    clock = Clock(monkeypatch)
    fit = trainer(tmp_path, Counting(1.0), max_epochs=1, enable_progress_bar=True)
    fit.fit(Timed(clock), datamodule=DigitsData(train=32 * 20))
    assert reads <= 20 * 0.25 / 1.0 + 3


def test_bar_without_an_end(tmp_path: Path) -> None:
    fit = trainer(tmp_path, ProgressBar(), max_epochs=-1, max_steps=4, enable_progress_bar=True)
    fit.fit(MiniSimMIM(), datamodule=DigitsData())
    assert fit.global_step == 4


def test_images_are_counted_in_any_batch() -> None:
    images = torch.zeros(3, 1, 2, 2)
    assert images_in({"image": images, "index": torch.arange(3)}) == 3
    assert images_in((images, torch.zeros(3))) == images_in(images) == 3


def test_the_time_left_is_not_asked_for_before_the_first_step() -> None:
    class Trainer:
        global_step = 0

        @property
        def estimated_stepping_batches(self) -> int:
            raise AssertionError("Lightning would load the training data, and say so")

    fresh: Any = Trainer()
    assert ProgressBar()._seconds_left(fresh) is None
