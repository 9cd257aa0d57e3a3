"""Which images of a folder have annotations, and what these say: arrays that workers share."""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from simmim.data.annotations import Found, Table, read_coco, read_voc
from simmim.data.index import FileIndex, check_folder
from simmim.data.layout import Part, read_folder, read_parts
from simmim.data.split import validation_mask

JSON = ("annotations.json", "_annotations.coco.json")  # beside the images: ours, Roboflow's
XML_FOLDERS = ("annotations_voc", "annotations", "xml", "xmls")
IMAGE_FOLDERS = ("images", "jpegimages", "imgs")
WHERE = (
    "put an annotations.json (COCO) or xml files (Pascal VOC) beside the images, or give "
    "data.annotations FILE"
)


class Objects(NamedTuple):
    """The objects of one image.

    Attributes:
        boxes: Left, top, right and bottom edge in pixels, float32, (n, 4).
        labels: Classes from 0, int64, (n,).
        ignored: Whether they count neither for nor against a detector, bool, (n,).
        area: In square pixels, float32, (n,).
        outlines: COCO's polygons or run lengths of each, or None.
    """

    boxes: Tensor
    labels: Tensor
    ignored: Tensor
    area: Tensor
    outlines: list[Any]


@dataclass(frozen=True)
class Annotations:
    """The objects of all files of an index, one image's behind the other's.

    Attributes:
        starts: Where each image's begin, and where the last one's end, int64, (files + 1,).
        boxes: As in `Objects`, like the next three.
        labels: Classes.
        ignored: Crowds and difficult objects.
        area: Areas.
        sizes: Height and width of each image; 0 where nobody says it, int64, (files, 2).
        outlines: json of each object's outline, one behind the other, uint8.
        outline_starts: Where each begins, and where the last one ends, int64.
    """

    starts: Tensor
    boxes: Tensor
    labels: Tensor
    ignored: Tensor
    area: Tensor
    sizes: Tensor
    outlines: Tensor
    outline_starts: Tensor

    def of(self, place: int) -> Objects:
        """The objects of a file."""
        start, end = self.starts[place : place + 2].tolist()
        outlines = [self._outline(i) for i in range(start, end)]
        mine = slice(start, end)
        return Objects(
            self.boxes[mine], self.labels[mine], self.ignored[mine], self.area[mine], outlines
        )

    def _outline(self, i: int) -> Any:
        start, end = self.outline_starts[i : i + 2].tolist()
        return json.loads(self.outlines[start:end].numpy().tobytes()) if end > start else None


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


class Classes(NamedTuple):
    """Names of the classes, and COCO's number of each."""

    names: list[str]
    numbers: list[int]


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
    indexes = {part.files.root: part.files for part in parts.values()}
    tables = _read_tables(root, annotations, indexes, parts["train"].files.root)
    classes = _unite(tables.values())
    found = {}
    for table in {id(table): table for table in tables.values()}.values():
        folders = [folder for folder in indexes if tables.get(folder) is table]
        matched = _match(table, [indexes[folder] for folder in folders])
        _tell(table, [indexes[folder] for folder in folders], matched)
        for folder, rows in zip(folders, matched, strict=True):
            arrays = _arrays(table, rows, classes)
            for name, part in parts.items():
                if part.files.root != folder:
                    continue
                places = np.arange(len(rows)) if part.places is None else part.places
                kept = places[rows[places] >= 0]
                if len(kept):
                    found[name] = AnnotatedPart(part.files, kept, arrays, table.has_outlines)
    _check_found(found, tables, parts)
    return found, classes


# Finding -----------------------------------------------------------------------------------------


def _read_parts(
    root: str, val_fraction: float, split_seed: int, group_pattern: str | None
) -> dict[str, Part]:
    """As every task's; COCO's own folders are called train2017 and val2017."""
    years = {e.name: e.path for e in os.scandir(root) if re.fullmatch(r"(train|val)\d{4}", e.name)}
    trains = sorted(name for name in years if name.startswith("train"))
    if not trains:
        return read_parts(root, val_fraction, split_seed, group_pattern)
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


def _read_tables(
    root: str, annotations: str | None, indexes: dict[str, FileIndex], train: str
) -> dict[str, Table]:
    """Read the annotations of each folder; a test/ may have none."""
    if annotations is not None:
        return dict.fromkeys(indexes, _read_given(annotations, indexes.values()))
    tables = {}
    for folder, files in indexes.items():
        if (table := _find_table(root, files)) is not None:
            tables[folder] = table
        elif folder != train and os.path.basename(folder).lower() == "test":
            rank_zero_info(f"{folder} has no annotations: nothing to test on")
        else:
            raise ValueError(f"{folder!r} has images, but no annotations: {WHERE}")
    return tables


def _read_given(annotations: str, indexes: Iterable[FileIndex]) -> Table:
    """Read what data.annotations names."""
    path = os.path.expanduser(annotations)
    if not os.path.isdir(path):
        return read_coco(path)
    xml = _find_xml([path])
    files = {}
    for index in indexes:
        names = index.all_names()
        files.update({name: xml[_stem(name)] for name in names if _stem(name) in xml})
    return read_voc(path, files)


