"""Which images of a folder have annotations, and what these say: arrays that workers share."""

import os
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from simmim.data.annotations import LEARNED, OUTLINES, REASONS, count_left_out, read_voc
from simmim.data.index import FileIndex, check_folder
from simmim.data.layout import Part, read_parts, read_split
from simmim.data.listed import Annotations, Classes, Listed, listed_in, read_listed
from simmim.data.summary import LeftOut, SplitSummary
from simmim.data.transforms import Size

Sources = list[tuple[Sequence[FileIndex], Listed]]  # and the folders that each is about
LEAST = 1.0  # px on the canvas, below which an object is no longer shown
JSON = ("annotations.json", "_annotations.coco.json")  # beside the images: ours, Roboflow's
XML_FOLDERS = ("annotations_voc", "annotations", "xml", "xmls")
IMAGE_FOLDERS = ("images", "jpegimages", "imgs")
WHERE = (
    "put an annotations.json (COCO) or xml files (Pascal VOC) beside the images, or give "
    "data.annotations FILE"
)


@dataclass(frozen=True)
class AnnotatedPart:
    """Some images of an index, with their annotations.

    Attributes:
        files: The index.
        places: Which of its files.
        annotations: Of all files.
        left_out: Images without annotations; annotations without an image.
    """

    files: FileIndex
    places: npt.NDArray[np.int64]
    annotations: Annotations
    left_out: list[LeftOut]

    @cached_property
    def objects(self) -> Tensor:
        """Places of these images' objects in the annotations, int64."""
        chosen = torch.zeros(len(self.files), dtype=torch.bool)
        chosen[self.places] = True
        return chosen.repeat_interleave(self.annotations.starts.diff()).nonzero()[:, 0]

    def lacking(self) -> tuple[Tensor, int]:
        """Places of the objects that are learned, but have no outline; and how many are learned."""
        learned = self.objects[self.annotations.reasons[self.objects] <= LEARNED]
        return learned[self.annotations.no_outline[learned] > 0], len(learned)

    def describe(self, place: int) -> str:
        """Name an object by its image and its number in the annotations."""
        file = int(torch.searchsorted(self.annotations.starts, place, right=True)) - 1
        return f"{self.files.name(file)}, annotation {int(self.annotations.numbers[place])}"


def read_annotated_parts(
    root: str,
    annotations: str | None,
    val_fraction: float,
    split_seed: int = 0,
    group_pattern: str | None = None,
) -> tuple[dict[str, AnnotatedPart], Classes]:
    """Find the parts of a folder, as `read_parts` does, and their annotations.

    An image belongs to a data set if the annotations list it, with objects or without.

    Args:
        root: A folder with train/ (and val/, and test/), or of images.
        annotations: One COCO file, or folder of VOC xml, for all images; None: each part's own.
        val_fraction: Share that validates where there is no val/; like the next two.
        split_seed: Which share.
        group_pattern: What belongs together.

    Returns:
        "train", and "val" and "test" where there are annotated images for them; and the classes
        of all.

    Raises:
        ValueError: If annotations are missing, or list no image of a part.
    """
    check_folder(root)
    parts = read_parts(root, val_fraction, split_seed, group_pattern, masks_apart=False)
    sources = _read_sources(root, annotations, parts)
    classes = _unite([source for _, source in sources])
    found = {}
    for folders, source in sources:
        left_out = source.left_out  # told of the first part that it is about
        number = [classes.names.index(name) for name in source.classes.names]
        rows = zip(folders, source.annotations, source.listed, strict=True)
        for files, objects, listed in rows:
            if number != list(range(len(number))):
                labels = torch.tensor(number, dtype=torch.int64)[objects.labels]
                objects = replace(objects, labels=labels)
            for name, part in parts.items():
                if part.files.root != files.root:
                    continue
                places = np.arange(len(files)) if part.places is None else part.places
                known = listed.numpy()[places]
                if known.any():
                    unlisted = [files.name(int(place)) for place in places[~known]]
                    examples = {f"not in {source.source}": unlisted} if unlisted else {}
                    told = left_out + count_left_out("images", examples)
                    found[name] = AnnotatedPart(files, places[known], objects, told)
                    left_out = []
    _check_found(found, sources, parts)
    return found, classes


