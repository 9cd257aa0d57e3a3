"""The gauges of a run: each against what it should read."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from callback_parts import DigitsData, MiniSimMIM, trainer
from simmim.callbacks import Vitals
from support.commands import column


class Watch(L.Callback):
    """Gradients, as they are."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        squares = [p.grad.square().sum() for p in module.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack(squares).sum().sqrt()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_best_and_gradients(tmp_path: Path, accumulate: int) -> None:
    logger, watch, vitals = CSVLogger(tmp_path), Watch(), Vitals()
    options = {"max_epochs": 3, "log_every_n_steps": 2, "accumulate_grad_batches": accumulate}
    fit = trainer(tmp_path, vitals, watch, logger=logger, **options)
    fit.fit(MiniSimMIM(), datamodule=DigitsData())
    metrics = Path(logger.log_dir) / "metrics.csv"
    validation = column(metrics, "val/loss")
    assert column(metrics, "best/loss") == [min(validation[: i + 1]) for i in range(3)]
    assert column(metrics, "train/grad_norm") == pytest.approx(watch.norms[1::2], rel=1e-4)
    assert all(0.05 < gib < 100 for gib in column(metrics, "memory/max_gib"))
    again = Vitals()  # of a run that goes on
    again.load_state_dict(vitals.state_dict())
    assert again.best == {"best/loss": pytest.approx(min(validation))}


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
