"""Data sets -> loaders: exact order, exact going on, the same share for every process."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Sampler

from simmim.data.bad_files import BadFiles
from simmim.data.checks import check_choice, check_number
from simmim.data.dataset import ImageData, Key, Loader, WholeFolder, collate
from simmim.data.resume import accumulation, next_batch
from simmim.data.sampler import EpochSampler, EvenSampler, even_batch_size
from simmim.data.scans import Intensity
from simmim.data.statistics import (
    Statistics,
    given_statistics,
    imagenet_statistics,
    measured_statistics,
    measured_window,
)
from simmim.data.summary import DataSummary, SplitSummary
from simmim.data.workers import default_workers

Batch = dict[str, Any]
SPLITS = {"train": "training", "val": "validation", "test": "test"}  # a split's data set


class LoaderModule(L.LightningDataModule):
    """What all our data modules do alike with the data sets that their `setup` makes.

    Args:
        batch_size: Images in a batch, of each process.
        num_workers: Processes that read images, of each process that trains; None: chosen by the
            size of the data.
        seed: Of the order.
        bad_files: "skip" reports unreadable files at the end of each epoch.
        max_bad_share: Share of unreadable files above which the run stops.

    Attributes:
        sets: The data sets by name: training, validation, test, predict, and others.
        collate: Makes a batch of samples.
        root: The folder.
        in_chans: Channels of the images.
        val_fraction: Share of the images that validates where there is no val/.
        intensity: How deeper scans become 0..1.
        percentiles_of: Whether each image has percentiles of its own, or all have those of the
            training images.
        statistics: Which mean and standard deviation: imagenet, measured, or the numbers.
    """

    root: str
    in_chans: int
    val_fraction: float
    intensity: Intensity
    percentiles_of: Literal["image", "dataset"]
    statistics: str | list[list[float]]

    def __init__(
        self,
        batch_size: int,
        num_workers: int | None,
        seed: int,
        bad_files: Literal["skip", "raise"],
        max_bad_share: float,
    ) -> None:
        super().__init__()
        check_number("batch_size", batch_size, 1)
        check_number("num_workers", num_workers or 0, 0)
        check_number("seed", seed, 0)
        check_choice("bad_files", bad_files, ("skip", "raise"))
        check_number("max_bad_share", max_bad_share, 0, 1)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.bad_files, self.max_bad_share = bad_files, max_bad_share
        self.sets: dict[str, ImageData] = {}
        self.collate: Callable[[list[Any]], Any] = collate
        self._resumed_step = 0

    def train_dataloader(self) -> Loader[Batch]:
        """Batches in an order that depends on (seed, epoch); each process gets its part of them."""
        data = self.sets["training"]
        replicas, rank = self._process()
        batch_size = min(self.batch_size, len(data) // replicas)
        if not batch_size:
            raise ValueError(
                f"{len(data)} training images are fewer than the {replicas} processes: use fewer"
            )
        if batch_size < self.batch_size:
            rank_zero_info(
                f"batches of {batch_size}, not of data.batch_size {self.batch_size}: "
                f"there are {len(data)} training images"
            )
        batches = self.batches_per_epoch(replicas)
        if batches == 1 and (dropped := len(data) - batch_size * replicas):
            # Of the smaller batches, down to a quarter, that which loses least.
            sizes = range(batch_size, max(batch_size // 4, 1) - 1, -1)
            best = min(sizes, key=lambda size: len(data) % (size * replicas))
            rank_zero_info(
                f"{dropped} of {len(data)} training images are left out of each epoch, by turns: "
                f"a batch has {batch_size * replicas}; --data.batch_size {best} leaves out "
                f"{len(data) % (best * replicas)}"
            )
        sampler = EpochSampler(data, batch_size, batches, self.seed, replicas, rank, self._start)
        return self._loader(data, sampler, batch_size, drop_last=True)

    def val_dataloader(self) -> Loader[Batch] | list[Loader[Batch]]:
        """All validation images in order, each once, over all processes; [] if there are none."""
        data = self.sets.get("validation")
        return [] if data is None else self._in_order(data)

    def test_dataloader(self) -> Loader[Batch]:
        """The images of test/, or else the validation images, with a warning."""
        if "test" not in self.sets:
            rank_zero_warn(
                f"{self.root!r} has no test/, so test/ scores its validation images, which may "
                "have chosen the checkpoint: use `validate`, or add a test/"
            )
        return self._in_order(self.sets.get("test") or self.sets["validation"])

    def predict_dataloader(self) -> Loader[Batch]:
        """Every image below the root, with its path."""
        return self._in_order(self.sets["predict"])

    def state_dict(self) -> dict[str, Any]:
        """Keep the number of steps, which loaders may need before the trainer, and the window.

        And which images are trained on, so that a folder that has changed since is noticed.
        """
        step = self.trainer.global_step if self.trainer else 0
        return {"global_step": step, "window": self.intensity.window, "images": self._images()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after these steps, with scans seen as before."""
        self._resumed_step = int(state_dict["global_step"])
        before, now = state_dict.get("images"), self._images()
        if self._trains() and before and now and before != now:
            rank_zero_warn(
                f"the training images below {self.root} are not those that this run began with "
                f"({before[0]:,} then, {now[0]:,} now): it goes on with them, but will not end as "
                "if it had not been interrupted"
            )
        if self.percentiles_of == "dataset" and state_dict.get("window") is not None:
            self._use_window(state_dict["window"])

    def batches_per_epoch(self, world_size: int = 1) -> int:
        """Count the training batches of an epoch, of each of so many processes.

        What does not fill a batch of every process is left to another epoch; nor does the last
        optimiser step have fewer batches than the others, where gradients are accumulated.
        """
        batches = len(self.sets["training"]) // (self.batch_size * world_size)
        step = accumulation(self.trainer)
        return max(batches - batches % step, min(batches, step), 1)

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return len(self.sets["training"])

    def summary(self) -> DataSummary:
        """Count what each split holds, and what of it counts for nothing; after setup."""
        splits = {
            split: self._count(self.sets[name])
            for split, name in SPLITS.items()
            if name in self.sets
        }
        return DataSummary(self.root, splits)

    def _count(self, data: ImageData) -> SplitSummary:
        """Count the images of a data set."""
        return SplitSummary(len(data))

    def _check_summary(self, stage: str | None) -> None:
        """Say what is trained and scored on; refuse to train where nothing of it counts."""
        summary = self.summary()
        if stage in ("fit", None) and (reason := summary.refusal()):
            raise ValueError(reason)
        if self.trainer is not None:
            rank_zero_info(summary.table())
        for sentence in summary.warnings():
            rank_zero_warn(sentence)

    def _check_evaluated(self, stage: str | None) -> None:
        """Refuse to validate, or to test, without images; train without them if so wanted."""
        if "validation" in self.sets or (stage == "test" and "test" in self.sets):
            return
        if self.val_fraction:
            raise ValueError(
                f"{self.root!r} has no image to validate with, which takes two images (or groups): "
                "add some, or set data.val_fraction to 0"
            )
        if stage in ("validate", "test"):
            raise ValueError(
                f"{self.root!r} has no val/, and data.val_fraction is 0: make one, or use 0.1"
            )
        if self.trainer is not None:
            self.trainer.limit_val_batches = 0  # else Lightning warns of an empty loader

    def _images(self) -> tuple[int, str] | None:
        """How many images are trained on, and the hash of their names."""
        data = self.sets.get("training")
        return None if data is None else (len(data), data.digest)

    def _statistics(self) -> Statistics:
        if not isinstance(self.statistics, str):
            return given_statistics(self.statistics, self.in_chans)
        if self.statistics == "imagenet":
            return imagenet_statistics(self.in_chans)
        return self._measured()

    def _measured(self) -> Statistics:
        """Mean and standard deviation of the training images."""
        data = self._plain()
        return measured_statistics(data, self._workers(data))

    def _plain(self) -> ImageData:
        """The training images alone, with a transform that has no chance in it."""
        raise NotImplementedError

    def _measure_window(self) -> None:
        """Take the percentiles of deeper scans over the training images, where that is wanted."""
        if self.percentiles_of == "image" or self.intensity.window is not None:
            return
        data = self._plain()
        window = measured_window(data, self._workers(data))
        if window is not None:
            low, high = self.intensity.percentiles
            rank_zero_info(
                f"scans: {window[0]:g} becomes 0 and {window[1]:g} becomes 1, the percentiles "
                f"{low:g} and {high:g} of the training images; the checkpoints keep them, other "
                f"commands take --data.window '[{window[0]:g}, {window[1]:g}]'"
            )
            self._use_window(window)

    def _use_window(self, window: Sequence[float]) -> None:
        self.intensity = replace(self.intensity, window=(window[0], window[1]))
        for data in self.sets.values():
            data.intensity = self.intensity

    def _trains(self) -> bool:
        return self.trainer is None or self.trainer.state.fn in (None, "fit")

    def _measures(self) -> bool:
        """Whether something of the training images is to be measured."""
        predicts = self.trainer is not None and self.trainer.state.fn == "predict"
        statistics = self.statistics == "measured" and self._trains()
        return statistics or (self.percentiles_of == "dataset" and not predicts)

    def _add_report(self) -> None:
        if self.trainer is not None and self.bad_files == "skip":
            callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
            callbacks[:] = [c for c in callbacks if not isinstance(c, BadFiles)]
            callbacks.insert(0, BadFiles(self.sets, self.max_bad_share))

    def _in_order(self, data: ImageData) -> Loader[Batch]:
        replicas, rank = self._process()
        if len(data) < replicas:  # one image would be for several, and count as often
            raise ValueError(
                f"{len(data)} images to evaluate are fewer than the {replicas} processes: use "
                f"--trainer.devices {len(data)}, or more images"
            )
        if isinstance(data, WholeFolder):
            data.even_batches = replicas > 1
        batch_size = even_batch_size(len(data), self.batch_size, replicas)
        return self._loader(data, EvenSampler(data, replicas, rank), batch_size)

    def _loader(
        self,
        data: ImageData,
        sampler: Sampler[Key],
        batch_size: int,
        drop_last: bool = False,
        max_workers: int = 1024,
    ) -> Loader[Batch]:
        workers = min(self._workers(data), -(-len(data) // batch_size), max_workers)
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return Loader(
            data,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=self.collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=on_gpu,
        )

    def _workers(self, data: ImageData) -> int:
        if self.num_workers is not None:
            return self.num_workers
        return default_workers(data, self.trainer.num_devices if self.trainer else 1)

    def _process(self) -> tuple[int, int]:
        """How many processes share the data, and which one this is."""
        kwargs = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        return kwargs.get("num_replicas", 1), kwargs.get("rank", 0)

    def _start(self) -> tuple[int, int] | None:
        """Where training goes on, as (epoch, batch)."""
        batches = self.batches_per_epoch(self._process()[0])
        return next_batch(self.trainer, self._resumed_step, batches)