def read_image_ids(root: str, annotations: str | None, files: FileIndex) -> list[Any]:
    """Ids that COCO's annotations give to the images below a folder; others count on from these.

    Args:
        root: The folder.
        annotations: A COCO file; None: those beside the images, if they are any.
        files: All images below the folder.
    """
    ids: dict[str, Any] = {}
    if annotations is not None and os.path.isfile(path := os.path.expanduser(annotations)):
        ids = dict(zip(files.all_names(), read_listed(path, [files]).ids[0], strict=True))
    elif annotations is None:
        for part, index in (read_split(root) or {"": files}).items():
            with suppress(ValueError):  # another json, or a broken one: nobody asked for it
                source = _find_source(root, part, index)
                below = os.path.relpath(index.root, root).replace(os.sep, "/")
                names = (posixpath.normpath(f"{below}/{name}") for name in index.all_names())
                ids |= {} if source is None else dict(zip(names, source.ids[0], strict=True))
    known = [identity for identity in ids.values() if identity is not None]
    if len(set(known)) < len(known):  # train/ and val/ may both count from 1
        ids, known = {}, []
    last = max((identity for identity in known if isinstance(identity, int)), default=0)
    each = [ids.get(name) for name in files.all_names()]
    return [last + 1 + i if identity is None else identity for i, identity in enumerate(each)]


# Finding -----------------------------------------------------------------------------------------


def _read_sources(root: str, annotations: str | None, parts: Mapping[str, Part]) -> Sources:
    """Read the annotations of each folder; that of the test images may have none."""
    indexes: dict[str, tuple[str, FileIndex]] = {}  # of which several parts may be
    for name, part in parts.items():
        indexes.setdefault(part.files.root, (name, part.files))
    if annotations is not None:
        every = [files for _, files in indexes.values()]
        return [(every, _read_given(annotations, every))]
    sources: Sources = []
    for name, files in indexes.values():
        if (source := _find_source(root, name, files)) is not None:
            sources.append(([files], source))
        elif name == "test":
            rank_zero_info(f"{files.root} has no annotations: nothing to test on")
        else:
            raise ValueError(f"{files.root!r} has images, but no annotations: {WHERE}")
    return sources


def _read_given(annotations: str, indexes: Sequence[FileIndex]) -> Listed:
    """Read what data.annotations names."""
    path = os.path.expanduser(annotations)
    if not os.path.isdir(path):
        return read_listed(path, indexes)
    xml = _find_xml([path])
    files = {}
    for index in indexes:
        names = index.all_names()
        files.update({name: xml[_stem(name)] for name in names if _stem(name) in xml})
    return listed_in(read_voc(path, files), indexes)


def _find_source(root: str, part: str, files: FileIndex) -> Listed | None:
    """Find the annotations of a part: COCO's, VOC's, or else the only json in its folder."""
    folder, name = files.root, os.path.basename(os.path.normpath(files.root))
    candidates = [os.path.join(folder, file) for file in JSON]
    for file in (f"{start}{end}.json" for end in (name, part) for start in ("instances_", "")):
        candidates += [os.path.join(root, file), os.path.join(root, "annotations", file)]
    for path in candidates:
        if os.path.isfile(path):
            return read_listed(path, [files])
    above = [entry.path for entry in os.scandir(root) if entry.name.lower() in XML_FOLDERS]
    for folders in ([folder], above):
        xml = _find_xml(folders)
        matched = {}
        for image in files.all_names():
            stems = (_stem(image), f"{name}/{_stem(image)}")
            if stem := next((stem for stem in stems if stem in xml), None):
                matched[image] = xml[stem]
        if matched:
            return listed_in(read_voc(folder, matched), [files])
    beside = [file for file in os.listdir(folder) if file.lower().endswith(".json")]
    return read_listed(os.path.join(folder, beside[0]), [files]) if len(beside) == 1 else None


