"""Lightning's Trainer without output, and the strategies that tests run on processors."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from simmim.training.strategies import FullyShard

STRATEGIES: dict[str, Any] = {
    "auto": lambda: "auto",
    "ddp": lambda: "ddp",
    "fully_shard": lambda: FullyShard(),
}


def quiet_trainer(folder: Path | None = None, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A Trainer on the processor that prints and keeps nothing, for an epoch."""
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": list(callbacks),
    }
    return L.Trainer(**{**defaults, **options})


def trainer_of(
    processes: int, folder: Path, *callbacks: L.Callback, strategy: str = "ddp", **options: Any
) -> L.Trainer:
    """The Trainer of one of some processes that torchrun has started; one alone has no strategy."""
    return quiet_trainer(
        folder,
        *callbacks,
        devices=processes,
        strategy=STRATEGIES[strategy if processes > 1 else "auto"](),
        use_distributed_sampler=False,
        **options,
    )


class Notes(L.LightningModule):
    """Notes which images it was given, and when."""

    def __init__(self, early: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[Any, ...]] = []
        self.early = early

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        """Note step, epoch, batch, indices and the mean of the pixels."""
        image = batch["image"].float().mean()
        place = (self.global_step, self.current_epoch, batch_idx)
        self.seen.append((*place, batch["index"].tolist(), image.item()))
        return self.weight * image

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the mean of the pixels."""
        self.log("val/loss", batch["image"].float().mean())

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        """The paths."""
        paths: list[str] = batch["path"]
        return paths

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A loader is made here where that is to be early."""
        if self.early:  # makes the loader before the trainer knows how far it was
            _ = self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), 0.1)
