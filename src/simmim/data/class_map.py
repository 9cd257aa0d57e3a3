"""What the pixels of a mask mean: its values or colours -> classes."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from simmim.data.decode import UnreadableImage
from simmim.data.scans import check_size

Color = tuple[int, int, int]
Values = npt.NDArray[np.integer[Any]]
Totals = Mapping[int, tuple[int, int]]  # pixels of each value, and squares of 2 x 2 of it alone

FILE = "classes.json"
VOID = -1  # in batches: a pixel without a class
UNKNOWN = -2
ANY_VOID = 255  # in masks, where nobody says otherwise
MOST = 2**16  # values of a mask
AREA = 0.2  # of a class's pixels at least lie in squares of 2 x 2; of an edge's values fewer do
EDGES = 3  # values at least that are taken for those of soft edges
SHOWN = 8  # values in a message
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
            return torch.from_numpy(self.of_colors(mask, path))
        number = self._table[mask]
        if (number == UNKNOWN).any():
            raise self.unknown(path, int(mask[number == UNKNOWN][0]))
        return torch.from_numpy(number)

    @property
    def known(self) -> set[int]:
        """All values that a mask may have."""
        return {*self.values, *self.void}

    def unknown(self, path: str, value: int) -> WrongMask:
        """The error of a mask with a value that is neither of a class nor void."""
        return WrongMask(
            f"{path!r} has the value {value}, which is neither one of the {len(self.classes)} "
            f"classes of {self.source} nor void: correct the mask, name the class in {FILE}, or "
            "give data.void"
        )

    @cached_property
    def _table(self) -> npt.NDArray[np.int16]:
        """The class of each value."""
        table = np.full(MOST, UNKNOWN, np.int16)
        table[self.values] = np.arange(len(self.values))
        table[list(self.void)] = VOID
        return table

    def of_colors(self, mask: Values, path: str) -> npt.NDArray[np.int16]:
        """Colours, (H, W, 3) -> classes, (H, W).

        Raises:
            WrongMask: If there are no colours, or others.
        """
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes, which we check
        return decode_values(path)


def decode_values(path: str) -> Values:
    """Do what `read_values` does, in any thread: the caller has to silence warnings for all."""
    try:
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


def read_legend(
    path: str, void: Sequence[int] | None = None, totals: Totals | None = None
) -> Legend:
    """Read a file of classes.

    Args:
        path: JSON: `{"classes": [names], "ignore_index": 255, "palette_rgb": [[r, g, b], ...],
            "values": [...]}`. Without `values` the classes are 0, 1, 2, ..., or where the training
            masks have other values and as many as there are names, these in order; one whose
            value is the ignore_index is no class. Colours beyond those of the classes are void.
        void: Values without a class, instead of the file's.
        totals: The values of the training masks.

    Raises:
        ValueError: If it is not such a file, or the training masks do not go with it.
    """
    try:
        with open(path, encoding="utf-8") as file:
            said = json.load(file)
        names = [str(name) for name in said["classes"]]
        values = [int(v) for v in said["values"]] if "values" in said else None
        colors = [_color(c) for c in said.get("palette_rgb") or ()]
        if void is None and "ignore_index" in said:
            ignored = said["ignore_index"]
            void = [int(v) for v in (ignored if isinstance(ignored, list) else [ignored])]
    except OSError as error:
        raise ValueError(f"data.classes {path!r} cannot be read: {error.strerror}") from error
    except Exception as error:  # valid json can hold anything in any place
        raise ValueError(
            f'{path!r} is no file of classes such as {{"classes": ["road", "tree"], '
            f'"ignore_index": 255}}: {type(error).__name__} {error}'
        ) from error
    if values is None:
        values = _number(len(names), void, totals or {}, path)
    if void is None:
        void = [ANY_VOID] if ANY_VOID not in values else []
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
        tuple(void),
        [colors[i] for i in kept] if colors else None,
        tuple(dropped),
        path,
    )


def find_legend(root: str, totals: Totals, void: Sequence[int] | None = None) -> Legend:
    """Make a class of each value that occurs in the training masks.

    Args:
        root: The folder, for the errors.
        totals: The values of the training masks.
        void: Values without a class; None: 255, unless it is one of several gray levels.

    Raises:
        ValueError: If there are not two classes, or most of the values are those of soft edges.
    """
    found = _values(totals)
    ignored = tuple(_usual_void(found) if void is None else void)
    values = [value for value in found if value not in ignored]
    if len(values) < 2:
        raise ValueError(
            f"the masks of {root!r} hold {' and '.join(map(str, found)) or 'nothing'} alone, which "
            f"leaves nothing to tell apart: give {FILE} with the names and values of two classes"
        )
    check_edges(totals, root)
    rank_zero_info(
        f"{len(values)} classes: the values {shortened(values)} of the training masks; {FILE} in "
        f"{root!r} would name them"
    )
    return Legend([str(value) for value in values], values, ignored, source=root)


def edge_values(totals: Totals) -> list[int]:
    """Find the values of soft edges: many, between others, and hardly ever side by side.

    Classes have areas. What interpolation or JPEG puts between them has not: of its pixels few
    have the same value as those beside and below them.
    """
    areas = [v for v, (pixels, blocks) in totals.items() if blocks >= AREA * pixels and v != VOID]
    if not areas:
        return []
    edges = [v for v in totals if v not in areas and min(areas) < v < max(areas)]
    return edges if len(edges) >= max(EDGES, len(areas)) else []


def check_edges(totals: Totals, source: str) -> None:
    """Refuse masks with soft edges, whose values are no classes.

    Raises:
        ValueError: With the remedy.
    """
    if not (edges := edge_values(totals)):
        return
    share = sum(totals[v][0] for v in edges) / sum(pixels for pixels, _ in totals.values())
    main = sorted(sorted(totals, key=lambda v: -totals[v][0])[:2])
    raise ValueError(
        f"{len(edges)} of the {len(totals)} values in the training masks ({shortened(edges)}) "
        f"occur at edges alone, in {share:.1%} of the pixels of {source!r}: the masks were "
        "interpolated or compressed. Make them with nearest neighbours, or give the classes' own "
        f'"values" in {FILE}, such as {main}: all others are then ignored'
    )


def shortened(values: Sequence[int]) -> str:
    """Write numbers in one line, of many the first and the last."""
    texts = [str(value) for value in values]
    return ", ".join(texts if len(texts) <= SHOWN else [*texts[: SHOWN - 2], "...", texts[-1]])


def _number(names: int, void: Sequence[int] | None, totals: Totals, path: str) -> list[int]:
    """The values of named classes: 0, 1, 2, ..., or those of the training masks in order."""
    found = _values(totals)
    ignored = _usual_void(found) if void is None else void
    known = [value for value in found if value not in ignored]
    if all(value < names for value in known):
        return list(range(names))
    choices = [known, found]
    if void is None:
        choices.append([value for value in found if value != ANY_VOID])
    for values in choices:
        if len(values) == names:
            rank_zero_info(
                f"the {names} classes of {path!r} are the values {shortened(values)} of the "
                'training masks, in this order ("values" there would say otherwise)'
            )
            return values
    check_edges(totals, path)
    return list(range(names))


def _usual_void(found: Sequence[int]) -> list[int]:
    """What has no class if nobody says so: 255, unless it is a number like the others.

    It is in masks of 16 bits with greater ones, and as the last of evenly spaced gray levels, such
    as 0, 255 or 0, 128, 255.
    """
    if len(found) > 1 and found[0] == 0 and found[-1] == ANY_VOID:
        gaps = np.diff(found)
        return [] if max(gaps) <= 2 * min(gaps) else [ANY_VOID]
    return [] if found and found[-1] > ANY_VOID else [ANY_VOID]


def _values(totals: Totals) -> list[int]:
    return sorted(value for value in totals if value != VOID)


def _color(values: Sequence[int]) -> Color:
    red, green, blue = (int(v) for v in values)
    return red, green, blue
