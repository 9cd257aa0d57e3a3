"""What the pixels of a mask mean: its values or colours -> classes."""

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from simmim.bar import Bar
from simmim.data.decode import UnreadableImage
from simmim.data.scans import check_size

Color = tuple[int, int, int]
Values = npt.NDArray[np.integer[Any]]

FILE = "classes.json"
VOID = -1  # in batches: a pixel without a class
UNKNOWN = -2
ANY_VOID = 255  # in masks, where nobody says otherwise
MOST = 2**16  # values of a mask
FORMATS = ("PNG", "TIFF", "BMP", "GIF", "PPM")  # not JPEG, which changes values


class WrongMask(ValueError):
    """A mask that does not go with its image or its classes; the message says which and why."""

    def __init__(self, message: str) -> None:
        # A worker's error comes with its traceback before it: the sentence is all that is wanted.
        super().__init__(message.strip().rpartition("WrongMask: ")[2])


@dataclass(frozen=True)
class Legend:
    """The classes of masks.

    Attributes:
        classes: Their names.
        values: The value that each has in a mask.
        void: Values without a class.
        colors: The colour of each class, RGB; None: nobody has chosen any.
        void_colors: Colours without a class.
        source: Where it comes from, for the errors.
    """

    classes: list[str]
    values: list[int]
    void: tuple[int, ...] = (ANY_VOID,)
    colors: list[Color] | None = None
    void_colors: tuple[Color, ...] = ()
    source: str = FILE

    def read(self, path: str) -> Tensor:
        """Read a mask.

        Args:
            path: A gray image of 8 or 16 bits or one with a palette, whose values count; or a
                colour image, if the legend has colours.

        Returns:
            The class of each pixel, VOID where it has none, int16, (H, W).

        Raises:
            UnreadableImage: If the file is damaged.
            WrongMask: If a pixel is neither of a class nor void.
        """
        mask = read_values(path)
        if mask.ndim == 3:
            return torch.from_numpy(self._of_colors(mask, path))
        number = self._table[mask]
        if (number == UNKNOWN).any():
            raise WrongMask(
                f"{path!r} has the value {int(mask[number == UNKNOWN][0])}, which is neither one "
                f"of the {len(self.classes)} classes of {self.source} nor void: correct the mask, "
                f"name the class in {FILE}, or give data.void"
            )
        return torch.from_numpy(number)

    @cached_property
    def _table(self) -> npt.NDArray[np.int16]:
        """The class of each value."""
        table = np.full(MOST, UNKNOWN, np.int16)
        table[self.values] = np.arange(len(self.values))
        table[list(self.void)] = VOID
        return table

    def _of_colors(self, mask: Values, path: str) -> npt.NDArray[np.int16]:
        """Colours, (H, W, 3) -> classes, (H, W)."""
        if self.colors is None:
            raise WrongMask(
                f"{path!r} is a colour image, and a mask holds numbers of classes: convert it to a "
                f"gray PNG of them, or give the colours as palette_rgb in {FILE}"
            )
        codes = mask.astype(np.int64) @ CODE
        known = np.array([*self.colors, *self.void_colors]) @ CODE
        number = np.append(np.arange(len(self.colors)), [VOID] * len(self.void_colors))
        order = np.argsort(known)
        place = np.minimum(np.searchsorted(known[order], codes), len(known) - 1)
        found = np.where(known[order][place] == codes, number[order][place], UNKNOWN)
        if (found == UNKNOWN).any():
            color = tuple(int(c) for c in mask[found == UNKNOWN][0])
            raise WrongMask(
                f"{path!r} has the colour {color}, which is not in palette_rgb of {self.source}: "
                "correct the mask, or add it (after those of the classes: a colour of void)"
            )
        return found.astype(np.int16)


CODE = np.array([2**16, 2**8, 1])  # of a colour


