"""Lightning's Trainer without output, and the strategies that tests run on processors."""

from pathlib import Path
from typing import Any

import lightning as L

from simmim.strategies import FullyShard

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