def _find_table(root: str, files: FileIndex) -> Table | None:
    """Find the annotations of a part: COCO's, VOC's, or else the only json in its folder."""
    folder, name = files.root, os.path.basename(os.path.normpath(files.root))
    candidates = [os.path.join(folder, file) for file in JSON]
    for file in (f"instances_{name}.json", f"{name}.json"):
        candidates += [os.path.join(root, file), os.path.join(root, "annotations", file)]
    for path in candidates:
        if os.path.isfile(path):
            return read_coco(path)
    above = [entry.path for entry in os.scandir(root) if entry.name.lower() in XML_FOLDERS]
    for folders in ([folder], above):
        xml = _find_xml(folders)
        matched = {}
        for image in files.all_names():
            stems = (_stem(image), f"{name}/{_stem(image)}")
            if stem := next((stem for stem in stems if stem in xml), None):
                matched[image] = xml[stem]
        if matched:
            return read_voc(folder, matched)
    beside = [file for file in os.listdir(folder) if file.lower().endswith(".json")]
    return read_coco(os.path.join(folder, beside[0])) if len(beside) == 1 else None


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


# Matching ----------------------------------------------------------------------------------------


def _match(table: Table, indexes: Sequence[FileIndex]) -> list[npt.NDArray[np.int64]]:
    """Which row of a table each file of each index is; -1: none."""
    find = file_finder(indexes)
    matched = [np.full(len(files), -1, np.int64) for files in indexes]
    for row, name in enumerate(table.names):
        if (place := find(name)) is not None:
            matched[place[0]][place[1]] = row
    return matched


def file_finder(indexes: Sequence[FileIndex]) -> Callable[[str], tuple[int, int] | None]:
    """How to find a file by what annotations call it: by its path below a folder, or by less.

    Folders that it does not lie in are left out from the front (another machine's), and images/
    is put before it. The bare name does where it is the only such file.

    Returns:
        A function of the name that gives the number of the index and the place in it, or None.
    """
    exact: dict[str, tuple[int, int] | None] = {}
    bare: dict[str, tuple[int, int] | None] = {}
    for number, files in enumerate(indexes):
        folder = os.path.basename(os.path.normpath(files.root))
        for i in range(len(files)):
            name, place = files.name(i), (number, i)
            for known, key in (
                (exact, f"{folder}/{name}"),
                (exact, name),
                (bare, name.rpartition("/")[2]),
            ):
                known[key] = place if known.get(key, place) == place else None

    def find(name: str) -> tuple[int, int] | None:
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        for i in range(len(parts)):
            tail = "/".join(parts[i:])
            for path in (tail, f"images/{tail}"):
                if path in exact:
                    return exact[path]
        return bare.get(parts[-1]) if parts else None

    return find


def _unite(tables: Iterable[Table]) -> Classes:
    """The classes of all parts, in the order of the first that names them."""
    numbers: dict[str, int] = {}
    for table in tables:
        for name, number in zip(table.classes, table.numbers, strict=True):
            numbers.setdefault(name, number)
    return Classes(list(numbers), list(numbers.values()))


def _arrays(table: Table, rows: npt.NDArray[np.int64], classes: Classes) -> Annotations:
    """Put the objects of an index's files into arrays, with the labels of the whole."""
    number = [classes.names.index(name) for name in table.classes]
    objects: list[list[Found]] = [table.objects[row] if row >= 0 else [] for row in rows.tolist()]
    sizes = [(table.sizes[row] if row >= 0 else None) or (0, 0) for row in rows.tolist()]
    found = [one for group in objects for one in group]
    outlines = [b"" if one.outline is None else _dump(one.outline) for one in found]
    return Annotations(
        starts=_starts([len(group) for group in objects]),
        boxes=torch.tensor([one.box for one in found], dtype=torch.float32).view(-1, 4),
        labels=torch.tensor([number[one.label] for one in found], dtype=torch.int64),
        ignored=torch.tensor([one.ignored for one in found], dtype=torch.bool),
        area=torch.tensor([one.area for one in found], dtype=torch.float32),
        sizes=torch.tensor(sizes, dtype=torch.int64).view(-1, 2),
        outlines=torch.tensor(bytearray(b"".join(outlines)), dtype=torch.uint8),
        outline_starts=_starts([len(outline) for outline in outlines]),
    )


def _dump(outline: Any) -> bytes:
    return json.dumps(outline).encode()


def _starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


# What is said ------------------------------------------------------------------------------------


def _tell(
    table: Table, indexes: Sequence[FileIndex], matched: Sequence[npt.NDArray[np.int64]]
) -> None:
    """Say which images and objects are not used, and why."""
    for files, rows in zip(indexes, matched, strict=True):
        unlisted = np.flatnonzero(rows < 0)
        if len(unlisted):
            rank_zero_info(
                f"{len(unlisted)} of {len(files)} images in {files.root} are not in "
                f"{table.source}, and so not used (first: {files.name(int(unlisted[0]))})"
            )
    listed = {row for rows in matched for row in rows.tolist()}
    missing = [name for row, name in enumerate(table.names) if row not in listed]
    if missing:
        kind = f"of {len(table.names)} listed images are not on the disk and were left out"
        table.faults.add(kind, missing[0], len(missing))
    table.faults.tell(table.source)


def _check_found(
    found: dict[str, AnnotatedPart], tables: dict[str, Table], parts: dict[str, Part]
) -> None:
    for name, part in parts.items():
        table = tables.get(part.files.root)
        whole = name == "train" or part.files.root != parts["train"].files.root
        if table is not None and whole and name not in found:
            said = repr(table.names[0]) if table.names else "nothing"
            raise ValueError(
                f"{table.source} lists no image of {part.files.root!r}: it names {said}, the "
                f"folder holds {part.files.name(0)!r}"
            )
