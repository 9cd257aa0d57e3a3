"""Images that show the same, by difference hashes and miniatures."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from simmim.commands.doctor.file_stats import Content

NEAR = 7  # of 128 bits that may differ
BANDS = 8  # of 16 bits: where 7 bits differ, one band at least is equal
CORRELATION = 0.99  # of the miniatures
CROWD = 4096  # hashes with a band in common; more of them are divided by further bytes


def clusters(contents: Sequence[Content]) -> list[list[int]]:
    """Find images that look alike.

    The hashes find candidates without comparing all with all; the miniatures, which know of
    brightness and not only of its direction, confirm them.

    Returns:
        Places of the images of each cluster of two and more, in order.
    """
    if not contents:
        return []
    hashes = np.array([np.frombuffer(c.likeness, np.uint8) for c in contents])
    unique, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    small = [np.frombuffer(c.miniature, np.uint8) for c in contents]
    parent = list(range(len(contents)))
    for place, i in enumerate(inverse.ravel().tolist()):
        _join_if_alike(parent, small, int(first[i]), place)
    words = np.ascontiguousarray(unique).view(np.uint64)
    root = np.array([_root(parent, place) for place in first.tolist()])  # of each hash
    for crowd in _crowds(unique):
        for at, i in enumerate(crowd[:-1]):
            others = crowd[at + 1 :]
            others = others[root[others] != root[i]]  # most images of a large cluster are joined
            distance = np.bitwise_count(words[others] ^ words[i]).sum(1)
            for j in others[distance <= NEAR]:
                a, b = int(root[i]), int(root[j])
                if a != b and _join_if_alike(parent, small, int(first[i]), int(first[j])):
                    root[root == max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = defaultdict(list)
    for place in range(len(contents)):
        groups[_root(parent, place)].append(place)
    return [group for group in groups.values() if len(group) > 1]


def _crowds(hashes: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.int64]]:
    """Places of hashes, (n, 16), such that any two that differ in few bits share a crowd."""
    bands = np.ascontiguousarray(hashes).view(np.uint16)
    for band in range(BANDS):
        free = [byte for byte in range(2 * BANDS) if byte // 2 != band]
        for crowd in _by_value(np.arange(len(hashes)), bands[:, band]):
            yield from _divided(hashes, crowd, free)


def _divided(
    hashes: npt.NDArray[np.uint8], crowd: npt.NDArray[np.int64], free: list[int]
) -> Iterator[npt.NDArray[np.int64]]:
    """Divide a large crowd by one more byte, in each of 8 ways, where that saves comparisons.

    Of any 8 bytes of two hashes that differ in 7 bits, one at least is equal.
    """
    if len(crowd) > CROWD and len(free) > NEAR:
        sizes = {byte: np.bincount(hashes[crowd, byte]).astype(float) for byte in free}
        costs = {byte: float(counts @ counts) for byte, counts in sizes.items()}
        chosen = sorted(free, key=costs.__getitem__)[: NEAR + 1]
        if 2 * sum(costs[byte] for byte in chosen) < len(crowd) ** 2:
            for byte in chosen:
                rest = [other for other in free if other != byte]
                for part in _by_value(crowd, hashes[:, byte]):
                    yield from _divided(hashes, part, rest)
            return
    yield crowd


def _by_value(
    places: npt.NDArray[np.int64], values: npt.NDArray[np.unsignedinteger[Any]]
) -> list[npt.NDArray[np.int64]]:
    """Group places by their values; those that are alone are left out."""
    order = places[np.argsort(values[places], kind="stable")]
    edges = np.flatnonzero(np.diff(values[order])) + 1
    return [group for group in np.split(order, edges) if len(group) > 1]


def _join_if_alike(
    parent: list[int], small: Sequence[npt.NDArray[np.uint8]], a: int, b: int
) -> bool:
    """Whether two images are alike, and now of one cluster."""
    one, other = _root(parent, a), _root(parent, b)
    if one != other and correlation(small[a], small[b]) >= CORRELATION:
        parent[max(one, other)] = min(one, other)
        return True
    return False


def correlation(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    """Correlation of two miniatures; of those without contrast only equal ones have one, of 1."""
    x, y = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else float(np.array_equal(a, b))


def _root(parent: list[int], place: int) -> int:
    while parent[place] != place:
        parent[place] = parent[parent[place]]
        place = parent[place]
    return place