def _find_xml(folders: Iterable[str]) -> dict[str, str]:
    """The xml files below folders, by their stems."""
    found: dict[str, str] = {}
    for folder in folders:
        for path, subfolders, files in os.walk(folder):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for file in sorted(files):
                if file.lower().endswith(".xml") and not file.startswith("."):
                    relative = os.path.relpath(os.path.join(path, file), folder)
                    found.setdefault(_stem(relative), os.path.join(path, file))
    return found


def _stem(name: str) -> str:
    """What an image and its xml have in common: folders and name, but images/ and annotations/."""
    parts = os.path.splitext(name.replace(os.sep, "/"))[0].split("/")
    return "/".join(part for part in parts if part.lower() not in (*XML_FOLDERS, *IMAGE_FOLDERS))


# What is said ------------------------------------------------------------------------------------


def _unite(sources: Iterable[Listed]) -> Classes:
    """The classes of all parts, in the order of the first that names them."""
    numbers: dict[str, int] = {}
    for source in sources:
        for name, number in zip(*source.classes, strict=True):
            numbers.setdefault(name, number)
    return Classes(list(numbers), list(numbers.values()))


def count_objects(
    part: AnnotatedPart, canvas: Size, *, masks: bool, num_classes: int
) -> SplitSummary:
    """Count what is learned of a part, and what is not.

    Args:
        part: The images.
        canvas: Height and width that each image is fitted onto.
        masks: Whether objects without an outline are left out.
        num_classes: Their number.
    """
    told, mine = part.annotations, part.objects
    files = torch.searchsorted(told.starts, mine, right=True) - 1
    scale = (torch.tensor(canvas) / told.sizes[files].clamp(min=1)).amin(1, keepdim=True)
    scale[told.sizes[files, 0] == 0] = 1.0  # nobody says the size
    small = ((told.boxes[mine, 2:] - told.boxes[mine, :2]) * scale < LEAST).any(1)
    too_small = f"box under {LEAST:g} px on the canvas of {canvas[1]} x {canvas[0]} px"
    names = [*REASONS, f"{too_small} (model.img_size)"]
    codes, no_outline = told.reasons[mine].long(), told.no_outline[mine].long()
    codes[(codes <= LEARNED) & small] = len(REASONS)
    lacking = (codes <= LEARNED) & (no_outline > 0)
    outlines = int((codes <= LEARNED).sum() - lacking.sum())
    left_out = part.left_out.copy()

    def leave_out(what: str, kinds: Tensor, chosen: Tensor, names: Sequence[str]) -> None:
        for kind in kinds[chosen].unique().tolist():
            each = mine[chosen & (kinds == kind)]
            left_out.append(LeftOut(what, names[kind], len(each), part.describe(int(each[0]))))

    leave_out("objects", codes, codes > LEARNED, names)
    if masks:
        leave_out("objects", no_outline, lacking, OUTLINES)
    elif outlines or bool((no_outline[lacking] > 1).any()):  # else nobody drew any
        leave_out("outlines", no_outline, lacking, OUTLINES)
    learned = (codes <= LEARNED) & ~(lacking & masks)
    images = len(files[learned].unique())
    counts = {"with objects": images, "objects": int(learned.sum()), "with outlines": outlines}
    counts["clipped to their image"] = int((learned & (codes == 1)).sum())
    return SplitSummary(
        len(part.places),
        {name: n for name, n in counts.items() if n or name == "objects"},
        torch.bincount(told.labels[mine[learned]], minlength=num_classes).tolist(),
        left_out,
    )


def _check_found(found: dict[str, AnnotatedPart], sources: Sources, parts: dict[str, Part]) -> None:
    source_of = {files.root: source for folders, source in sources for files in folders}
    for name, part in parts.items():
        source = source_of.get(part.files.root)
        whole = name == "train" or part.files.root != parts["train"].files.root
        if source is not None and whole and name not in found:
            said = repr(source.first) if source.first else "nothing"
            raise ValueError(
                f"{source.source} lists no image of {part.files.root!r}: it names {said}, the "
                f"folder holds {part.files.name(0)!r}"
            )
