"""Run by test_callbacks_probe: train with callbacks in processes, then meet what is bad in one.

Usage: python ddp_callbacks.py FOLDER PROCESSES STRATEGY
"""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from callback_parts import DigitsData, MiniSimMIM, trainer
from ddp_step import STRATEGIES, fsdp_on_cpu
from simmim.callbacks import (
    CollapseAlarm,
    NonFiniteLoss,
    OnlineProbe,
    Reconstructions,
    StopOnNonFinite,
)
from simmim.strategies import shard


class Data(DigitsData):
    def train_dataloader(self) -> DataLoader[Any]:
        ranks = self.trainer.world_size
        sampler = DistributedSampler(self.train, ranks, self.trainer.global_rank, seed=0)
        return DataLoader(self.train, batch_size=32 // ranks, sampler=sampler)


class Shared(MiniSimMIM):
    def configure_model(self) -> None:
        shard(self)


class BadInOne(Shared):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 2 and self.global_rank == 1 else loss


class RuinOne(L.Callback):
    """Spoil the weights that the second process holds, after a loss that was finite."""

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 8:
            for parameter in module.parameters():
                own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                own.detach().fill_(float("nan"))


def main(folder: str, processes: int, strategy: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    probe = OnlineProbe()
    watchers = [probe, Reconstructions(num_images=2), CollapseAlarm(), StopOnNonFinite()]

    def run(*callbacks: L.Callback, **more: Any) -> L.Trainer:
        options: dict[str, Any] = {"devices": processes, "strategy": STRATEGIES[strategy]()}
        return trainer(Path(folder), *callbacks, **{**options, "max_epochs": 2, **more})

    data = Data(train=256, val=95)
    fit = run(*watchers, use_distributed_sampler=False)
    model = Shared(0.03)
    model.encoder.drop.p = 0.0  # each process draws its own
    fit.fit(model, datamodule=data)
    collapse = {k: float(v) for k, v in fit.callback_metrics.items() if k.startswith("collapse/")}
    result: dict[str, Any] = {"untrained": probe.untrained, "pretrained": probe.pretrained}
    result |= {"collapse": collapse, "stopped": stopped(run(StopOnNonFinite()), BadInOne(), data)}
    keep = ModelCheckpoint(folder, filename="last")
    save = {"enable_checkpointing": True, "log_every_n_steps": 1000}
    result["ruined"] = stopped(run(StopOnNonFinite(), RuinOne(), keep, **save), Shared(), data)
    if fit.global_rank == 0:
        torch.save(result, Path(folder) / "result.pt")


def stopped(fit: L.Trainer, model: L.LightningModule, data: L.LightningDataModule) -> str:
    """What a run was stopped with."""
    try:
        fit.fit(model, datamodule=data)
    except NonFiniteLoss as error:
        return str(error)
    return ""


if __name__ == "__main__":
    fsdp_on_cpu()
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
