"""Run by test_callbacks_probe: train with callbacks in some processes, then meet a bad loss in one.

Usage: python ddp_callbacks.py FOLDER PROCESSES
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from callback_parts import DigitsData, MiniSimMIM, trainer
from simmim.callbacks import CollapseAlarm, OnlineProbe, Reconstructions, StopOnNonFinite


class Data(DigitsData):
    def train_dataloader(self) -> DataLoader[Any]:
        ranks = self.trainer.world_size
        sampler = DistributedSampler(self.train, ranks, self.trainer.global_rank, seed=0)
        return DataLoader(self.train, batch_size=32 // ranks, sampler=sampler)


class BadInOne(MiniSimMIM):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 2 and self.global_rank == 1 else loss


def main(folder: str, processes: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    watchers = [OnlineProbe(), Reconstructions(num_images=2), CollapseAlarm(), StopOnNonFinite()]
    strategy = "ddp" if processes > 1 else "auto"
    options: dict[str, Any] = {"devices": processes, "strategy": strategy, "max_epochs": 2}
    data = Data(train=256, val=95)
    fit = trainer(Path(folder), *watchers, **options, use_distributed_sampler=False)
    model = MiniSimMIM(0.03)
    model.encoder.drop.p = 0.0  # each process draws its own
    fit.fit(model, datamodule=data)
    probe: Any = watchers[0]
    result = {"untrained": probe.untrained, "pretrained": probe.pretrained, "stopped": ""}
    try:
        trainer(Path(folder), StopOnNonFinite(), **options).fit(BadInOne(), datamodule=data)
    except ValueError as error:
        result["stopped"] = type(error).__name__
    if fit.global_rank == 0:
        torch.save(result, Path(folder) / "result.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
