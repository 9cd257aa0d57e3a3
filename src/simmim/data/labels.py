"""Labels in a table: a CSV file of paths and names -> arrays, kept like the index of the folder."""

import csv
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from simmim.base.progress import Bar
from simmim.data.index import FileIndex
from simmim.data.index_cache import Kept, digest_of, file_stamp, keep, lies_within

MARKS = {"0": False, "1": True, "0.0": False, "1.0": True, "": False}
DISTINCT = 2**16  # what so many rows say of labels is worked out once

Cells = tuple[str, ...]


@dataclass(frozen=True)
class LabelTable:
    """What a table says, one row behind the other.

    Attributes:
        source: The file.
        classes: Names of the labels.
        starts: Where the labels of each row begin, and where the last one's end, int64, (n + 1,).
        numbers: The labels of all rows, int64; where each row has one, that of each row.
    """

    source: str
    classes: list[str]
    starts: Tensor
    numbers: Tensor

    @property
    def counts(self) -> Tensor:
        """How many labels each row has, int64, (n,)."""
        return self.starts.diff()

    def presence(self, row: int) -> Tensor:
        """Whether a row has each label, uint8, (K,)."""
        start, end = self.starts[row : row + 2].tolist()
        present = torch.zeros(len(self.classes), dtype=torch.uint8)
        present[self.numbers[start:end]] = 1
        return present

    def frequencies(self, rows: Tensor) -> list[int]:
        """How many of some rows, int64, have each label."""
        chosen = torch.zeros(len(self.starts) - 1, dtype=torch.bool)
        chosen[rows] = True
        numbers = self.numbers[chosen.repeat_interleave(self.counts)]
        return [int(n) for n in torch.bincount(numbers, minlength=len(self.classes))]


@dataclass(frozen=True)
class NamedTable:
    """A table with the row of each path: text, to be let go before workers begin.

    Attributes:
        table: The labels.
        rows: Path of an image -> its row.
    """

    table: LabelTable
    rows: dict[str, int]

    def find(self, files: FileIndex, root: str) -> Tensor:
        """Find the row of each file by its path below the root, or below train/, ...; -1: none."""
        prefix, rows = _prefix(files, root), self.rows
        found = (rows.get(prefix + name, rows.get(name, -1)) for name in files.all_names())
        return torch.from_numpy(np.fromiter(found, np.int64, len(files)))


def label_files(
    path: str, folders: Sequence[FileIndex], root: str, *, several: bool
) -> list[tuple[LabelTable, Tensor]]:
    """Label the files of indexes; from the cache if neither they nor the table have changed.

    Args:
        path: CSV file, as `ClassificationData` describes it.
        folders: The indexes.
        root: The folder below which the paths of the table begin.
        several: Whether an image can have several labels, or none.

    Returns:
        For each index the table, and the row of each file, int64, (n,); -1 where it has none.

    Raises:
        ValueError: If it is not such a table.
    """
    read = lru_cache(1)(partial(read_labels, path, several=several))
    stamp = file_stamp(path)
    found = []
    for files in folders:
        make = partial(_tensors, read, files, root)
        if stamp is None:
            tensors, notes = make()
        else:
            key = (stamp, several, _prefix(files, root), digest_of(files))
            tensors, notes = keep("labels", len(files), key, make, partial(_fits, len(files)))
        table = LabelTable(
            path, json.loads(notes["classes"]), tensors["starts"], tensors["numbers"]
        )
        found.append((table, tensors["rows"]))
    return found


def _prefix(files: FileIndex, root: str) -> str:
    """What the paths of an index lack of those below the root: "", or train/."""
    part = os.path.relpath(files.root, root).replace(os.sep, "/")
    return "" if part == "." else f"{part}/"


