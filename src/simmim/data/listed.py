"""What annotations say of the files of an index: found by their names, as arrays, and kept.

The json of 100,000 images takes a minute to read and 5 GB of memory; the arrays are opened at once,
and shared by all processes.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from simmim.data.annotations import (
    OUTLINES,
    REASONS,
    SHOWN,
    Found,
    Table,
    count_left_out,
    read_coco,
)
from simmim.data.index import FileIndex
from simmim.data.index_cache import Kept, digest_of, file_stamp, keep, lies_within
from simmim.data.summary import LeftOut


class Objects(NamedTuple):
    """The objects of one image.

    Attributes:
        boxes: Left, top, right and bottom edge in pixels, float32, (n, 4).
        labels: Classes from 0, int64, (n,).
        reasons: Why they are not learned, codes of REASONS, int8, (n,): those in the picture alone.
        area: In square pixels, float32, (n,).
        outlines: COCO's polygons or run lengths of each, or None.
    """

    boxes: Tensor
    labels: Tensor
    reasons: Tensor
    area: Tensor
    outlines: list[Any]


@dataclass(frozen=True)
class Annotations:
    """The objects of all files of an index, one image's behind the other's.

    Attributes:
        starts: Where each image's begin, and where the last one's end, int64, (files + 1,).
        boxes: As in `Objects`, but of all objects, like the next three.
        labels: Classes.
        reasons: Why they are not learned.
        area: Areas.
        numbers: Ids of the objects in their file, or their places there, int64.
        no_outline: Why they have no outline, codes of OUTLINES, int8.
        sizes: Height and width of each image; 0 where nobody says it, int64, (files, 2).
        outlines: json of each object's outline, one behind the other, uint8.
        outline_starts: Where each begins, and where the last one ends, int64.
    """

    starts: Tensor
    boxes: Tensor
    labels: Tensor
    reasons: Tensor
    area: Tensor
    numbers: Tensor
    no_outline: Tensor
    sizes: Tensor
    outlines: Tensor
    outline_starts: Tensor

    def of(self, place: int) -> Objects:
        """The objects that are in the picture of a file."""
        start, end = self.starts[place : place + 2].tolist()
        mine = torch.arange(start, end)[self.reasons[start:end] <= SHOWN]
        outlines = [self._outline(i) for i in mine.tolist()]
        return Objects(
            self.boxes[mine], self.labels[mine], self.reasons[mine], self.area[mine], outlines
        )

    def _outline(self, i: int) -> Any:
        start, end = self.outline_starts[i : i + 2].tolist()
        return json.loads(self.outlines[start:end].numpy().tobytes()) if end > start else None


class Classes(NamedTuple):
    """Names of the classes, and COCO's number of each."""

    names: list[str]
    numbers: list[int]


@dataclass(frozen=True)
class Listed:
    """What one source of annotations says of the files of some indexes.

    Attributes:
        source: The file or folder.
        classes: Those that it names.
        first: Path of the first image, as the source says it; "" where it lists none.
        left_out: What it says that belongs to no file.
        ids: Of the image of each file of each index, in the source; None where it lists none.
        annotations: Of all files of each index.
        listed: Whether the source lists each file of each index, bool.
    """

    source: str
    classes: Classes
    first: str
    left_out: list[LeftOut]
    ids: list[list[Any]]
    annotations: list[Annotations]
    listed: list[Tensor]


def read_listed(path: str, indexes: Sequence[FileIndex]) -> Listed:
    """Read a COCO file; what it says is kept until the file, or the names of the images, change.

    Raises:
        ValueError: If it is no such file.
    """
    stamp = file_stamp(path)
    make = partial(_tensors, path, indexes)
    if stamp is None:
        return _listed(path, *make())
    folders = [(_name(files), digest_of(files)) for files in indexes]
    lengths = [len(files) for files in indexes]
    key, fits = (stamp, *folders), partial(_fits, lengths)
    return _listed(path, *keep("boxes", sum(lengths), key, make, fits))


def listed_in(table: Table, indexes: Sequence[FileIndex]) -> Listed:
    """Find the files of indexes in a table."""
    matched = _match(table, indexes)
    return Listed(
        table.source,
        Classes(table.classes, table.numbers),
        table.names[0] if table.names else "",
        table.left_out + _missing(table, matched),
        [[table.ids[row] if row >= 0 else None for row in rows.tolist()] for rows in matched],
        [_arrays(table, rows) for rows in matched],
        [torch.from_numpy(rows >= 0) for rows in matched],
    )


