"""Weights in shards: Lightning's strategy for models that are too large for one device.

It clips by the norm of all gradients, gives each parameter the group that it has on one device,
has one BatchNorm for all processes, and writes one file, or a folder of shards that a kill in the
middle of writing leaves whole.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import (
    FSDPStrategy,
    ModelParallelStrategy,
    StrategyRegistry,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from simmim.base.files import UNFINISHED, sync
from simmim.runs.checkpoints import put_in_place
from simmim.weights.shards import META, by_position, is_sharded, safe_metadata

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
SIZES = ("data_parallel_size", "tensor_parallel_size")  # ours to say


def shard(module: L.LightningModule) -> None:
    """Share a module's weights out, as `configure_model` does; without a device mesh do nothing.

    All processes share one copy, and each has images of its own. A block's weights are gathered
    while it computes; what is in no block is gathered for the whole step.
    """
    mesh = module.device_mesh
    if mesh is None or isinstance(module, FSDPModule):
        return
    if mesh.ndim > 1:
        mesh = mesh._flatten("processes")  # Lightning's is (data parallel, tensor parallel)
    for block in blocks(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for name in STEPS:  # Lightning calls them, and not the module
        register_fsdp_forward_method(module, name)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The parts that are gathered one after the other, inner ones first: timm's blocks and stages.

    They are the items of a list that have parts of their own.
    """
    lists = (nn.Sequential, nn.ModuleList)
    for child in module.children():
        yield from blocks(child)
        whole = isinstance(module, lists) and not isinstance(child, lists)
        if whole and any(child.children()) and any(True for _ in child.parameters()):
            yield child


def is_sharding(trainer: L.Trainer) -> bool:
    """Whether several processes must compute together, as each holds a part of the weights."""
    return isinstance(trainer.strategy, ModelParallelStrategy) and trainer.world_size > 1


def refuse_fsdp(strategy: Any) -> None:
    """Refuse torch's older FSDP, by its name or as Lightning's strategy.

    Raises:
        ValueError: With the name of its successor.
    """
    if isinstance(strategy, FSDPStrategy) or str(strategy).startswith("fsdp"):
        raise ValueError(
            "strategy fsdp, torch's older one, is not supported: use its successor, "
            "--trainer.strategy fully_shard (or -c fsdp, which sets it up)"
        )


def gradient_norm(module: nn.Module) -> Tensor:
    """Norm of a module's whole gradient, on every process: each must call where weights are shared.

    Returns:
        A plain scalar.
    """
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in module.parameters() if p.grad is not None]
    )
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def share_running_statistics(module: nn.Module) -> None:
    """Give all processes the first one's BatchNorm averages, as DDP does before each step.

    Each has seen other images. What is validated and kept is then one model.
    """
    for part in module.modules():
        if isinstance(part, _NormBase):
            for buffer in part.buffers():
                dist.broadcast(buffer, 0)


class FullyShard(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy, with every process on its own share of the images.

    It is torch's `fully_shard`, and runs on CPUs as well. All processes have one BatchNorm.

    Args:
        save_distributed_checkpoint: Write a folder of shards, each process its own, in place of
            one file: quicker where the weights are many gigabytes.
        options: Lightning's others.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, **options: Any) -> None:
        if options.get("tensor_parallel_size", 1) != 1:
            raise ValueError(
                f"tensor_parallel_size {options['tensor_parallel_size']} is not supported: leave "
                "it out"
            )
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **{k: v for k, v in options.items() if k not in SIZES},
        )

    def setup_environment(self) -> None:
        """Let all processes share one copy.

        Raises:
            ValueError: With trainer.sync_batchnorm.
        """
        if self._layer_sync is not None:  # Lightning's strategy would leave it out
            raise ValueError(
                "trainer.sync_batchnorm does nothing with fully_shard: leave it out, or use "
                "--trainer.strategy ddp"
            )
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's state: in shards by name, in one file as torch's optimisers keep it."""
        whole = not self._save_distributed_checkpoint
        options = StateDictOptions(full_state_dict=whole, cpu_offload=True)
        assert self.model is not None
        state = get_optimizer_state_dict(self.model, _plain(optimizer), options=options)
        return by_position(state) if whole and self.global_rank == 0 else state

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin the step with the same BatchNorm everywhere."""
        share_running_statistics(cast(nn.Module, self.model))

    def on_validation_start(self) -> None:
        """Score one model."""
        share_running_statistics(cast(nn.Module, self.model))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Keep one model: of what all processes have, any of them writes its own."""
        share_running_statistics(cast(nn.Module, self.model))
        return super().lightning_module_state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Save a checkpoint: one file, or a folder, which is written beside and then renamed."""
        path = Path(self.broadcast(str(filepath)))
        if not self._save_distributed_checkpoint or "://" in str(filepath):
            super().save_checkpoint(checkpoint, path)
            return
        beside = path.with_name(f".{path.name}{UNFINISHED}")
        if self.is_global_zero:
            shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
        self.barrier()
        super().save_checkpoint(checkpoint, beside)
        self.barrier()
        if self.is_global_zero:
            sync(beside / META)  # torch does so with the rest
            put_in_place(beside, path)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint of any strategy, from any number of processes."""
        path = Path(self.broadcast(str(checkpoint_path)))
        if is_sharded(path):
            safe_metadata(path)
            return super().load_checkpoint(path, weights_only=True)
        checkpoint: dict[str, Any]
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        options = StateDictOptions(full_state_dict=True)
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        if self.optimizers:  # it is trained
            pairs = zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
            for optimizer, state in pairs:
                named = by_name(state, self.model, optimizer)
                set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return checkpoint


StrategyRegistry.register("fully_shard", FullyShard, "Weights in shards (fully_shard)")


# The optimiser's state ---------------------------------------------------------------------------


def by_name(state: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Name the parameters of an optimiser's state, as `by_position` gives it or torch saves it."""
    names = {id(p): name for name, p in model.named_parameters()}
    here = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    groups: Sequence[Mapping[str, Any]] = state["param_groups"]
    pairs = [*zip(groups, here, strict=True)]
    places = {
        i: name for group, mine in pairs for i, name in zip(group["params"], mine, strict=True)
    }
    return {
        "state": {places[i]: values for i, values in state["state"].items()},
        "param_groups": [{**group, "params": mine} for group, mine in pairs],
    }


def _plain(optimizer: Optimizer) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
