"""Look at a model while it trains without changing what it becomes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

from simmim.callbacks.pictures import PictureNames
from simmim.training.xla import run_xla

T = TypeVar("T")


@contextmanager
def undisturbed(pl_module: L.LightningModule) -> Iterator[None]:
    """Evaluate inside, and leave no trace: modes and random states are put back, no gradients."""
    modes = [(module, module.training) for module in pl_module.modules()]
    pl_module.eval()
    try:
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def call(trainer: L.Trainer, function: Callable[..., T], *args: Tensor) -> T:
    """Call a method of the module in the run's precision, through the strategy's wrapper.

    fully_shard gathers the weights in the module's forward, so `function` takes that one's place,
    as in Lightning's own steps: every process must call. A compiled model runs eagerly: a handful
    of images is not worth another compilation.
    """
    module, model = trainer.lightning_module, trainer.strategy.model
    precision = trainer.precision_plugin
    args = precision.convert_input(args)
    with precision.forward_context(), torch.compiler.set_stance("force_eager"):
        if not isinstance(model, FSDPModule):
            found = function(*args)  # every process holds all weights
            run_xla(module.device)
            return found

        def redirected(*args: Tensor) -> T:
            del module.forward
            return function(*args)

        module.forward = redirected
        return model(*args)


class Samples(NamedTuple):
    """Images with their validation masks: normalised images, mask and keys as `SimMIM` has them."""

    images: Tensor
    mask: Tensor
    keys: Tensor


def fixed_samples(trainer: L.Trainer, n: int) -> Samples | None:
    """Take a few validation images, spread evenly over the data set, so over its classes too.

    Only these are read. Without validation images, training images through the validation
    transform are taken (`probe_dataloader()` of the data module); None without either.

    Args:
        trainer: The trainer of a `SimMIM`.
        n: Number of images; no more than there are.

    Returns:
        The same images and masks in every epoch and every run.
    """
    shown = fixed_places(trainer, n)
    return None if shown is None else samples_at(trainer, *shown)[0]


def fixed_places(trainer: L.Trainer, n: int) -> tuple[DataLoader[Any], list[int]] | None:
    """Choose what pictures show in every epoch: a loader, and n places, spread over its data set.

    None where there are no images.
    """
    loader = evaluation_loader(trainer)
    size = len(loader.dataset) if loader is not None else 0  # type: ignore[arg-type]
    return None if loader is None or size == 0 else (loader, spread_places(size, n))


def spread_places(size: int, n: int) -> list[int]:
    """Choose n places, spread evenly from the first to the last; all of them if there are fewer."""
    n = min(n, size)
    return [i * (size - 1) // max(n - 1, 1) for i in range(n)]


def batch_at(trainer: L.Trainer, loader: DataLoader[Any], places: list[int]) -> Any:
    """Read these places of a loader's data set as one batch, on the run's device."""
    batch = loader.collate_fn([loader.dataset[i] for i in places])
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def samples_at(
    trainer: L.Trainer, loader: DataLoader[Any], places: list[int]
) -> tuple[Samples, list[str]]:
    """Take images at these places of a loader's data set, and name them.

    Returns:
        The images with their validation masks, and their paths (where those are not known, their
        places).
    """
    batch = batch_at(trainer, loader, places)
    module: Any = trainer.lightning_module
    raw, images, index = module.inputs(batch, 0)
    if not isinstance(batch, dict) or "index" not in batch:
        index = torch.tensor(places, device=images.device)
    path = getattr(loader.dataset, "path", str)
    mask, keys = module.draw_mask(raw, index, validation=True)
    return Samples(images, mask, keys), [path(place) for place in places]


def evaluation_loader(trainer: L.Trainer) -> DataLoader[Any] | None:
    """Find the first validation loader, or else the data module's training images as they are."""
    loaders = trainer.val_dataloaders
    if isinstance(loaders, list | tuple):
        loaders = loaders[0] if loaders else None
    if loaders is None:
        probe_dataloader = getattr(datamodule(trainer), "probe_dataloader", None)
        loaders = probe_dataloader() if probe_dataloader is not None else None
    return loaders


def picture_names(trainer: L.Trainer) -> PictureNames:
    """Name the pictures of the images that are predicted."""
    data: Any = getattr(trainer.predict_dataloaders, "dataset", None)
    known = hasattr(data, "all_names") and hasattr(data, "path")
    paths = (data.path(i) for i in range(len(data))) if known else ()
    return PictureNames(getattr(datamodule(trainer), "root", None), paths)


def datamodule(trainer: L.Trainer) -> Any:
    """Get the data module, if the run has one; it is asked for what it can do, not what it is."""
    return getattr(trainer, "datamodule", None)


def is_logging_step(trainer: L.Trainer, ahead: int = 0) -> bool:
    """Whether Lightning writes this step's metrics, and so waits for the device anyway.

    Args:
        trainer: The trainer.
        ahead: Optimiser steps that are under way but not yet counted.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (trainer.global_step + ahead) % every == 0


def last_step(trainer: L.Trainer) -> int:
    """The last optimiser step, counted from 0, as Lightning puts it beside a metric.

    What is logged there belongs to the run that was, when it goes on: later steps are dropped.
    """
    return max(trainer.global_step - 1, 0)


def log_now(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    """Write metrics where Lightning's own logging does not reach: before and after the epochs."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=last_step(trainer))
        logger.save()
