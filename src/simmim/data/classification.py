"""Images to classify: labels from folders or a table, fewer of them, and stronger augmentation."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torch.nn import functional as F

from simmim.data.dataset import ImageData, Key
from simmim.data.image_folder import ImageFolderData
from simmim.data.labels import LabelTable, label_files
from simmim.data.layout import Part
from simmim.data.summary import DataSummary, LeftOut, SplitSummary
from simmim.data.transforms import Box, CenterCrop, RandomCrop, Size, center_box, random_box

Places = npt.NDArray[np.int64]


class ClassificationData(ImageFolderData):
    """Images of a folder with a class, or several labels, each.

    The split and the batches are those of pretraining; `label` is a class, int64 (B,), or presence
    of each label, uint8 (B, K).

    Args:
        labels_per_class: Train on fewer labels: so many of each class (10), or a share of them
            (0.1; 1.0 is all, 1 is one). The same images for the same seed, and more of them hold
            the fewer. None: all.
        labels: CSV file with a header that gives the labels, instead of folders. First column:
            path of the image below root. One more column: its label, or several separated by ";"
            or "|". Several more: 0 or 1 for each label.
        multi_label: Whether an image can have several labels; on the command line it is the
            model's.
        crop_scale: Share of the image's area that a training crop takes, from and to. 0.08 to 1
            (the released fine-tuning).
        randaugment: RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1 (the released
            fine-tuning); deeper scans are reduced to 8 bits for it. None: none.
        kwargs: As in ImageFolderData.
    """

    def __init__(
        self,
        labels_per_class: int | float | None = None,
        labels: str | None = None,
        multi_label: bool = False,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        randaugment: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(crop_scale=crop_scale, **kwargs)
        if labels_per_class is not None and not (
            labels_per_class > 0 and (labels_per_class <= 1 or labels_per_class % 1 == 0)
        ):
            raise ValueError(
                f"data.labels_per_class {labels_per_class} is neither a number of images nor a "
                "share of them: use 10, or 0.1 for a tenth"
            )
        if multi_label and labels is None:
            raise ValueError("multi_label needs data.labels, a CSV file of paths and labels")
        if multi_label and labels_per_class is not None:
            raise ValueError("data.labels_per_class is for one class an image: leave it out")
        if randaugment is not None and self.in_chans not in (1, 3):
            raise ValueError(
                f"data.randaugment works on gray or colour images, not on {self.in_chans} channels"
            )
        self.labels_per_class, self.multi_label = labels_per_class, multi_label
        self.labels = labels
        self._unused_rows: list[LeftOut] = []
        crop, middle = self.train_transform, self.val_transform
        assert isinstance(crop, RandomCrop)
        assert isinstance(middle, CenterCrop)
        augment = _augmentation(randaugment, self.img_size, self.in_chans)
        self.train_transform = StrongCrop(crop.size, crop.scale, crop.ratio, crop.hflip, augment)
        self.val_transform = SharpCenterCrop(middle.size, middle.share)

    @property
    def class_counts(self) -> list[int]:
        """Training images of each class, or with each label."""
        data = self.sets["training"]
        if isinstance(data, LabelledImages):
            return data.label_counts
        return super().class_counts

    def summary(self) -> DataSummary:
        """Count images and labels of each split; without labels there is nothing to learn."""
        summary = replace(super().summary(), needs_labels=True)
        if self.labels is None:
            return summary
        train = summary.splits["train"]
        train = replace(train, left_out=[*train.left_out, *self._unused_rows])
        return replace(summary, notes=[], splits={**summary.splits, "train": train})

    def _count(self, data: ImageData) -> SplitSummary:
        if isinstance(data, LabelledImages):
            return replace(
                super()._count(data),
                counts={"with labels": len(data)},
                class_counts=data.label_counts,
            )
        return super()._count(data)

    def number_classes_as(self, classes: list[str]) -> None:
        """Number the classes as a model does that was trained with these and perhaps with more."""
        for data in {id(data): data for data in self.sets.values()}.values():
            data.number_classes_as(classes)
        self.classes = classes

    def _setup_parts(self) -> None:
        """Split as pretraining does, whatever the labels; then label, and choose."""
        super()._setup_parts()
        if self.labels is not None:
            names = [name for name in self.sets if name != "predict"]
            folders = {self.sets[name].files.root: self.sets[name].files for name in names}
            found = label_files(
                self.labels, [*folders.values()], self.root, several=self.multi_label
            )
            tables = dict(zip(folders, found, strict=True))
            for name in names:
                self._label(name, *tables[self.sets[name].files.root])
            self.classes, self.has_labels = found[0][0].classes, True
            used = torch.cat([rows for _, rows in found]).unique()
            if unused := len(found[0][0].counts) - int((used >= 0).sum()):
                reason = f"{self.labels} names no image there"
                self._unused_rows = [LeftOut("rows", reason, unused)]
        elif len(self.classes) < 2 and (hints := self._hints()):
            raise ValueError(hints[0])
        if not self.has_labels:
            raise ValueError(
                f"{self.root!r} has no labels: put each class's images into a folder of its own, "
                "or give data.labels, a CSV file of paths and labels"
            )
        if self.labels_per_class is not None:
            whole = self.sets["training"]
            chosen = choose_labels(whole, self.labels_per_class, self.seed)
            part = Part(
                whole.files, chosen if whole.places is None else whole.places.numpy()[chosen]
            )
            self.sets["training"] = self._make(part, self.train_transform)
            self.sets["probe"] = self._make(part, self.val_transform)
            rank_zero_info(f"labels of {len(chosen)} of {len(whole)} training images are used")

    def _label(self, name: str, table: LabelTable, rows: Tensor) -> None:
        """Give a part the labels of the table; images that are not in it are left out."""
        data = self.sets[name]
        places = torch.arange(len(rows)) if data.places is None else data.places
        kept = places[rows[places] >= 0]
        if not len(kept):
            example = data.files.name(int(places[0]))
            raise ValueError(
                f"data.labels {table.source} names no image of {name}: its first column must hold "
                f"paths below data.root, such as {example!r}"
            )
        if len(kept) < len(places) and name != "probe":
            missing = len(places) - len(kept)
            rank_zero_warn(f"{missing} images of {name} are not in {table.source}: left out")
        labels = None
        if not self.multi_label:
            labels = table.numbers[rows.clamp(min=0)]  # of those that are not in it, nonsense
        files = replace(data.files, labels=labels, classes=table.classes)
        kind = LabelledImages if self.multi_label else ImageData
        labelled = self._make(Part(files, kept.numpy()), data.transform, kind)
        if isinstance(labelled, LabelledImages):
            labelled.table, labelled.rows = table, rows
        self.sets[name] = labelled


class LabelledImages(ImageData):
    """Images with several labels each.

    Attributes:
        table: The labels.
        rows: The row of each file of the index in it, int64.
    """

    table: LabelTable
    rows: Tensor

    def __getitem__(self, key: Key) -> dict[str, Any]:
        sample = super().__getitem__(key)
        row = int(self.rows[self._place(sample["index"])])
        return {**sample, "label": self.table.presence(row)}

    def number_classes_as(self, classes: list[str]) -> None:
        """Give each label the number that it has in `classes`, which holds all of them."""
        new = torch.tensor([classes.index(name) for name in self.table.classes])
        self.table = replace(self.table, numbers=new[self.table.numbers], classes=classes)
        self.files = replace(self.files, classes=classes)

    @property
    def label_counts(self) -> list[int]:
        """How many of the images have each label."""
        return self.table.frequencies(self.rows if self.places is None else self.rows[self.places])


def choose_labels(data: ImageData, amount: float, seed: int) -> Places:
    """Choose the training images that keep their labels: the same ones for the same seed.

    Each class's images are put in the order of a hash of their path and the seed, and the first
    ones are taken: 100 of a class hold the 10 of it, wherever the folder lies.

    Args:
        data: All training images.
        amount: Images of each class, or the share of them: a float up to 1; at least one.
        seed: Another seed, another choice.

    Returns:
        Places in the data, in order.

    Raises:
        ValueError: If a class has fewer images than are asked for.
    """
    assert data.labels is not None
    hashes = np.fromiter((_hash(name, seed) for name in data.all_names()), np.uint64, len(data))
    labels, chosen = data.labels.numpy(), []
    order = np.lexsort((hashes, labels))  # by class, then by hash
    sizes = np.bincount(labels)
    is_share = isinstance(amount, float) and amount <= 1
    for label in np.flatnonzero(sizes):
        size, first = int(sizes[label]), int(sizes[:label].sum())
        n = max(round(amount * size), 1) if is_share else int(amount)
        if n > size:
            raise ValueError(
                f"data.labels_per_class {amount} is more than the {size} training images "
                f"of class {data.classes[label]!r}: use {size} or fewer, or 0.5 for half"
            )
        chosen.append(order[first : first + n])
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class StrongCrop:
    """The transform of the released fine-tuning: a random crop, RandAugment, and whether to flip.

    Attributes:
        size: Height and width that the crop is brought to, bicubic.
        scale: Share of the image's area that is taken, from and to.
        ratio: Width over height of what is taken, from and to.
        hflip: Probability of a horizontal flip.
        augment: RandAugment, on a PIL image; None for none.
    """

    size: Size
    scale: tuple[float, float]
    ratio: tuple[float, float]
    hflip: float
    augment: Callable[[Image.Image], Image.Image] | None = field(default=None, repr=False)

    def __call__(self, image: Tensor, draws: Iterator[float]) -> dict[str, object]:
        """Transform (C, H, W), by uniform random numbers."""
        box = random_box(image.shape[1], image.shape[2], self.scale, self.ratio, draws)
        image = _crop_sharply(image, box, self.size)
        sample: dict[str, object] = {"flip": next(draws) < self.hflip}
        if self.augment is not None:
            image = _apply(self.augment, image, int(next(draws) * 2**32))
        return {"image": image, **sample}


@dataclass(frozen=True)
class SharpCenterCrop:
    """The middle of an image, bicubic.

    Attributes:
        size: Height and width that the crop is brought to.
        share: Side of the crop, as a share of the largest one that fits: 0.875 is the published
            resize to 256 and crop of 224.
    """

    size: Size
    share: float

    def __call__(self, image: Tensor, draws: Iterator[float]) -> dict[str, object]:
        """Crop and resize (C, H, W)."""
        box = center_box(image.shape[1], image.shape[2], self.size, self.share)
        return {"image": _crop_sharply(image, box, self.size)}


def _crop_sharply(image: Tensor, box: Box, size: Size) -> Tensor:
    """Cut a rectangle out of (C, H, W) and resize it, bicubic and with antialiasing."""
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    if (height, width) != size:
        crop = F.interpolate(crop, size, mode="bicubic", antialias=True)
        if crop.is_floating_point():  # the cubic overshoots at edges; uint8 saturates by itself
            crop = crop.clamp(0, 1)
    return crop[0].contiguous()


def _augmentation(
    config: str | None, size: Size, in_chans: int
) -> Callable[[Image.Image], Image.Image] | None:
    """Build timm's RandAugment, with the constants of timm's create_transform for ImageNet."""
    if config is None:
        return None
    fill: Any = (124, 116, 104) if in_chans == 3 else 118  # ImageNet's mean
    options = {"translate_const": int(min(size) * 0.45), "img_mean": fill}
    try:
        augment: Callable[[Image.Image], Image.Image] = rand_augment_transform(
            config, {**options, "interpolation": Image.Resampling.BICUBIC}
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f"data.randaugment {config!r} is not in timm's notation: use rand-m9-mstd0.5-inc1"
        ) from error
    for op in augment.ops:  # type: ignore[attr-defined]
        if op.name.startswith("Posterize"):
            op.level_fn = partial(_keep_a_bit, op.level_fn)
    return augment


def _keep_a_bit(level_fn: Callable[..., tuple[int]], *args: Any) -> tuple[int]:
    """At full magnitude timm's posterize keeps 0 bits of 8, which made images black.

    Recent versions of Pillow refuse it.
    """
    return (max(level_fn(*args)[0], 1),)


def _apply(augment: Callable[[Image.Image], Image.Image], image: Tensor, seed: int) -> Tensor:
    """Augment (C, H, W); timm draws from the global states, which are seeded and put back."""
    if image.is_floating_point():
        image = (image * 255).round().byte()
    pixels = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).contiguous().numpy()
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        pixels = np.array(augment(Image.fromarray(pixels)))
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
    augmented = torch.from_numpy(pixels)
    return augmented[None] if augmented.ndim == 2 else augmented.permute(2, 0, 1).contiguous()


def _hash(name: str, seed: int) -> int:
    salt = (seed % 2**64).to_bytes(8, "little")
    data = name.encode("utf-8", "surrogateescape")
    digest = blake2b(data, digest_size=8, salt=salt, person=b"labels").digest()
    return int.from_bytes(digest, "little")
