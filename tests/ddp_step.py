"""Run by test_strategies: train on eight images with some processes, then write the weights.

Usage: python ddp_step.py PROCESSES OUT
"""

import sys
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from test_pretrain import ByIndex, tiny


def main(processes: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tiny(warmup_epochs=1, base_lr=0.1, masking="foreground", masking_kwargs={"nodata": 0})
    data = ByIndex()
    data.images[::2, :, :16] = 0  # half of each second image is nodata: uneven numbers are hidden
    losses: list[float] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, run: L.Trainer, *args: Any) -> None:
            losses.append(float(run.callback_metrics["train/loss"]))

    run = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[Keep()],
    )
    run.fit(model, DataLoader(data, batch_size=8 // processes))
    if run.global_rank == 0:
        torch.save({"losses": losses, "state": model.state_dict()}, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
