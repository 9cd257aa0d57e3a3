"""Images that show the same, by difference hashes and miniatures."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from simmim.doctor.record import Content

NEAR = 7  # of 128 bits that may differ
BANDS = 8  # of 16 bits: where 7 bits differ, one band at least is equal
CORRELATION = 0.99  # of the miniatures
CROWD = 4096  # hashes with a band in common; more of them only say that the band is common


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
    for i, j in _candidates(unique):
        _join_if_alike(parent, small, int(first[i]), int(first[j]))
    groups: dict[int, list[int]] = defaultdict(list)
    for place in range(len(contents)):
        groups[_root(parent, place)].append(place)
    return [group for group in groups.values() if len(group) > 1]


def _candidates(hashes: npt.NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Pairs of different hashes, (n, 16), that differ in few bits."""
    words = np.ascontiguousarray(hashes).view(np.uint64)
    bands = np.ascontiguousarray(hashes).view(np.uint16)
    for band in range(BANDS):
        order = np.argsort(bands[:, band], kind="stable")
        edges = np.flatnonzero(np.diff(bands[order, band])) + 1
        for crowd in np.split(order, edges):
            if not 1 < len(crowd) <= CROWD:
                continue
            for at, i in enumerate(crowd[:-1]):
                others = crowd[at + 1 :]
                distance = np.bitwise_count(words[others] ^ words[i]).sum(1)
                for j in others[distance <= NEAR]:
                    yield int(i), int(j)


def _join_if_alike(
    parent: list[int], small: Sequence[npt.NDArray[np.uint8]], a: int, b: int
) -> None:
    one, other = _root(parent, a), _root(parent, b)
    if one != other and correlation(small[a], small[b]) >= CORRELATION:
        parent[max(one, other)] = min(one, other)


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
