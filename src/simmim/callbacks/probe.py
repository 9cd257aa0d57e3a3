"""What the encoder is worth while it trains: kNN and a linear probe, where there are labels."""

import sys
import warnings
from collections.abc import Mapping
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from simmim.base.progress import Bar
from simmim.callbacks.base import call, datamodule, log_now, undisturbed
from simmim.callbacks.schedule import check_every_n_epochs
from simmim.evaluation.probe import fit_linear_probe, knn_scores, top1
from simmim.evaluation.readout import describe, labels_of, pool
from simmim.masking import sample_keys

SUBSET_SEED = 2104_14294  # which samples of a big set are read: the same in every run
NAMES = {"knn_top1": "kNN", "probe_top1": "linear probe"}


class OnlineProbe(L.Callback):
    """Log `val/knn_top1` and `val/probe_top1`: what frozen features of unmasked images say.

    Features are read before the first step, every few epochs, at the end, and in `validate` and
    `test`. Training images come from the data module's `probe_dataloader()` (through the
    validation transform), the others from the validation or test images. Several processes share
    the images, gather the features in the data set's order, and the first one computes: the
    numbers are those of one process. Without labels nothing is logged.

    Args:
        every_n_epochs: Epochs between two readings (where the run validates in that epoch); the
            untrained and the final encoder are always read. 0 reads nothing.
        layer: Block (of a plain transformer) or stage that is read, counted from 1 (the paper's
            linear probe reads the 8th block of ViT-B). The last one behind its norm by default.
        pooling: How the patch tokens become one vector: their mean (the paper's) or maximum.
        k: Neighbours that vote. 20 (DINO's).
        temperature: Of the neighbours' votes. 0.07 (DINO's).
        l2: Weight decay of the linear probe, as in scikit-learn's LogisticRegression(C=1 / l2).
        max_samples: Images that are read of each set; of bigger sets the same ones in every run,
            chosen by a hash.
    """

    def __init__(
        self,
        every_n_epochs: int = 10,
        layer: int | None = None,
        pooling: Literal["mean", "max"] = "mean",
        k: int = 20,
        temperature: float = 0.07,
        l2: float = 1.0,
        max_samples: int = 20_000,
    ) -> None:
        check_every_n_epochs(every_n_epochs)
        if pooling not in ("mean", "max"):
            raise ValueError(f"pooling {pooling!r} is not known: use mean or max")
        for name, value in {"k": k, "temperature": temperature, "max_samples": max_samples}.items():
            if value <= 0:
                raise ValueError(f"{name} {value} is too small: use a positive number")
        self.every_n_epochs, self.layer, self.pooling = every_n_epochs, layer, pooling
        self.k, self.temperature, self.l2, self.max_samples = k, temperature, l2, max_samples
        self.untrained: dict[str, float] = {}
        self.pretrained: dict[str, float] = {}
        self._read_at: int | None = None  # optimiser steps at the last reading

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a layer that the encoder does not have, before anything runs."""
        encoder: Any = getattr(pl_module, "encoder", None)
        if stage == "predict" or not self.every_n_epochs or self.layer is None:
            return  # nothing is probed
        if hasattr(encoder, "check_layer"):
            try:
                encoder.check_layer(self.layer)
            except ValueError as error:
                raise ValueError(f"{error} (--probe.layer)") from error

    def state_dict(self) -> dict[str, Any]:
        """Keep the numbers, so that a resumed run can still compare."""
        return {"untrained": self.untrained, "pretrained": self.pretrained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the numbers of the run that goes on."""
        self.untrained, self.pretrained = state_dict["untrained"], state_dict["pretrained"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the untrained encoder."""
        self._read_at = None
        if trainer.global_step == 0 and (scores := self._read(trainer, pl_module)):
            self.untrained = scores
            log_now(trainer, {f"val/{name}": value for name, value in scores.items()})

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read every few epochs, and whenever the user asks for a validation."""
        if trainer.state.fn == "fit" and (trainer.sanity_checking or not self._is_due(trainer)):
            return
        scores = self._read(trainer, pl_module)
        self.pretrained = scores or self.pretrained
        _log(pl_module, "val", scores)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the test images."""
        scores = self._read(trainer, pl_module)
        _log(pl_module, "test", scores)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the final encoder, however the run came to its end."""
        if self._read_at != trainer.global_step and (scores := self._read(trainer, pl_module)):
            self.pretrained = scores
            log_now(trainer, {f"val/{name}": value for name, value in scores.items()})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print what pretraining did to the two numbers."""
        if trainer.is_global_zero and self.pretrained:
            print(comparison_table(self.untrained, self.pretrained))

    def _is_due(self, trainer: L.Trainer) -> bool:
        epochs, last = trainer.current_epoch + 1, trainer.max_epochs or -1
        done = 0 < last <= epochs or 0 < trainer.max_steps <= trainer.global_step
        return done or bool(self.every_n_epochs and epochs % self.every_n_epochs == 0)

    def _read(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        loaders = self._loaders(trainer) if self.every_n_epochs else None
        if loaders is None:
            return {}
        with undisturbed(pl_module):
            sets = [self._features(trainer, pl_module, loader) for loader in loaders]
        first = self._read_at is None
        self._read_at = trainer.global_step
        (train, train_labels), (held_out, labels) = sets
        if len(train_labels.unique()) < 2 or not len(labels):
            return {}
        if first:
            self._say_what_is_read(len(train), len(held_out), int(train_labels.max()) + 1)
        scores = {}
        if trainer.is_global_zero:
            votes = knn_scores(train, train_labels, held_out, self.k, self.temperature)
            probe = fit_linear_probe(train, train_labels, self.l2)
            scores = {"knn_top1": top1(votes, labels), "probe_top1": top1(probe(held_out), labels)}
        return trainer.strategy.broadcast(scores)

    def _loaders(self, trainer: L.Trainer) -> tuple[DataLoader[Any], DataLoader[Any]] | None:
        data = datamodule(trainer)
        if not hasattr(data, "probe_dataloader") or not getattr(data, "has_labels", True):
            return None
        held_out = data.test_dataloader() if trainer.testing else data.val_dataloader()
        if not isinstance(held_out, DataLoader) or len(held_out.dataset) == 0:  # type: ignore[arg-type]
            return None
        return data.probe_dataloader(), held_out

    def _features(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loader: DataLoader[Any]
    ) -> tuple[Tensor, Tensor]:
        """Encode this process's share, and gather everybody's in the data set's order."""
        module: Any = pl_module
        n, ranks = len(loader.dataset), trainer.world_size  # type: ignore[arg-type]
        chosen = _choose(n, min(self.max_samples, n))
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            chosen = chosen[: _batch_size(loader)]
        # Every process takes as many, as a collective inside the encoder (FSDP) needs: the last
        # ones come again from the front, and are cut off below.
        padded = chosen[torch.arange(-(-len(chosen) // ranks) * ranks) % len(chosen)]
        features: list[Tensor] = []
        labels: list[Tensor] = []
        silent = trainer.progress_bar_callback is None or not trainer.is_global_zero
        share = _over(loader, padded[trainer.global_rank :: ranks].tolist())
        for batch in Bar(
            share, desc="Probe", delay=1.0, position=2, leave=False, disable=silent, file=sys.stdout
        ):
            if labels_of(batch) is None:
                return torch.empty(0, 0), torch.empty(0, dtype=torch.long)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            _, images, _ = module.inputs(batch, 0)
            features.append(call(trainer, lambda x: self._pool(module.encoder, x), images))
            labels.append(labels_of(batch))
        n = len(chosen)
        return _gather(pl_module, torch.cat(features))[:n], _gather(pl_module, torch.cat(labels))[
            :n
        ]

    def _pool(self, encoder: Any, images: Tensor) -> Tensor:
        features = encoder.tokens(images, self.layer).float()
        return pool(features.flatten(2).transpose(1, 2), self.pooling)  # NCHW -> NLC

    def _say_what_is_read(self, train: int, held_out: int, classes: int) -> None:
        rank_zero_info(
            f"knn_top1 and probe_top1 read {describe(self.layer, self.pooling)}, "
            f"images unmasked: {train:,} training images, {held_out:,} held out, {classes} classes"
        )


def comparison_table(untrained: Mapping[str, float], pretrained: Mapping[str, float]) -> str:
    """Set the accuracy of the untrained and of the pretrained encoder side by side."""
    lines = [f"{'top-1 accuracy':<16}{'untrained':>12}{'pretrained':>12}"]
    for name, title in NAMES.items():
        cells = [f"{s[name]:12.3f}" if name in s else f"{'-':>12}" for s in (untrained, pretrained)]
        lines.append(f"{title:<16}{''.join(cells)}")
    return "\n".join(lines)


def _log(pl_module: L.LightningModule, part: str, scores: Mapping[str, float]) -> None:
    pl_module.log_dict({f"{part}/{name}": value for name, value in scores.items()}, sync_dist=True)


def _choose(n: int, count: int) -> Tensor:
    """Pick `count` of n places by a hash of the place alone, in ascending order."""
    if count == n:
        return torch.arange(n)
    return sample_keys(torch.arange(n), SUBSET_SEED, 0).argsort()[:count].sort().values


def _over(loader: DataLoader[Any], places: list[int]) -> DataLoader[Any]:
    """Make a loader like the given one that reads these places, in this order."""
    return DataLoader(
        loader.dataset,
        batch_size=_batch_size(loader),
        sampler=places,
        num_workers=min(loader.num_workers, len(places)),
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def _batch_size(loader: DataLoader[Any]) -> int:
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 64


def _gather(pl_module: L.LightningModule, part: Tensor) -> Tensor:
    """Put together what the processes have, one sample of each in turn, as it was dealt out."""
    if pl_module.trainer.world_size > 1:
        with warnings.catch_warnings():  # Lightning 2.6 calls a function that torch renamed
            warnings.simplefilter("ignore", FutureWarning)
            gathered = cast(Tensor, pl_module.all_gather(part))  # (processes, samples, ...)
        part = gathered.transpose(0, 1).flatten(0, 1)
    return part if part.is_cuda else part.cpu()
