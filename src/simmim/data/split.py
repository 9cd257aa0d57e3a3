"""The one split of all tasks: which images of a folder without a val/ validate."""

import re
import unicodedata
from collections.abc import Iterable
from fractions import Fraction
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from simmim.base.progress import Bar


def validation_mask(
    names: Iterable[str],
    labels: npt.NDArray[np.int64],
    val_fraction: float,
    split_seed: int = 0,
    group_pattern: str | None = None,
) -> npt.NDArray[np.bool_]:
    """Choose the images that validate, by nothing but their names.

    The files of each class are put in the order of a hash of their relative path and the seed, and
    the first `val_fraction` of them validate; never a whole class, and at least one image of all.
    So the split is the same on every machine, wherever the folder lies, and images that are added
    leave nearly all others where they were.

    Args:
        names: Relative paths, with "/" between folders.
        labels: The class of each; zeros where there are no classes.
        val_fraction: Share that validates, from 0 up to, but not including, 1.
        split_seed: Another seed, another split.
        group_pattern: Regular expression, searched in the relative path; its first group names
            the patient or the scene, whose images all go to one side. Shares are then as near as
            whole groups allow.

    Returns:
        True where an image validates, (n,).

    Raises:
        ValueError: If the pattern does not match a name.
    """
    n = len(labels)
    names = Bar(names, "Splitting", n, leave=False, delay=2, unit=" images", unit_scale=True)
    if group_pattern is not None:
        number: dict[str, int] = {}  # of each group, as they come
        numbers = (number.setdefault(group_of(name, group_pattern), len(number)) for name in names)
        group_of_file = np.fromiter(numbers, np.int64, n)
        if not val_fraction or n < 2:
            return np.zeros(n, dtype=bool)
        return _split_groups(list(number), group_of_file, labels, val_fraction, split_seed)
    if not val_fraction or n < 2:
        return np.zeros(n, dtype=bool)
    keys = np.fromiter((_hash(name, split_seed) for name in names), np.uint64, n)
    return _split_files(keys, labels, val_fraction)


def group_of(name: str, group_pattern: str) -> str:
    """Find the patient or scene that an image belongs to.

    Raises:
        ValueError: If the pattern does not match: then nobody knows on which side it belongs.
    """
    match = re.search(group_pattern, name)
    if match is None or match[1] is None:
        raise ValueError(
            f"data.group_pattern {group_pattern!r} does not match {name!r}: "
            "its first group must name the patient or scene of every image"
        )
    return match[1]


def check_group_pattern(group_pattern: str | None) -> None:
    """Refuse what is no regular expression, or has no group.

    Raises:
        ValueError: With the reason.
    """
    try:
        groups = re.compile(group_pattern or "()").groups
    except re.error as error:
        raise ValueError(
            f"data.group_pattern {group_pattern!r} is no regular expression: {error}"
        ) from error
    if not groups:
        raise ValueError(
            f"data.group_pattern {group_pattern!r} has no group: "
            r"put what names the patient in brackets, as in '(patient\d+)_'"
        )


def _hash(name: str, seed: int) -> int:
    # macOS may decompose accents in names; composed, a name is the same everywhere.
    plain = name if name.isascii() else unicodedata.normalize("NFC", name)
    data = plain.encode("utf-8", "surrogateescape")
    digest = blake2b(data, digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little")


def _shares(sizes: npt.NDArray[np.int64], val_fraction: float) -> npt.NDArray[np.int64]:
    """Count the images that validate of each class: rounded such that the sum is right, too.

    Never a whole class. Of a thousand classes of four images, every second or third gives one.
    """
    share = Fraction(str(val_fraction))
    totals = [int(share * int(total) + Fraction(1, 2)) for total in np.cumsum(sizes)]
    return np.minimum(np.diff(totals, prepend=0), np.maximum(sizes - 1, 0))


def _split_files(
    keys: npt.NDArray[np.uint64], labels: npt.NDArray[np.int64], val_fraction: float
) -> npt.NDArray[np.bool_]:
    mask = np.zeros(len(keys), dtype=bool)
    order = np.lexsort((keys, labels))  # by class, then by hash
    sizes = np.bincount(labels)
    starts, shares = np.cumsum(sizes) - sizes, _shares(sizes, val_fraction)
    for start, share in zip(starts, shares, strict=True):
        mask[order[start : start + share]] = True
    if not mask.any():
        mask[np.argmin(keys)] = True
    return mask


def _split_groups(
    groups: list[str],
    group_of_file: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    val_fraction: float,
    seed: int,
) -> npt.NDArray[np.bool_]:
    """Class by class, take groups in the order of their hash while that brings the share nearer.

    The only group of a class trains, unless that is so of all classes: then each is a patient's
    folder, and no class.

    Args:
        groups: Their names.
        group_of_file: Which of them each file is of, (n,).
        labels: The class of each file, (n,).
        val_fraction: Share that validates.
        seed: Of the hash.
    """
    unique = sorted(groups)
    place = {group: i for i, group in enumerate(unique)}
    group_of_file = np.array([place[group] for group in groups], np.int64)[group_of_file]
    order = np.argsort([_hash(group, seed) for group in unique], kind="stable")
    rank = np.argsort(order)  # of each group in the order of the hash
    by_class = group_of_file[np.argsort(labels, kind="stable")]
    ends = np.cumsum(np.bincount(labels))
    classes = [
        np.unique(members, return_counts=True)
        for members in np.split(by_class, ends[:-1])
        if len(members)
    ]
    if all(len(members) == 1 for members, _ in classes):
        classes = [np.unique(group_of_file, return_counts=True)]
    validates, decided = np.zeros((2, len(unique)), dtype=bool)
    for members, _ in classes:
        decided[members] = len(members) == 1
    target = have = 0.0
    for members, counts in classes:
        target += val_fraction * counts.sum()
        have += counts[validates[members]].sum()
        free = [i for i in np.argsort(rank[members]) if not decided[members[i]]]
        for i in free[: len(members) - 1 - validates[members].sum()]:  # one at least trains
            validates[members[i]] = have + counts[i] / 2 <= target
            have += counts[i] * validates[members[i]]
        decided[members] = True
    if len(unique) > 1 and not validates.any():
        validates[order[0]] = True
    return validates[group_of_file]
