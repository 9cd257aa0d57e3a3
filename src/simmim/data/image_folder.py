"""The data module: any folder of images, or a data set by name, as batches of uint8."""

import os
from contextlib import suppress
from dataclasses import replace
from math import inf
from typing import Any, Literal, cast

import torch

from simmim.data import named
from simmim.data.checks import (
    check_choice,
    check_image_size,
    check_number,
    check_range,
    find_root,
)
from simmim.data.dataset import ImageData, Loader, Transform, WholeFolder
from simmim.data.layout import Part, read_folder, read_parts
from simmim.data.loaders import SPLITS, Batch, LoaderModule
from simmim.data.pairs import without_masks
from simmim.data.remote import fetch, is_url, newest_copy
from simmim.data.sampler import EvenSampler, choose
from simmim.data.scans import Intensity
from simmim.data.shards import is_packed
from simmim.data.split import check_group_pattern
from simmim.data.statistics import check_statistics
from simmim.data.summary import DataSummary, SplitSummary
from simmim.data.transforms import CenterCrop, RandomCrop, flip_marked
from simmim.data.workers import default_workers


class ImageFolderData(LoaderModule):
    """Images of a folder, with or without classes, with or without a split of their own.

    `train/` and `val/` (and `test/`) are taken where they exist; otherwise a part of the images,
    chosen by a hash of their names, validates. Folders right below are classes; where there are
    none, or images lie beside them, the images have no labels. It reads what Pillow reads, and
    deeper scans: 16-bit PNG and TIFF, float TIFF, DICOM, NumPy arrays.

    A batch is a dict: `image`, uint8 (B, C, H, W), or float32 in 0..1 of deeper scans; `index`, the
    place in the data set; `label` where there are classes; `path` in predict.

    Args:
        root: Folder of images, at any depth; or what `simmim pack` made of it, here or in a store
            (s3://bucket/photos), from which each machine copies it once into data_dir.
        dataset: A data set by name, where root is not given: digits (1,797 handwritten digits that
            come with scikit-learn), or one that torchvision downloads: cifar10, cifar100, dtd,
            eurosat, fashion_mnist, flowers102, food101, imagenette, mnist, oxford_pets.
        data_dir: Folder in which named data sets are kept, as image folders, and copies.
        img_size: Height and width in pixels: one number, or [height, width]. For a model it is
            said there (`--model.img_size`).
        in_chans: Channels: gray images become three equal ones, colour its luminance.
        batch_size: Images in a batch, of each process. 128 (the paper's 2048 over 16 GPUs).
        num_workers: Processes that read images, of each process that trains; by default as many as
            there are CPU cores less one, up to 16, and none for less than 32 MB of images.
        val_fraction: Share of the images that validates where there is no val/; 0 = none.
        split_seed: Which share: of its own, so that all runs and tasks split alike.
        group_pattern: Regular expression, searched in each path; its first group names the patient
            or scene, whose images all go to one side of the split: '(patient[0-9]+)_'.
        crop_scale: Share of the image's area that a training crop takes, from and to. 0.67 to 1
            (the released code).
        crop_ratio: Width over height of a training crop, from and to. 3/4 to 4/3 (the released
            code).
        hflip: Probability that a training image is mirrored. 0.5 (the released code).
        val_crop: Side of the crop from the middle of an image that is evaluated, as a share of the
            largest one that fits. 1; published ImageNet accuracies are with 0.875 (224 of 256).
        statistics: Mean and standard deviation of the pixels: imagenet (torchvision's; the mean of
            the three for other than three channels), measured (from the training images, at most
            10,000), or your own [[means], [stds]] on a scale of 0 to 1.
        percentiles: Deeper scans: the percentiles of each image that become 0 and 1.
        percentiles_of: Deeper scans: whether each image has percentiles of its own (image: what is
            bright in one need not be in another), or all have those of the training images, or of
            1,000 of them, which are measured once and kept in the checkpoints (dataset).
        window: Deeper scans: the values that become 0 and 1 (such as [-160, 240] Hounsfield units)
            for all images, instead of percentiles.
        bad_files: What a file that cannot be read does: skip (another image takes its place; it is
            listed in bad_files.txt in the run's folder) or raise (the run stops and names it).
        max_bad_share: Share of unreadable files above which skip stops the run all the same.
        seed: Seed of order, crops and flips. On the command line it is `--seed_everything`.

    Attributes:
        classes: Names of the classes; empty where there are none. After setup, like all below.
        class_to_idx: The label of each class.
        class_counts: Training images of each class.
        has_labels: Whether the batches have labels.
        num_train: Number of training images.
        mean: Of the pixels' channels, on a scale of 0 to 1; None but for training.
        std: Their standard deviation, likewise.
    """

    def __init__(
        self,
        root: str | None = None,
        dataset: str | None = None,
        data_dir: str = "data",
        img_size: int | list[int] = 224,
        in_chans: int = 3,
        batch_size: int = 128,
        num_workers: int | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        group_pattern: str | None = None,
        crop_scale: tuple[float, float] = (0.67, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        val_crop: float = 1.0,
        statistics: Literal["imagenet", "measured"] | list[list[float]] = "imagenet",
        percentiles: tuple[float, float] = (0.5, 99.5),
        percentiles_of: Literal["image", "dataset"] = "image",
        window: tuple[float, float] | None = None,
        bad_files: Literal["skip", "raise"] = "skip",
        max_bad_share: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, bad_files, max_bad_share)
        self.root = find_root(root, dataset, data_dir, named.NAMES)
        self.dataset, self.data_dir = None if root else dataset, os.path.expanduser(data_dir)
        self.url = root if root is not None and is_url(root) else None
        self._copy = self.root  # of what the address holds, or its first copy
        self.img_size, self.in_chans = check_image_size(img_size), in_chans
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.group_pattern, self.statistics = group_pattern, statistics
        for name, low, high in (
            ("in_chans", 1, inf),
            ("val_fraction", 0, 0.99),
            ("split_seed", 0, inf),
        ):
            check_number(name, getattr(self, name), low, high)
        check_number("hflip", hflip, 0, 1)
        check_number("val_crop", val_crop, 0.01, 1)
        check_group_pattern(group_pattern)
        check_statistics(statistics, in_chans)
        check_choice("percentiles_of", percentiles_of, ("image", "dataset"))
        self.percentiles_of = percentiles_of
        self.intensity = Intensity(
            check_range("percentiles", percentiles, 0, 100),
            None if window is None else check_range("window", window),
        )
        self.train_transform: Transform = RandomCrop(
            self.img_size,
            check_range("crop_scale", crop_scale, 0.001, 1),
            check_range("crop_ratio", crop_ratio, 0.001),
            hflip,
        )
        self.val_transform: Transform = CenterCrop(self.img_size, val_crop)
        self.classes: list[str] = []
        self.has_labels = False
        self.mean: tuple[float, ...] | None = None
        self.std: tuple[float, ...] | None = None

    def prepare_data(self) -> None:
        """Make, download, copy and index the data, and measure statistics, once a machine."""
        if self.url is not None:
            self.root = fetch(self.url, self._copy)
        if self.dataset is not None:
            named.prepare(self.dataset, self.data_dir)
        if self._measures():  # into the cache, for the other processes
            self._setup_parts()
            if self._trains():
                self._statistics()
        elif self._trains() and self._process()[0] > 1:
            with suppress(ValueError):  # setup says it, in every process: none must wait
                self._setup_parts()  # the index, and its split, likewise

    def setup(self, stage: str | None = None) -> None:
        """Index the folder, and split it where it is not split.

        Args:
            stage: "fit", "validate", "test" or "predict"; None: all of them.

        Raises:
            ValueError: If there is no image, or none to validate with.
        """
        if self.url is not None:
            if self.root == self._copy:  # another process prepared
                self.root = newest_copy(self._copy) or self._copy
            if self.trainer is not None:
                self.root = self.trainer.strategy.broadcast(self.root)
        is_there = is_packed if self.url is not None else os.path.isdir
        if (self.dataset or self.url) is not None and not is_there(self.root):
            self.prepare_data()
        if stage != "predict":
            if "training" not in self.sets:
                self._setup_parts()
            self._check_evaluated(stage)
            self._check_summary(stage)
        if stage in ("fit", None):
            self._resumed_step = 0
            self.mean, self.std = self._statistics()
        if stage in ("predict", None) and "predict" not in self.sets:
            files = read_folder(self.root)
            whole = Part(files, without_masks(files))
            self.sets["predict"] = self._make(whole, self.val_transform, WholeFolder)
        self._add_report()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Mirror the images that the worker marked, and put them in order, on the device."""
        if isinstance(batch, dict) and "flip" in batch:
            batch["image"] = flip_marked(batch["image"], batch.pop("flip"))
        if isinstance(batch, dict) and isinstance(batch.get("image"), torch.Tensor):
            batch["image"] = batch["image"].contiguous()  # HWC -> CHW in memory
        return batch

    def probe_dataloader(self, limit: int | None = None) -> Loader[Batch]:
        """The training images through the validation transform, in order, for every process all.

        Args:
            limit: At most so many, the same ones always.
        """
        data = self.sets["probe"]
        if limit is not None and limit < len(data):
            places = choose(len(data), limit)
            kept = places if data.places is None else data.places.numpy()[places]
            data = self._make(Part(data.files, kept), self.val_transform)
        # Workers for little would only take memory beside those that train.
        enough = default_workers(data, self.trainer.num_devices if self.trainer else 1)
        return self._loader(data, EvenSampler(data), self.batch_size, max_workers=enough)

    @property
    def class_to_idx(self) -> dict[str, int]:
        """The label of each class."""
        return {name: label for label, name in enumerate(self.classes)}

    @property
    def class_counts(self) -> list[int]:
        """Training images of each class."""
        labels = self.sets["training"].labels
        if labels is None:
            return []
        return cast(list[int], torch.bincount(labels, minlength=len(self.classes)).tolist())

    def summary(self) -> DataSummary:
        """Count images and labels of each split."""
        notes = self._hints()
        return replace(super().summary(), classes=self.classes, notes=notes)

    def _hints(self) -> list[str]:
        """What is wrong with the class folders of the splits."""
        found = [self.sets[name].files.hint for name in SPLITS.values() if name in self.sets]
        return [hint for hint in dict.fromkeys(found) if hint]

    def _count(self, data: ImageData) -> SplitSummary:
        labels, train = data.labels, self.sets["training"]
        is_told = data is not train and data.files.root == train.files.root  # split off from it
        left_out = [] if is_told else data.files.left_out
        if labels is None:
            return SplitSummary(len(data), left_out=left_out)
        counts = torch.bincount(labels, minlength=len(self.classes)).tolist()
        return SplitSummary(len(data), {"with labels": len(labels)}, counts, left_out)

    def _setup_parts(self) -> None:
        parts = read_parts(self.root, self.val_fraction, self.split_seed, self.group_pattern)
        self.classes = parts["train"].files.classes
        self.has_labels = bool(self.classes)
        self.sets["training"] = self._make(parts["train"], self.train_transform)
        self.sets["probe"] = self._make(parts["train"], self.val_transform)
        for part, name in {"val": "validation", "test": "test"}.items():
            if part in parts:
                self.sets[name] = self._make(parts[part], self.val_transform)
        self._measure_window()

    def _make(
        self, part: Part, transform: Transform, kind: type[ImageData] = ImageData
    ) -> ImageData:
        return kind(
            part.files,
            transform,
            part.places,
            in_chans=self.in_chans,
            intensity=self.intensity,
            seed=self.seed if transform is self.train_transform else 0,
            on_bad=self.bad_files,
        )

    def _plain(self) -> ImageData:
        return self.sets["probe"]
