"""Run by test_strategies: train on images with some processes, then write what came of it.

Usage: python ddp_step.py PROCESSES OUT [KEY=VALUE ...] [-- OUT [KEY=VALUE ...] ...]

Keys: strategy, batches (to accumulate), clip, clip_by (norm or value), epochs, save (a checkpoint),
load (one to go on from), precision, model (one of MODELS or CLASSIFIERS).
"""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from simmim.checkpoints import DurableCheckpointIO
from simmim.classify import Classifier
from simmim.strategies import FSDP, FullyShard, gradient_norm
from test_pretrain import TINY, ByIndex, tiny

STRATEGIES: dict[str, Any] = {
    "auto": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp": lambda: FSDP(),
    "fsdp_sharded": lambda: FSDP(state_dict_type="sharded"),
    "fsdp_no_shard": lambda: FSDP(sharding_strategy="NO_SHARD"),
    "fully_shard": lambda: FullyShard(),
    "fully_shard_sharded": lambda: FullyShard(save_distributed_checkpoint=True),
}

SKIP = {"hidden_tokens": "skip", "head": "transformer", "head_kwargs": {"width": 64}}
SKIP |= {"masking": "random", "masking_kwargs": None}
SWIN = {
    "encoder": "swin_tiny_patch4_window7_224",
    "mask_patch_size": 16,
    "encoder_kwargs": {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4},
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"grad_checkpointing": True},
    "compiled": {"compile": True},
    "skip": SKIP,
    "swin": SWIN,
    "swin_skip": {**SWIN, **SKIP},
    "swin_skip_checkpointing": {**SWIN, **SKIP, "grad_checkpointing": True},
}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "finetune": {"layer_decay": 0.5},  # and its first block is frozen
    "probe": {"frozen": True},
}


class Labelled(ByIndex):
    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {**super().__getitem__(i), "label": torch.tensor(i % 3)}


class Data(L.LightningDataModule):
    """Sixteen images, in the same global batches of eight for any number of processes."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.images, self.batch_size = Labelled(n=16), batch_size
        self.images.images[::2, :, :16] = 0  # half is nodata: uneven numbers are hidden

    def train_dataloader(self) -> DataLoader[Any]:
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(self.images, ranks, rank, shuffle=False)
        return DataLoader(self.images, batch_size=self.batch_size, sampler=sampler)


class Keep(L.Callback):
    """What each batch gave: its loss over all processes, its gradient's norm, the lr after it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, run: L.Trainer, model: Any, optimizer: Any) -> None:
        self.norms.append(float(gradient_norm(run, model)))

    def on_train_batch_end(self, run: L.Trainer, *args: Any) -> None:
        self.losses.append(float(run.callback_metrics["train/loss"]))
        self.rates.append(run.optimizers[0].param_groups[0]["lr"])


class Stop(L.Callback):
    """End after some of the epochs, as a run does that is stopped."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, run: L.Trainer, *args: Any) -> None:
        run.should_stop = run.current_epoch + 1 >= self.epochs


def build(name: str) -> L.LightningModule:
    """A model by its name here."""
    options: dict[str, Any] = {"warmup_epochs": 1, "base_lr": 0.1}
    if name not in CLASSIFIERS:
        options |= {"masking": "foreground", "masking_kwargs": {"nodata": 0}}
        return tiny(**{**options, **MODELS[name]})
    shape = {k: v for k, v in TINY.items() if k != "mask_patch_size"}
    model = Classifier(**shape, **options, **CLASSIFIERS[name], num_classes=3)
    model.model.blocks[0].requires_grad_(False)
    return model


def fsdp_on_cpu() -> None:
    """Name FSDP the device: without one it looks for a GPU, though gloo does all that it needs."""
    init = FullyShardedDataParallel.__init__

    def with_device(*args: Any, **kwargs: Any) -> None:
        init(*args, **{**kwargs, "device_id": torch.device("cpu")})

    FullyShardedDataParallel.__init__ = with_device  # type: ignore[method-assign]


def main(processes: int, out: Path, given: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = build(given.get("model", "plain"))
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p]
    strategy = given.get("strategy", "ddp" if processes > 1 else "auto")
    batches, keep = int(given.get("batches", 1)), Keep()
    run = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=STRATEGIES[strategy](),
        max_epochs=4,
        callbacks=[keep, Stop(int(given.get("epochs", 4)))],
        gradient_clip_val=float(given["clip"]) if "clip" in given else None,
        gradient_clip_algorithm=given.get("clip_by"),
        precision=given.get("precision", "32-true"),  # type: ignore[arg-type]
        accumulate_grad_batches=batches,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        use_distributed_sampler=False,
    )
    run.strategy.checkpoint_io = DurableCheckpointIO()
    run.fit(model, Data(8 // processes // batches), ckpt_path=given.get("load"))
    if "save" in given:
        run.save_checkpoint(given["save"])
    state = run.strategy.lightning_module_state_dict()
    if run.is_global_zero:
        whole = {k: v for k, v in state.items() if not strategy.endswith("_sharded")}
        torch.save(
            {"losses": keep.losses, "norms": keep.norms, "rates": keep.rates, "state": whole}, out
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    fsdp_on_cpu()
    for words in " ".join(sys.argv[2:]).split(" -- "):
        out, *pairs = words.split()
        main(int(sys.argv[1]), Path(out), dict(pair.split("=", 1) for pair in pairs))
