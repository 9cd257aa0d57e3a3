"""Which images of a folder have annotations, and what these say: arrays that workers share."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info

from simmim.data.annotations import read_voc
from simmim.data.index import FileIndex, check_folder
from simmim.data.layout import Part, read_folder, read_parts
from simmim.data.listed import Annotations, Classes, Listed, listed_in, read_listed
from simmim.data.split import validation_mask

Sources = list[tuple[Sequence[FileIndex], Listed]]  # and the folders that each is about
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
        has_outlines: Whether every object that counts has an outline.
    """

    files: FileIndex
    places: npt.NDArray[np.int64]
    annotations: Annotations
    has_outlines: bool


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
    parts = _read_parts(root, val_fraction, split_seed, group_pattern)
    indexes = list({part.files.root: part.files for part in parts.values()}.values())
    sources = _read_sources(root, annotations, indexes, parts["train"].files.root)
    classes = _unite([source for _, source in sources])
    found = {}
    for folders, source in sources:
        for sentence in source.said:
            rank_zero_info(sentence)
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
                kept = places[listed.numpy()[places]]
                if len(kept):
                    found[name] = AnnotatedPart(part.files, kept, objects, source.has_outlines)
    _check_found(found, sources, parts)
    return found, classes


# Finding -----------------------------------------------------------------------------------------


def _read_parts(
    root: str, val_fraction: float, split_seed: int, group_pattern: str | None
) -> dict[str, Part]:
    """As every task's; COCO's own folders are called train2017 and val2017."""
    years = {e.name: e.path for e in os.scandir(root) if re.fullmatch(r"(train|val)\d{4}", e.name)}
    trains = sorted(name for name in years if name.startswith("train"))
    if not trains:
        return read_parts(root, val_fraction, split_seed, group_pattern, masks_apart=False)
    train = Part(read_folder(years[trains[0]]))
    val = years.get(trains[0].replace("train", "val"))
    if val is not None:
        return {"train": train, "val": Part(read_folder(val))}
    mask = validation_mask(
        train.files.all_names(),
        np.zeros(len(train.files), np.int64),
        val_fraction,
        split_seed,
        group_pattern,
    )
    parts = {"train": Part(train.files, np.flatnonzero(~mask))}
    return {**parts, "val": Part(train.files, np.flatnonzero(mask))} if mask.any() else parts


def _read_sources(
    root: str, annotations: str | None, indexes: Sequence[FileIndex], train: str
) -> Sources:
    """Read the annotations of each folder; a test/ may have none."""
    if annotations is not None:
        return [(indexes, _read_given(annotations, indexes))]
    sources: Sources = []
    for files in indexes:
        if (source := _find_source(root, files)) is not None:
            sources.append(([files], source))
        elif files.root != train and os.path.basename(files.root).lower() == "test":
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


def _find_source(root: str, files: FileIndex) -> Listed | None:
    """Find the annotations of a part: COCO's, VOC's, or else the only json in its folder."""
    folder, name = files.root, os.path.basename(os.path.normpath(files.root))
    candidates = [os.path.join(folder, file) for file in JSON]
    for file in (f"instances_{name}.json", f"{name}.json"):
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
