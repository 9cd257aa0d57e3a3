"""The gauges of a run: each against what it should read."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from callback_parts import DigitsData, MiniSimMIM, trainer
from simmim.callbacks import Vitals
from simmim.callbacks.vitals import held_memory


class Watch(L.Callback):
    """Gradients, as they are."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        squares = [p.grad.square().sum() for p in module.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack(squares).sum().sqrt()))


class Telling(MiniSimMIM):
    """A module that remembers its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss.detach()))
        return loss


def read(logger: CSVLogger, name: str) -> list[float]:
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_best_and_gradients(tmp_path: Path, accumulate: int) -> None:
    logger, watch, model = CSVLogger(tmp_path), Watch(), Telling()
    fit = trainer(
        tmp_path,
        Vitals(),
        watch,
        logger=logger,
        max_epochs=3,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
    )
    fit.fit(model, datamodule=DigitsData())
    validation = read(logger, "val/loss")
    assert read(logger, "best/loss") == [min(validation[: i + 1]) for i in range(3)]
    assert read(logger, "train/grad_norm") == pytest.approx(watch.norms[1::2], rel=1e-4)
    assert all(0.05 < gib < 100 for gib in read(logger, "memory/max_gib"))


def test_the_best_score_outlives_an_interruption(tmp_path: Path) -> None:
    vitals = Vitals()
    vitals.best = {"best/top1": 0.9}
    again = Vitals()
    again.load_state_dict(vitals.state_dict())
    assert again.best == {"best/top1": 0.9}


def test_best_scores_are_synchronised_and_leave_out_single_classes() -> None:
    """Lightning would warn of each value that is not."""
    logged: dict[str, Any] = {}
    module: Any = SimpleNamespace(log_dict=lambda values, **options: logged.update(options))
    several: Any = SimpleNamespace(
        callback_metrics={"val/top1": 0.5, "val/top1_class/a": 1}, world_size=2
    )
    vitals = Vitals()
    vitals._validated = True
    vitals.on_train_epoch_end(several, module)
    assert vitals.best == {"best/top1": 0.5}
    assert logged == {"sync_dist": True}


def test_no_step_between_logs_reads_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    for name in ("item", "__float__", "tolist", "cpu", "__bool__"):
        whole = getattr(Tensor, name)

        def noting(self: Tensor, *args: Any, _n: str = name, _w: Any = whole, **kw: Any) -> Any:
            reads.append(_n)
            return _w(self, *args, **kw)

        monkeypatch.setattr(Tensor, name, noting)
    vitals, module = Vitals(), MiniSimMIM()
    between = SimpleNamespace(global_step=3, log_every_n_steps=50, accumulate_grad_batches=1)
    outputs = {"loss": torch.tensor(1.0)}
    for batch_idx in range(3):
        vitals.on_train_batch_end(between, module, outputs, {}, batch_idx)  # type: ignore[arg-type]
        vitals.on_before_optimizer_step(between, module, None)  # type: ignore[arg-type]
    assert reads == []
    float(outputs["loss"])
    assert reads == ["__float__"]  # which would have been seen


def test_a_device_without_a_gauge_reads_nothing() -> None:
    assert held_memory(torch.device("meta")) is None
