"""Images with boxes: COCO's and Pascal VOC's annotations, and what a detector trains on."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from math import inf
from typing import Any, Literal

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor

from simmim.data.annotated import (
    LEAST,
    AnnotatedPart,
    count_objects,
    read_annotated_parts,
    read_image_ids,
)
from simmim.data.annotations import LEARNED, OUTLINES, decode_runs
from simmim.data.boxes import Fit, Jitter
from simmim.data.checks import (
    check_choice,
    check_image_size,
    check_number,
    check_range,
    find_root,
)
from simmim.data.dataset import ImageData, Key, WholeFolder, collate
from simmim.data.decode import UnreadableImage
from simmim.data.draws import uniforms
from simmim.data.layout import read_folder
from simmim.data.listed import Annotations, Objects
from simmim.data.loaders import LoaderModule
from simmim.data.scans import Intensity
from simmim.data.split import check_group_pattern
from simmim.data.statistics import check_statistics
from simmim.data.summary import DataSummary
from simmim.data.transforms import Box, CenterCrop, crop_and_resize

LISTS = ("target", "truth", "picture")  # of a batch: what differs in size from image to image
FEW = 0.05  # share of objects without an outline that masks are learned without
PICTURE = 1024  # px of the longer side of what is drawn on


class DetectionData(LoaderModule):
    """Images of a folder with the boxes of objects in them, and their outlines where there are any.

    `train/` and `val/` (and `test/`) are taken where they exist; otherwise a part of the images,
    chosen by a hash of their names, validates. Annotations are found beside the images: COCO's
    `annotations.json` in train/ and val/, `instances_train.json` beside the folders or in
    annotations/, or Pascal VOC's xml (beside the images, or in Annotations/ or annotations_voc/).

    A batch is a dict: `image`, uint8 (B, C, H, W), at the top left of a canvas that is empty (0)
    around it; `size`, its height and width there; `index`; `target`, a list of {boxes, labels,
    masks} on the canvas. For evaluation also `original`, height and width of the file, and `truth`,
    in its pixels; for predict `picture`, the image at up to 1024 px, and `path`.

    Args:
        root: Folder of images, at any depth.
        annotations: One COCO file for all images (its paths count from root, or end as those of the
            images do), or a folder of Pascal VOC xml. None: each part's own, beside its images.
        img_size: Height and width of the canvas in pixels: one number, or [height, width]. For a
            model it is said there (`--model.img_size`).
        in_chans: Channels: gray images become three equal ones, colour its luminance.
        masks: Whether to read outlines, and leave out objects without one; on the command line it
            is the model's. None: where all objects have one, but a twentieth.
        batch_size: Images in a batch, of each process.
        num_workers: Processes that read images, of each process that trains; by default as many as
            there are CPU cores less one, up to 16, and none for less than 32 MB of images.
        val_fraction: Share of the images that validates where there is no val/; 0 = none.
        split_seed: Which share: of its own, so that all runs and tasks split alike.
        group_pattern: Regular expression, searched in each path; its first group names the patient
            or scene, whose images all go to one side of the split: '(patient[0-9]+)_'.
        scale_jitter: Size of a training image, as a share of the one that fits the canvas, from and
            to; what is larger than the canvas is cut at random. 0.1 to 2 is ViTDet's; few images
            and small ones take less.
        hflip: Probability that a training image is mirrored.
        statistics: Mean and standard deviation of the pixels: imagenet, measured (from the training
            images), or your own [[means], [stds]] on a scale of 0 to 1. Those of the model's
            weights come first.
        percentiles: Deeper scans: the percentiles of each image that become 0 and 1.
        percentiles_of: Deeper scans: whether each image has percentiles of its own (image: what is
            bright in one need not be in another), or all have those of the training images, or of
            1,000 of them, which are measured once and kept in the checkpoints (dataset).
        window: Deeper scans: the values that become 0 and 1 for all images, instead of percentiles.
        bad_files: What a file that cannot be read does: skip (another image takes its place; it is
            listed in bad_files.txt in the run's folder) or raise (the run stops and names it).
        max_bad_share: Share of unreadable files above which skip stops the run all the same.
        seed: Seed of order and transforms. On the command line it is `--seed_everything`.

    Attributes:
        classes: Names of the classes. After setup, like all below.
        category_ids: Their numbers in the annotations.
        has_masks: Whether the batches have masks.
        mean: Of the pixels' channels, on a scale of 0 to 1; None but for training.
        std: Their standard deviation, likewise.
    """

    def __init__(
        self,
        root: str | None = None,
        annotations: str | None = None,
        img_size: int | list[int] = 224,
        in_chans: int = 3,
        masks: bool | None = None,
        batch_size: int = 16,
        num_workers: int | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        group_pattern: str | None = None,
        scale_jitter: tuple[float, float] = (0.8, 1.25),
        hflip: float = 0.5,
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
            raise ValueError("no data: give data.root, a folder of images with annotations")
        self.root = find_root(root, None, "", ())
        self.annotations = annotations
        self.img_size, self.in_chans = check_image_size(img_size), in_chans
        self.masks, self.statistics = masks, statistics
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.group_pattern = group_pattern
        check_number("in_chans", in_chans, 1)
        check_number("val_fraction", val_fraction, 0, 0.99)
        check_number("split_seed", split_seed, 0, inf)
        check_number("hflip", hflip, 0, 1)
        check_group_pattern(group_pattern)
        check_statistics(statistics, in_chans)
        check_choice("percentiles_of", percentiles_of, ("image", "dataset"))
        self.percentiles_of = percentiles_of
        self.intensity = Intensity(
            check_range("percentiles", percentiles, 0, 100),
            None if window is None else check_range("window", window),
        )
        jitter = check_range("scale_jitter", scale_jitter, 0.01, 100)
        self.train_transform = Jitter(self.img_size, jitter, hflip)
        self.val_transform = Fit(self.img_size)
        self.collate = collate_boxes
        self.classes: list[str] = []
        self.category_ids: list[int] = []
        self.has_masks = False
        self.mean: tuple[float, ...] | None = None
        self.std: tuple[float, ...] | None = None
        self._parts: dict[str, AnnotatedPart] = {}
        self._notes: list[str] = []
        self._ids: list[Any] | None = None

    def prepare_data(self) -> None:
        """Read annotations and measure statistics, once on each machine, into the cache."""
        if self.trainer is not None and self.trainer.state.fn == "predict":
            self._setup_predict()
            self.image_id(0)
            return
        with suppress(ValueError):  # which setup raises in every process
            self._read_parts()
        if self._parts and self._measures():
            self._setup_parts()
            if self._trains():
                self._statistics()

    def setup(self, stage: str | None = None) -> None:
        """Find the images and their annotations, and split them where they are not split.

        Args:
            stage: "fit", "validate", "test" or "predict"; None: all of them.

        Raises:
            ValueError: If there is no image, no annotation, or nothing to validate with.
        """
        if stage != "predict":
            if "training" not in self.sets:
                self._setup_parts()
            self._check_evaluated(stage)
            self._check_summary(stage)
        if stage in ("fit", None):
            self._resumed_step = 0
            self.mean, self.std = self._statistics()
        if stage in ("predict", None):
            self._setup_predict()
        self._add_report()

    def samples_to_draw(self, n: int) -> Any:
        """A batch of a few validation images, spread evenly, with pictures to draw on.

        Without validation images, training images are taken.
        """
        data = self.sets.get("validation") or self._make("train", self.val_transform, Evaluated)
        assert isinstance(data, Evaluated)
        n = min(n, len(data))
        chosen = [i * (len(data) - 1) // max(n - 1, 1) for i in range(n)]
        return self.collate([data.to_draw(i) for i in chosen])

    def image_id(self, index: int) -> Any:
        """The id of a `predict` image in the annotations, or else its number from 1."""
        if self._ids is None:
            self._ids = read_image_ids(self.root, self.annotations, self.sets["predict"].files)
        return self._ids[index]

    def summary(self) -> DataSummary:
        """Count the images, objects and outlines of each part, and what is not learned of them."""
        self._read_parts()
        options: dict[str, Any] = {"masks": self.has_masks, "num_classes": len(self.classes)}
        splits = {
            name: count_objects(part, self.img_size, **options)
            for name, part in self._parts.items()
        }
        return DataSummary(self.root, splits, "objects", self.classes, True, self._notes)

    def _read_parts(self) -> None:
        if self._parts:
            return
        options = self.val_fraction, self.split_seed, self.group_pattern
        parts, classes = read_annotated_parts(self.root, self.annotations, *options)
        self.has_masks = self.masks is not False and self._have_outlines(parts)
        self.classes, self.category_ids = classes
        self._parts = parts

    def _have_outlines(self, parts: dict[str, AnnotatedPart]) -> bool:
        """Whether all objects have an outline, but the few that can be left out.

        Raises:
            ValueError: If masks are asked for, and a part has none.
        """
        for name, part in parts.items():
            lacking, n = part.lacking()
            if not len(lacking):
                continue
            codes = part.annotations.no_outline[lacking]
            worst = int(codes.argmax())  # what is there and cannot be used before what is not
            why = f"{OUTLINES[int(codes[worst])]}; first: {part.describe(int(lacking[worst]))}"
            if self.masks and len(lacking) == n:
                raise ValueError(
                    f"masks are asked for, but no object of {name} has an outline ({why}): leave "
                    "model.masks out, or complete the annotations"
                )
            if not self.masks and len(lacking) > FEW * n:
                if len(lacking) < n or bool((codes > 1).any()):  # else nobody drew any
                    self._notes = [
                        f"{len(lacking):,} of {n:,} objects of {name} "
                        f"{'has' if len(lacking) == 1 else 'have'} no outline "
                        f"({why}), so boxes alone are learned: --model.masks true leaves "
                        f"{'it' if len(lacking) == 1 else 'them'} out"
                    ]
                return False
        return any(part.lacking()[1] for part in parts.values())

    def _setup_predict(self) -> None:
        if "predict" not in self.sets:
            files = read_folder(self.root)
            self.sets["predict"] = WholeFolder(files, Shown(self.img_size), **self._reading())

    def number_classes_as(self, classes: list[str]) -> None:
        """Number the classes as a model does that was trained with these and perhaps with more."""
        new = torch.tensor([classes.index(name) for name in self.classes])
        for data in self.sets.values():
            if isinstance(data, Annotated):
                objects = data.annotations
                data.annotations = replace(objects, labels=new[objects.labels])
        self.classes = classes

    def _setup_parts(self) -> None:
        self._read_parts()
        self.sets["training"] = self._make("train", self.train_transform, Annotated)
        for part, name in {"val": "validation", "test": "test"}.items():
            if part in self._parts:
                self.sets[name] = self._make(part, self.val_transform, Evaluated)
        self._measure_window()

    def _make(self, name: str, transform: Fit, kind: "type[Annotated]") -> "Annotated":
        part = self._parts[name]
        seed = self.seed if transform is self.train_transform else 0
        data = kind(part.files, transform, part.places, **self._reading(), seed=seed)
        data.annotations, data.has_masks = part.annotations, self.has_masks
        return data

    def _reading(self) -> dict[str, Any]:
        return {
            "in_chans": self.in_chans,
            "intensity": self.intensity,
            "on_bad": self.bad_files,
            "labelled": False,
            "whole": True,
        }

    def _plain(self) -> ImageData:
        part = self._parts["train"]
        middle = CenterCrop(self.img_size)  # what is empty of a canvas would count as black
        return ImageData(part.files, middle, part.places, **self._reading())


class Annotated(ImageData):
    """Training images on a canvas, with the objects that are to be found.

    Attributes:
        annotations: Of all files of the index.
        has_masks: Whether objects have masks.
    """

    annotations: Annotations
    has_masks: bool

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        image, index = self._read(epoch, index % len(self))
        return {**self._sample(image, index, epoch), "index": index}

    def read(self, index: int) -> Tensor:
        """Read an image as it was annotated: by its size, without EXIF's orientation if need be.

        Raises:
            UnreadableImage: Also where its size is another than the annotations say: then nobody
                knows where its boxes are.
        """
        image = self.read_image(index)
        height, width = self.annotations.sizes[self._place(index)].tolist()
        if height and (width, height) == tuple(image.shape[1:]):
            image = self.read_image(index, oriented=False)
        if height and (height, width) != tuple(image.shape[1:]):
            raise UnreadableImage(
                f"{self.path(index)!r} cannot be read: it has {image.shape[2]} x {image.shape[1]} "
                f"px, but its annotations are for {width} x {height}"
            )
        return image

    def _sample(self, image: Tensor, index: int, epoch: int) -> dict[str, Any]:
        """Place the image, and the objects that are left of it, on the canvas."""
        assert isinstance(self.transform, Fit)
        height, width = image.shape[1:]
        draws = uniforms(self.seed, epoch, index)
        placement = self.transform.place(height, width, draws)
        objects = self.annotations.of(self._place(index))
        boxes, learned = placement.boxes(objects.boxes), objects.reasons <= LEARNED
        sides = boxes[:, 2:] - boxes[:, :2]
        kept = learned & (sides >= LEAST).all(1)
        masks = None
        if self.has_masks:
            masks = placement.masks(draw_masks(objects, height, width))
            kept &= torch.tensor([one is not None for one in objects.outlines], dtype=torch.bool)
            kept &= (masks > 0).flatten(1).any(1)
        target = {"boxes": boxes[kept], "labels": objects.labels[kept]}
        return {
            "image": placement.image(image, self.transform.canvas),
            "size": torch.tensor(placement.size),
            "target": target if masks is None else {**target, "masks": masks[kept]},
        }


class Evaluated(Annotated):
    """Images to evaluate on: whole, with the truth in their own pixels."""

    def to_draw(self, index: int) -> dict[str, Any]:
        """A sample with a picture to draw on."""
        image, found = self._read(0, index)
        return {**self._sample(image, found, 0), "index": found, "picture": _picture(image)}

    def _sample(self, image: Tensor, index: int, epoch: int) -> dict[str, Any]:
        height, width = image.shape[1:]
        objects = self.annotations.of(self._place(index))
        whole = Fit((height, width)).place(height, width, iter(())).boxes(objects.boxes)
        truth = {
            "boxes": whole,
            "labels": objects.labels,
            "iscrowd": (objects.reasons > LEARNED).long(),
            "area": objects.area,
        }
        if self.has_masks:
            truth["iscrowd"] |= torch.tensor([one is None for one in objects.outlines]).long()
            truth["masks"] = draw_masks(objects, height, width).bool()
        sample = super()._sample(image, index, epoch)
        return {**sample, "original": torch.tensor((height, width)), "truth": truth}


class Shown(Fit):
    """An image to predict on, with a picture to draw on."""

    def __call__(self, image: Tensor, draws: Iterator[float]) -> dict[str, Any]:
        """Put (C, H, W) on the canvas."""
        return {**super().__call__(image, draws), "picture": _picture(image)}


def draw_masks(objects: Objects, height: int, width: int) -> Tensor:
    """Draw outlines, polygons or run lengths, as masks of their image: uint8, (n, H, W).

    Objects without an outline, which are not learned, fill their box.
    """
    masks = np.zeros((len(objects.outlines), height, width), np.uint8)
    for mask, outline, box in zip(masks, objects.outlines, objects.boxes.tolist(), strict=True):
        if outline is None:
            left, top, right, bottom = (round(edge) for edge in box)
            mask[max(top, 0) : bottom, max(left, 0) : right] = 1
        elif isinstance(outline, dict):
            mask[:] = decode_runs(outline)
        else:
            mask[:] = coco_mask.decode(
                coco_mask.merge(coco_mask.frPyObjects(outline, height, width))
            )
    return torch.from_numpy(masks)


def collate_boxes(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples to a batch; what differs in size from image to image stays a list."""
    if not samples:  # none could be read
        return {}
    lists = {name: [s[name] for s in samples] for name in LISTS if name in samples[0]}
    rest = [{k: v for k, v in sample.items() if k not in LISTS} for sample in samples]
    return {**collate(rest), **lists}


def _picture(image: Tensor) -> Tensor:
    """An image, (C, H, W), reduced to at most 1024 px."""
    height, width = image.shape[1:]
    scale = min(1.0, PICTURE / max(height, width))
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    return crop_and_resize(image, Box(0, 0, height, width), size)