def read_values(path: str) -> Values:
    """Read the pixels of a mask as they are stored, (H, W), or of a colour image, (H, W, 3).

    Raises:
        UnreadableImage: If the file is damaged, or no image.
        WrongMask: If it is of a kind that cannot be a mask.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which we check
            with Image.open(path, formats=FORMATS) as image:
                check_size(*image.size)
                if image.mode.startswith("F"):
                    raise WrongMask(f"{path!r} holds fractions, no numbers of classes")
                if image.mode in ("RGB", "RGBA", "CMYK", "YCbCr"):
                    return np.asarray(image.convert("RGB"))
                pixels = np.asarray(image)  # of a palette the numbers, not the colours
    except WrongMask:
        raise
    except Exception as error:  # decoders raise whatever they like
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UnreadableImage(f"{path!r} cannot be read: {reason}") from error
    pixels = pixels[..., 0] if pixels.ndim == 3 else pixels  # with alpha
    if pixels.dtype != np.uint8 and not 0 <= pixels.min() <= pixels.max() < MOST:
        raise WrongMask(f"{path!r} has values below 0 or above {MOST - 1}: number the classes")
    return pixels.astype(np.uint16) if pixels.dtype.itemsize > 1 else pixels.astype(np.uint8)


def read_legend(path: str, void: Sequence[int] | None = None) -> Legend:
    """Read a file of classes.

    Args:
        path: JSON: `{"classes": [names], "ignore_index": 255, "palette_rgb": [[r, g, b], ...],
            "values": [...]}`. Without `values` the classes are 0, 1, 2, ...; one whose number is
            the ignore_index is no class. Colours beyond those of the classes are void.
        void: Values without a class, instead of the file's.

    Raises:
        ValueError: If it is not such a file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            said = json.load(file)
        names = [str(name) for name in said["classes"]]
        values = [int(v) for v in said.get("values", range(len(names)))]
        colors = [_color(c) for c in said.get("palette_rgb") or ()]
        ignored = said.get("ignore_index", ANY_VOID)
        ignored = tuple(int(v) for v in (ignored if isinstance(ignored, list) else [ignored]))
    except OSError as error:
        raise ValueError(f"data.classes {path!r} cannot be read: {error.strerror}") from error
    except Exception as error:  # valid json can hold anything in any place
        raise ValueError(
            f'{path!r} is no file of classes such as {{"classes": ["road", "tree"], '
            f'"ignore_index": 255}}: {type(error).__name__} {error}'
        ) from error
    void = ignored if void is None else tuple(void)
    kept = [i for i, value in enumerate(values) if value not in void]
    if len(values) != len(names) or len({*values}) != len(values) or len(names) != len({*names}):
        raise ValueError(f"{path!r}: give each class one name and one value of its own")
    if not all(0 <= value < MOST for value in (*values, *void)):
        raise ValueError(f"{path!r}: a mask has values from 0 to {MOST - 1}, no others")
    if colors and len(colors) < len(names):
        raise ValueError(
            f"{path!r}: palette_rgb has {len(colors)} colours for {len(names)} classes"
        )
    if len(kept) < 2:
        raise ValueError(f"{path!r} leaves nothing to tell apart: it needs two classes beside void")
    dropped = [c for i, c in enumerate(colors) if i not in kept]
    return Legend(
        [names[i] for i in kept],
        [values[i] for i in kept],
        void,
        [colors[i] for i in kept] if colors else None,
        tuple(dropped),
        path,
    )


def find_legend(root: str, paths: Sequence[str], void: Sequence[int] | None = None) -> Legend:
    """Number the classes by the values that occur in masks: 0 to the greatest.

    Masks of nothing but 0 and 255, as many tools write them, have these two classes.

    Args:
        root: The folder, for the errors.
        paths: The masks.
        void: Values without a class; None: 255.

    Raises:
        ValueError: If there are not two classes.
    """
    counts = np.zeros(MOST, np.int64)
    masks = _map(_values_or_nothing, paths, "Classes of the masks")
    for path, mask in zip(paths, masks, strict=True):
        if mask.ndim == 3:
            Legend([], [])._of_colors(mask, path)
        counts += np.bincount(mask.ravel(), minlength=MOST)
    found = np.flatnonzero(counts).tolist()
    if void is None and found == [0, ANY_VOID]:
        return Legend(["0", str(ANY_VOID)], [0, ANY_VOID], (), source=root)
    ignored = (ANY_VOID,) if void is None else tuple(void)
    if void is None and found and max(found) > ANY_VOID:  # of 16 bits: a number like the others
        ignored = ()
    known = [value for value in found if value not in ignored]
    if len(known) < 2:
        raise ValueError(
            f"the masks of {root!r} hold {' and '.join(map(str, found)) or 'nothing'} alone, which "
            f"leaves nothing to tell apart: give {FILE} with the names and values of two classes"
        )
    values = [value for value in range(known[-1] + 1) if value not in ignored]
    missing = len(values) - len(known)
    rank_zero_info(
        f"{len(values)} classes: the values {values[0]} to {values[-1]} of the training masks"
        + (f", of which {missing} do not occur" if missing else "")
        + f"; {FILE} in {root!r} would name them"
    )
    return Legend([str(value) for value in values], values, ignored, source=root)


def count_classes(paths: Sequence[str], legend: Legend) -> list[int]:
    """Count the pixels of each class."""
    counts = np.zeros(len(legend.classes), np.int64)
    for mask in _map(legend.read, paths, "Pixels of each class"):
        classes = mask[mask >= 0].numpy()
        counts += np.bincount(classes, minlength=len(counts))
    return [int(n) for n in counts]


def _values_or_nothing(path: str) -> Values:
    try:
        return read_values(path)
    except UnreadableImage:  # reported when its image's turn comes
        return np.zeros((0, 0), np.uint8)


def _map(function: Any, paths: Sequence[str], desc: str) -> Iterable[Any]:
    """Apply a function to files, several at a time: decoders leave Python's lock alone."""
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        Bar(total=len(paths), desc=desc, leave=False, delay=1.0) as bar,
    ):
        for start in range(0, len(paths), 1024):  # not all results at once
            for result in pool.map(function, paths[start : start + 1024]):
                bar.update()
                yield result


def _color(values: Sequence[int]) -> Color:
    red, green, blue = (int(v) for v in values)
    return red, green, blue
