"""The data module of segmentation: images with masks, crops to train with, whole ones to score."""

import os
from dataclasses import replace
from math import inf
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import default_collate

from simmim.data.checks import (
    check_choice,
    check_image_size,
    check_number,
    check_range,
    find_root,
)
from simmim.data.class_map import (
    FILE,
    MOST,
    VOID,
    Color,
    Legend,
    Totals,
    WrongMask,
    edge_values,
    find_legend,
    read_legend,
    shortened,
)
from simmim.data.dataset import ImageData, Transform, WholeFolder, collate
from simmim.data.index import FileIndex
from simmim.data.joint import PairCrop, Whole
from simmim.data.layout import read_folder
from simmim.data.loaders import SPLITS, LoaderModule
from simmim.data.pairs import Pairs, read_pairs, without_masks
from simmim.data.scans import Intensity
from simmim.data.split import check_group_pattern
from simmim.data.statistics import check_statistics
from simmim.data.summary import DataSummary, LeftOut, SplitSummary
from simmim.data.transforms import CenterCrop
from simmim.data.value_counts import ValueCounts, count_values

MANY = 0.001  # of the pixels: ignored ones that may be those of a class which has none


class SegmentationData(LoaderModule):
    """Images with a mask each: train/images/X.jpg and train/masks/X.png, and so in val/ and test/.

    Masks are PNG files of the images' sizes whose values are numbers of classes: 8 or 16 bits, or a
    palette. Without a val/ a part of the images, chosen by a hash of their names, validates.

    A batch is a dict: `image`, uint8 (B, C, H, W), or float32 in 0..1 of deeper scans; `mask`, the
    class of each pixel and -1 for none, int16 (B, H, W); `index`. Images that are evaluated are
    whole, with their `size`, (B, 2); where sizes differ, `image` and `mask` are lists.

    Args:
        root: Folder with train/ (and val/, and test/) of images/ and masks/ each, or with images/
            and masks/. For predict any folder of images.
        classes: JSON file of class names: {"classes": ["road", ...], "ignore_index": 255,
            "palette_rgb": [[128, 64, 128], ...]}; the two last, and "values", are optional. By
            default classes.json in root; without it each value of the training masks is a class.
        void: Value, or values, of pixels without a class, which have no loss and no score; by
            default the ignore_index of the classes, or 255 unless that is one of the classes.
        img_size: Height and width of a training crop and of the window that slides over an image
            that is evaluated; one number, or [height, width]. For a model it is said there.
        in_chans: Channels: gray images become three equal ones, colour its luminance.
        batch_size: Images in a batch, of each process. 16 (the usual one for ADE20K, of all).
        num_workers: Processes that read images, of each process that trains; by default as many as
            there are CPU cores less one, up to 16, and none for less than 32 MB of images.
        val_fraction: Share of the images that validates where there is no val/; 0 = none.
        split_seed: Which share: of its own, so that all runs and tasks split alike.
        group_pattern: Regular expression, searched in each path below images/; its first group
            names the patient or scene, whose images all go to one side of the split.
        short_side: Pixels that each image's shorter side is brought to first, in evaluation too,
            where scores are still of the masks' own size; None: as it is. 512 (usual for ADE20K).
        scale: Factor by which a training image is enlarged before the crop, from and to. 0.5 to 2
            (the usual one, mmsegmentation's).
        hflip: Probability that a training image is mirrored. 0.5.
        max_class_share: Share of a crop that one class should cover at most. 0.75
            (mmsegmentation's).
        jitter: Change brightness, contrast, saturation and hue of training images, each by
            mmsegmentation's amount.
        statistics: Mean and standard deviation of the pixels: imagenet (torchvision's; the mean of
            the three for other than three channels), measured (from the training images, at most
            10,000), or your own [[means], [stds]] on a scale of 0 to 1.
        percentiles: Deeper scans: the percentiles of each image that become 0 and 1.
        percentiles_of: Deeper scans: whether each image has percentiles of its own (image: what is
            bright in one need not be in another), or all have those of the training images, or of
            1,000 of them, which are measured once and kept in the checkpoints (dataset).
        window: Deeper scans: the values that become 0 and 1 for all images, instead.
        bad_files: What a file that cannot be read does: skip (another image takes its place; it is
            listed in bad_files.txt in the run's folder) or raise (the run stops and names it).
        max_bad_share: Share of unreadable files above which skip stops the run all the same.
        seed: Seed of order, crops and flips. On the command line it is `--seed_everything`.

    Attributes:
        classes: Names of the classes. After setup, like all below.
        values: The value of each class in the masks.
        colors: The colour of each class, RGB; None where nobody has chosen any.
        class_counts: Training pixels of each class.
        num_train: Number of training images.
        mean: Of the pixels' channels, on a scale of 0 to 1; None but for training.
        std: Their standard deviation, likewise.
    """

    def __init__(
        self,
        root: str | None = None,
        classes: str | None = None,
        void: int | list[int] | None = None,
        img_size: int | list[int] = 512,
        in_chans: int = 3,
        batch_size: int = 16,
        num_workers: int | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        group_pattern: str | None = None,
        short_side: int | None = None,
        scale: tuple[float, float] = (0.5, 2.0),
        hflip: float = 0.5,
        max_class_share: float = 0.75,
        jitter: bool = True,
        statistics: Literal["imagenet", "measured"] | list[list[float]] = "imagenet",
        percentiles: tuple[float, float] = (0.5, 99.5),
        percentiles_of: Literal["image", "dataset"] = "image",
        window: tuple[float, float] | None = None,
        bad_files: Literal["skip", "raise"] = "skip",
        max_bad_share: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, bad_files, max_bad_share)
        if root is None:
            raise ValueError("no data: give data.root, a folder with images/ and masks/ in train/")
        self.root = find_root(root, None, "", ())
        self.classes_file, self.void = classes, [void] if isinstance(void, int) else void
        self.img_size, self.in_chans = check_image_size(img_size), in_chans
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.group_pattern, self.statistics = group_pattern, statistics
        check_number("in_chans", in_chans, 1)
        check_number("val_fraction", val_fraction, 0, 0.99)
        check_number("split_seed", split_seed, 0)
        check_number("hflip", hflip, 0, 1)
        check_number("max_class_share", max_class_share, 0, 1)
        check_number("short_side", 1 if short_side is None else short_side, 1)
        check_group_pattern(group_pattern)
        check_statistics(statistics, in_chans)
        check_choice("percentiles_of", percentiles_of, ("image", "dataset"))
        self.percentiles_of = percentiles_of
        self.intensity = Intensity(
            check_range("percentiles", percentiles, 0, 100),
            None if window is None else check_range("window", window),
        )
        scale = check_range("scale", scale, 0.01, inf)
        self.train_transform: Transform = PairCrop(
            self.img_size, scale, short_side, hflip, max_class_share, jitter
        )
        self.val_transform: Transform = Whole(short_side)
        self.collate = collate_sizes
        self.legend: Legend | None = None
        self.mean: tuple[float, ...] | None = None
        self.std: tuple[float, ...] | None = None

    def prepare_data(self) -> None:
        """Read the masks and measure statistics, once on each machine."""
        if self.trainer is None or self.trainer.state.fn != "predict":
            self._setup_parts()  # into the cache, for the other processes
            if self._measures() and self._trains():
                self._statistics()

    def setup(self, stage: str | None = None) -> None:
        """Pair images with masks, find the classes, and split where there is no split.

        Args:
            stage: "fit", "validate", "test" or "predict"; None: all of them.

        Raises:
            ValueError: If a partner is missing, or there is no image, or none to validate with.
        """
        if stage != "predict":
            if "training" not in self.sets:
                self._setup_parts()
            self._check_evaluated(stage)
            self._check_summary(stage)
        if stage in ("fit", None):
            self._resumed_step = 0
            self.mean, self.std = self._statistics()
        if stage in ("predict", None) and "predict" not in self.sets:
            self.sets["predict"] = self._alone(read_folder(self.root))
        self._add_report()

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return [] if self.legend is None else self.legend.classes

    @property
    def values(self) -> list[int]:
        """The value of each class in the masks."""
        return [] if self.legend is None else self.legend.values

    @property
    def colors(self) -> list[Color] | None:
        """The colour of each class, if chosen."""
        return None if self.legend is None else self.legend.colors

    @property
    def class_counts(self) -> list[int]:
        """Training pixels of each class."""
        return list(self._count(self.sets["training"]).class_counts)

    def summary(self) -> DataSummary:
        """Count the pixels of each class, and those without one."""
        return replace(super().summary(), unit="pixels", classes=self.classes, needs_labels=True)

    def _count(self, data: ImageData) -> SplitSummary:
        assert isinstance(data, MaskedImages)
        assert self.legend is not None
        totals, void = data.totals, self.legend.void
        ignored = [(v, totals[v][0]) for v in void if v in totals]
        pixels = sum(n for _, n in ignored) + totals.get(VOID, (0, 0))[0]
        left_out = []
        if pixels:
            values = shortened([v for v, _ in ignored]) or "colours without a class"
            left_out = [LeftOut("pixels", f"ignored, as data.void says ({values})", pixels)]
        if unreadable := data.counts.unreadable(data.pairs.mask_places()):
            first = data.pairs.masks.path(unreadable[0])
            left_out.append(LeftOut("masks", "cannot be read", len(unreadable), first))
        counts = [totals.get(value, (0, 0))[0] for value in self.legend.values]
        return SplitSummary(len(data), {}, counts, left_out)

    def number_classes_as(self, classes: list[str]) -> None:
        """Number the classes as a model does that was trained with these and perhaps with more."""
        legend = self.legend
        assert legend is not None
        place = {name: number for number, name in enumerate(legend.classes)}
        unused = iter(value for value in range(MOST - 1, -1, -1) if value not in legend.known)
        # Those of the model alone get a value and a colour that no mask has.
        values = [legend.values[place[n]] if n in place else next(unused) for n in classes]
        colors = legend.colors and [
            legend.colors[place[name]] if name in place else (-1, -1, -1 - number)
            for number, name in enumerate(classes)
        ]
        self.legend = replace(legend, classes=list(classes), values=values, colors=colors)
        for data in self.sets.values():
            if isinstance(data, MaskedImages):
                data.legend = self.legend

    def _setup_parts(self) -> None:
        parts = read_pairs(self.root, self.val_fraction, self.split_seed, self.group_pattern)
        file = os.path.expanduser(self.classes_file or os.path.join(self.root, FILE))
        named = self.classes_file is not None or os.path.exists(file)
        colors = read_legend(file, self.void) if named else None
        masks = {pairs.masks.root: pairs.masks for pairs in parts.values()}
        counted = {root: count_values(index, colors) for root, index in masks.items()}
        counts = {part: counted[pairs.masks.root] for part, pairs in parts.items()}
        totals = {part: counts[part].totals(pairs.mask_places()) for part, pairs in parts.items()}
        if named:
            self.legend = read_legend(file, self.void, totals["train"])
            self._check_classes(self.legend, totals["train"])
        else:
            self.legend = find_legend(self.root, totals["train"], self.void)
        may_ignore = not named or bool(edge_values(totals["train"]))
        for part, pairs in parts.items():
            strange = [v for v in totals[part] if v not in (*self.legend.known, VOID)]
            if not strange:
                continue
            path = pairs.masks.path(counts[part].first_with(strange[0], pairs.mask_places()))
            if may_ignore:
                n = sum(totals[part][value][0] for value in strange)
                rank_zero_warn(
                    f"{n:,} of the pixels of {part} have values that are no class "
                    f"({shortened(strange)}), first in {path!r}: they are ignored"
                )
                self.legend = replace(self.legend, void=(*self.legend.void, *strange))
            elif part != "test":
                raise self.legend.unknown(path, strange[0])
        for part, pairs in parts.items():
            transform = self.train_transform if part == "train" else self.val_transform
            data = self._make(pairs, counts[part], transform)
            self.sets[SPLITS[part]] = data
        self._measure_window()

    def _check_classes(self, legend: Legend, totals: Totals) -> None:
        """Refuse, or warn of, named classes without a pixel where other pixels are ignored."""
        ignored = [value for value in totals if value in legend.void]
        missing = [
            name
            for name, value in zip(legend.classes, legend.values, strict=True)
            if value not in totals
        ]
        pixels = sum(totals[value][0] for value in ignored)
        if not missing or pixels < MANY * sum(n for n, _ in totals.values()):
            return
        sentence = (
            f"the training masks have no pixel of {missing[0]!r}, but {pixels:,} pixels of the "
            f"values {shortened(ignored)}, which are ignored: if these are the class, give "
            f'"values" in {legend.source!r}, one for each class, and no such ignore_index'
        )
        if len(legend.classes) - len(missing) < 2 and self._trains():
            raise ValueError(sentence)
        rank_zero_warn(sentence)

    def _make(self, pairs: Pairs, counts: ValueCounts, transform: Transform) -> ImageData:
        assert self.legend is not None
        return MaskedImages(
            pairs,
            counts,
            self.legend,
            transform,
            in_chans=self.in_chans,
            intensity=self.intensity,
            seed=self.seed if transform is self.train_transform else 0,
            on_bad=self.bad_files,
        )

    def _alone(self, files: FileIndex) -> ImageData:
        """The images of a folder, without masks."""
        return WholeFolder(
            files,
            self.val_transform,
            without_masks(files),
            in_chans=self.in_chans,
            intensity=self.intensity,
            on_bad=self.bad_files,
            labelled=False,
            whole=True,
        )

    def _plain(self) -> ImageData:
        training = self.sets["training"]
        return ImageData(
            training.files,
            CenterCrop(self.img_size),
            None if training.places is None else training.places.numpy(),
            in_chans=self.in_chans,
            intensity=self.intensity,
            on_bad=self.bad_files,
        )