# Keeping -----------------------------------------------------------------------------------------


def _tensors(path: str, indexes: Sequence[FileIndex]) -> Kept:
    found = listed_in(read_coco(path), indexes)
    tensors = {f"{i}.listed": listed for i, listed in enumerate(found.listed)}
    for i, annotations in enumerate(found.annotations):
        tensors |= {f"{i}.{f.name}": getattr(annotations, f.name) for f in fields(Annotations)}
    plain = (found.classes, found.first, [astuple(one) for one in found.left_out], found.ids)
    return tensors, {"plain": json.dumps(plain)}


def _listed(path: str, tensors: dict[str, Tensor], notes: dict[str, str]) -> Listed:
    (names, numbers), first, left_out, ids = json.loads(notes["plain"])
    told = [LeftOut(*one) for one in left_out]
    parts = range(sum(name.endswith(".listed") for name in tensors))
    annotations = [
        Annotations(**{f.name: tensors[f"{i}.{f.name}"] for f in fields(Annotations)})
        for i in parts
    ]
    listed = [tensors[f"{i}.listed"] for i in parts]
    return Listed(path, Classes(names, numbers), first, told, ids, annotations, listed)


def _fits(lengths: Sequence[int], tensors: dict[str, Tensor], notes: dict[str, str]) -> bool:
    """Whether the arrays fit together: what is read there must not go astray."""
    found = _listed("", tensors, notes)
    if [len(listed) for listed in found.listed] != list(lengths):
        return False
    for n, a in zip(lengths, found.annotations, strict=True):
        count = len(a.boxes)
        each = (a.labels, a.reasons, a.area, a.numbers, a.no_outline, a.outline_starts[1:])
        alike = {len(tensor) for tensor in each} == {count}
        if not alike or len(a.starts) != n + 1 or a.sizes.shape != (n, 2):
            return False
        for starts, total in ((a.starts, count), (a.outline_starts, len(a.outlines))):
            if int(starts[0]) != 0 or int(starts[-1]) != total or bool((starts.diff() < 0).any()):
                return False
        limits = (max(len(found.classes.names), 1), len(REASONS), len(OUTLINES))
        if not all(map(lies_within, (a.labels, a.reasons, a.no_outline), limits)):
            return False
    return True


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
        folder = _name(files)
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


def _name(files: FileIndex) -> str:
    return os.path.basename(os.path.normpath(files.root))


def _arrays(table: Table, rows: npt.NDArray[np.int64]) -> Annotations:
    """Put the objects of an index's files into arrays."""
    objects: list[list[Found]] = [table.objects[row] if row >= 0 else [] for row in rows.tolist()]
    sizes = [(table.sizes[row] if row >= 0 else None) or (0, 0) for row in rows.tolist()]
    found = [one for group in objects for one in group]
    outlines = [b"" if one.outline is None else _dump(one.outline) for one in found]
    return Annotations(
        starts=_starts([len(group) for group in objects]),
        boxes=torch.tensor([one.box for one in found], dtype=torch.float32).view(-1, 4),
        labels=torch.tensor([one.label for one in found], dtype=torch.int64),
        reasons=torch.tensor([REASONS.index(one.reason) for one in found], dtype=torch.int8),
        area=torch.tensor([one.area for one in found], dtype=torch.float32),
        numbers=torch.tensor([one.number for one in found], dtype=torch.int64),
        no_outline=torch.tensor([OUTLINES.index(one.no_outline) for one in found]).to(torch.int8),
        sizes=torch.tensor(sizes, dtype=torch.int64).view(-1, 2),
        outlines=torch.from_numpy(np.frombuffer(bytearray(b"".join(outlines)), np.uint8)),
        outline_starts=_starts([len(outline) for outline in outlines]),
    )


def _dump(outline: Any) -> bytes:
    return json.dumps(outline).encode()


def _starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def _missing(table: Table, matched: Sequence[npt.NDArray[np.int64]]) -> list[LeftOut]:
    """The images that are listed, but not on the disk."""
    listed = {row for rows in matched for row in rows.tolist()}
    missing: list[object] = [name for row, name in enumerate(table.names) if row not in listed]
    reason = f"listed in {table.source}, but not on the disk"
    return count_left_out("images", {reason: missing} if missing else {})