def _tensors(read: Callable[[], NamedTable], files: FileIndex, root: str) -> Kept:
    named = read()
    table = named.table
    tensors = {"starts": table.starts, "numbers": table.numbers, "rows": named.find(files, root)}
    return tensors, {"classes": json.dumps(table.classes)}


def _fits(n: int, tensors: dict[str, Tensor], notes: dict[str, str]) -> bool:
    starts, numbers, rows = tensors["starts"], tensors["numbers"], tensors["rows"]
    fits = len(rows) == n and len(starts) > 1 and lies_within(rows, len(starts) - 1, least=-1)
    fits = fits and int(starts[0]) == 0 and int(starts[-1]) == len(numbers)
    fits = fits and bool((starts.diff() >= 0).all())
    return fits and lies_within(numbers, len(json.loads(notes["classes"])))


def read_labels(path: str, *, several: bool) -> NamedTable:
    """Read a table of paths and labels.

    Args:
        path: CSV file, as `ClassificationData` describes it.
        several: Whether an image can have several labels, or none.

    Raises:
        ValueError: If it is not such a table.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return _read(path, (line for line in csv.reader(file) if line), several)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data.labels {path} cannot be read: {error}") from error


def _read(path: str, lines: Iterator[list[str]], several: bool) -> NamedTable:
    header = next(lines, None)
    if header is None:
        raise ValueError(f"data.labels {path} is empty: give a header, and rows of paths")
    needs = f"data.labels {path} needs a header, and rows of a path and labels"
    if len(header) < 2:
        raise ValueError(needs)
    number: dict[str, int] = {}
    understand = lru_cache(DISTINCT)(_marked if len(header) > 2 else partial(_named, number))
    rows: dict[str, int] = {}
    repeated: dict[str, int] = {}
    starts, numbers = array("q", [0]), array("q")
    for line in Bar(lines, desc="Labels", unit=" rows", unit_scale=True, leave=False, delay=2):
        name = line[0].replace("\\", "/").removeprefix("./")
        labels = _labels(path, line, len(header), understand)
        if not several and len(labels) != 1:
            raise ValueError(
                f"data.labels {path}: {line[0]} has {len(labels)} labels, not one: "
                "correct it, or use --model.multi_label true"
            )
        (repeated if name in rows else rows)[name] = len(starts) - 1
        numbers.extend(labels)
        starts.append(len(numbers))
    if not rows:
        raise ValueError(needs)
    if repeated:
        raise ValueError(
            f"data.labels {path} has {len(repeated)} images in several rows, such as "
            f"{next(iter(repeated))}: give each one row, with all its labels"
        )
    classes, found = header[1:], np.array(numbers, np.int64)
    if len(header) == 2:  # numbered as they came
        classes = sorted(number)
        place = {name: i for i, name in enumerate(classes)}
        found = np.array([place[name] for name in number], np.int64)[found]
    table = LabelTable(path, classes, torch.from_numpy(np.array(starts)), torch.from_numpy(found))
    return NamedTable(table, rows)


def _labels(
    path: str, line: list[str], columns: int, understand: Callable[[Cells], tuple[int, ...]]
) -> tuple[int, ...]:
    """The labels of a row."""
    if len(line) != columns:
        raise ValueError(f"data.labels {path}: the row {line} has not {columns} columns")
    try:
        return understand(tuple(line[1:]))
    except KeyError as error:
        raise ValueError(
            f"data.labels {path}: {line[0]} has {error} where 0 or 1 is expected"
        ) from error


def _named(number: dict[str, int], cells: Cells) -> tuple[int, ...]:
    """Number the names in a cell; names that are new are counted on."""
    names = [name.strip() for cell in cells for name in cell.replace("|", ";").split(";")]
    return tuple(number.setdefault(name, len(number)) for name in dict.fromkeys(names) if name)


def _marked(cells: Cells) -> tuple[int, ...]:
    """The numbers of the columns that say 1."""
    return tuple(i for i, cell in enumerate(cells) if MARKS[cell.strip()])