class MaskedImages(ImageData):
    """Images with masks; the transform gets both.

    Args:
        pairs: Which.
        counts: The values of all masks.
        legend: What the masks mean.
        transform: Takes ((C, H, W), (H, W)) and uniform random numbers, gives a dict.
        kwargs: As in `ImageData`.
    """

    def __init__(
        self,
        pairs: Pairs,
        counts: ValueCounts,
        legend: Legend,
        transform: Transform,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            pairs.images, transform, pairs.places, labelled=False, whole=True, **kwargs
        )
        self.pairs, self.counts, self.legend = pairs, counts, legend

    @property
    def totals(self) -> Totals:
        """Pixels of each value in all masks."""
        return self.counts.totals(self.pairs.mask_places())

    def mask_path(self, index: int) -> str:
        """Path of the mask of a sample."""
        return self.pairs.masks.path(int(self.pairs.partners[self._place(index)]))

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Read an image, (C, H, W), and its mask, (H, W).

        The image is left as it is stored where EXIF would turn it away from its mask's size.
        """
        image, path = self.read_image(index), self.mask_path(index)
        mask = self.legend.read(path)
        if mask.shape != image.shape[1:] and mask.shape == image.shape[:0:-1]:
            image = self.read_image(index, oriented=False)
        if mask.shape != image.shape[1:]:
            (height, width), (rows, columns) = image.shape[1:], mask.shape
            raise WrongMask(
                f"{path!r} is {columns} x {rows} pixels, but {self.path(index)!r} is "
                f"{width} x {height}: bring the mask to the size of its image"
            )
        return image, mask


def collate_sizes(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples to a batch; what has several sizes becomes a list."""
    ragged = [
        name
        for name, value in (samples[0] if samples else {}).items()
        if isinstance(value, Tensor) and len({sample[name].shape for sample in samples}) > 1
    ]
    lists = {name: [sample[name] for sample in samples] for name in ragged}
    even = [{k: v for k, v in sample.items() if k not in ragged} for sample in samples]
    return {**(default_collate(even) if "image" in ragged else collate(even)), **lists}
