"""How often each value occurs in each mask: every mask is read once, and the counts are kept."""

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simmim.base.progress import Bar
from simmim.data.class_map import MOST, VOID, Legend, Totals, decode_values
from simmim.data.decode import UnreadableImage
from simmim.data.index import FileIndex
from simmim.data.index_cache import Kept, digest_of, file_stamp, keep

WORTH = 100  # masks; the counts of fewer are not kept
CHUNK = 1024  # masks whose counts are waited for at a time


@dataclass(frozen=True)
class ValueCounts:
    """The values of each mask of an index; an unreadable mask has none.

    Attributes:
        starts: Where the values of each mask begin, and where the last ones end, int64, (n + 1,).
        values: The values that occur in it; VOID for colours without a class, int64.
        pixels: How many pixels have each.
        blocks: How many squares of 2 x 2 pixels have nothing else.
    """

    starts: Tensor
    values: Tensor
    pixels: Tensor
    blocks: Tensor

    def totals(self, masks: Tensor) -> Totals:
        """Add up the counts of some masks, by value: its pixels and its blocks."""
        chosen = torch.zeros(len(self.starts) - 1, dtype=torch.bool)
        chosen[masks] = True
        kept = chosen.repeat_interleave(self.starts.diff())
        values, places = self.values[kept].unique(return_inverse=True)
        sums = [
            torch.zeros_like(values).index_add_(0, places, counts[kept]).tolist()
            for counts in (self.pixels, self.blocks)
        ]
        return dict(zip(values.tolist(), zip(*sums, strict=True), strict=True))

    def unreadable(self, masks: Tensor) -> list[int]:
        """Which of some masks could not be read."""
        return [int(mask) for mask in masks[self.starts.diff()[masks] == 0]]

    def first_with(self, value: int, masks: Tensor) -> int:
        """The first of some masks in which a value occurs."""
        places = (self.values == value).nonzero()[:, 0]
        having = torch.searchsorted(self.starts, places, right=True) - 1
        return int(masks[torch.isin(masks, having)][0])


def count_values(masks: FileIndex, legend: Legend | None) -> ValueCounts:
    """Count the values of all masks of an index, or open the counts of the same files.

    Args:
        masks: Which.
        legend: What the colours of colour images mean.

    Raises:
        WrongMask: If one is of a kind that cannot be a mask.
    """
    stamps = blake2b(digest_size=16)
    may_keep = True
    if len(masks) >= WORTH:
        paths = map(masks.path, range(len(masks)))
        for stamp in _map(file_stamp, list(paths), "Looking at masks"):
            may_keep &= stamp is not None
            stamps.update(repr(stamp).encode())
    colors = legend and (legend.colors, legend.void_colors, legend.values)
    key = (masks.root, digest_of(masks), stamps.hexdigest(), colors)
    make = partial(_count, masks, legend)
    n = len(masks)
    kept = keep("values", n, key, make, partial(_fits, n), WORTH)[0] if may_keep else make()[0]
    return ValueCounts(**kept)


def _fits(masks: int, kept: dict[str, Tensor], _: dict[str, str]) -> bool:
    same = {len(kept[name]) for name in ("values", "pixels", "blocks")} == {int(kept["starts"][-1])}
    return same and len(kept["starts"]) == masks + 1


def _count(masks: FileIndex, legend: Legend | None) -> Kept:
    paths = [masks.path(place) for place in range(len(masks))]
    count = partial(_count_mask, legend or Legend([], []))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes, which are checked
        rows = list(_map(count, paths, "Values of the masks"))
    columns = np.concatenate(rows, axis=1) if rows else np.zeros((3, 0), np.int64)
    starts = np.cumsum([0, *(row.shape[1] for row in rows)])
    named = dict(zip(("values", "pixels", "blocks"), columns, strict=True))
    named = {"starts": starts, **named}
    return {name: torch.tensor(np.ascontiguousarray(a)) for name, a in named.items()}, {}


def _count_mask(legend: Legend, path: str) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """The values of a mask, the pixels and the blocks of each, (3, n)."""
    try:
        mask = decode_values(path)
    except UnreadableImage:  # reported when its image's turn comes
        return np.zeros((3, 0), np.int64)
    if mask.ndim == 3:
        mask = np.array([*legend.values, MOST])[legend.of_colors(mask, path)]  # VOID is the last
    corner = mask[1:, 1:]
    equal = (corner == mask[:-1, 1:]) & (corner == mask[1:, :-1]) & (corner == mask[:-1, :-1])
    pixels = np.bincount(mask.ravel())
    blocks = np.bincount(corner[equal], minlength=len(pixels))
    values = np.flatnonzero(pixels)
    counted = np.stack([values, pixels[values], blocks[values]]).astype(np.int64)
    counted[0][counted[0] == MOST] = VOID
    return counted


def _map(function: Any, paths: Sequence[str], desc: str) -> Iterator[Any]:
    """Apply a function to files, several at a time: decoders leave Python's lock alone."""
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        Bar(total=len(paths), desc=desc, leave=False, delay=1.0) as bar,
    ):
        for start in range(0, len(paths), CHUNK):  # not all results at once
            for result in pool.map(function, paths[start : start + CHUNK]):
                bar.update()
                yield result
