"""What users give, checked and brought to one form; a mistake is one sentence with the remedy."""

import os
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from math import inf

from simmim.data.index import check_folder
from simmim.data.remote import is_url, local_copy


def find_root(root: str | None, dataset: str | None, data_dir: str, names: Collection[str]) -> str:
    """Find the folder of images: what is given, its copy from a store, or a named data set's.

    Raises:
        ValueError: If there is neither, or the folder does not exist, or the name.
    """
    if root is not None:
        root = os.path.expanduser(os.fspath(root))
        if is_url(root):
            return local_copy(root, os.path.expanduser(data_dir))
        check_folder(root)
        return root
    if dataset is None:
        raise ValueError("no data: give data.root, a folder of images, or data.dataset digits")
    if dataset not in names:
        near = get_close_matches(dataset, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"data.dataset {dataset!r} is not known: {hint}choose from {', '.join(names)}, "
            "or give data.root, a folder of images"
        )
    return os.path.join(os.path.expanduser(data_dir), dataset)


def check_image_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Bring a size to (height, width).

    Raises:
        ValueError: If it is neither a number nor two.
    """
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"data.img_size {img_size} is neither a number nor [height, width]")
    return sides[0], sides[1]


def check_number(name: str, value: float, low: float, high: float = inf) -> None:
    """Refuse a number out of its range.

    Raises:
        ValueError: With the range.
    """
    if not low <= value <= high:
        limits = f"{low:g} or more" if high == inf else f"{low:g} to {high:g}"
        raise ValueError(f"data.{name} {value} is out of range: use {limits}")


def check_range(
    name: str, values: Sequence[float], low: float = -inf, high: float = inf
) -> tuple[float, float]:
    """Bring a range to (from, to).

    Raises:
        ValueError: If it is not two numbers in order, both from `low` to `high`.
    """
    if len(values) != 2 or not low <= values[0] <= values[1] <= high:
        limits = "" if low == -inf else f", at least {low:g}"
        limits += "" if high == inf else f", at most {high:g}"
        raise ValueError(f"data.{name} {list(values)} is no range: use [low, high]{limits}")
    return float(values[0]), float(values[1])


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a word that has no meaning.

    Raises:
        ValueError: With those that have.
    """
    if value not in choices:
        raise ValueError(f"data.{name} {value!r} is not known: use {' or '.join(choices)}")
