"""Throughput and the bar: the arithmetic by a clock of our own, the text as a person sees it."""

import re
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from callback_parts import DigitsData, MiniSimMIM, trainer
from simmim.callbacks import ProgressBar, Throughput
from support.commands import column


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
    options = {"log_every_n_steps": 3, "val_check_interval": 4, "max_epochs": 3}
    logger = CSVLogger(tmp_path)
    fit = trainer(
        tmp_path, Throughput(), logger=logger, accumulate_grad_batches=accumulate, **options
    )
    fit.fit(Timed(Clock(monkeypatch)), datamodule=DigitsData())
    speeds = column(Path(logger.log_dir) / "metrics.csv", "throughput/images_per_s")
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
    options = {"log_every_n_steps": 2, "accumulate_grad_batches": 2}
    fit = trainer(tmp_path, Throughput(), logger=logger, **options)
    fit.fit(Timed(clock), datamodule=Slow(clock))
    metrics = Path(logger.log_dir) / "metrics.csv"
    assert column(metrics, "throughput/data_wait") == pytest.approx([0.75] * 4, abs=0.1)
    assert set(column(metrics, "throughput/batch_size")) == {64.0}


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
