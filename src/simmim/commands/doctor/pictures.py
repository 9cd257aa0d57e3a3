"""The contact sheet: images of each part and class, and those that were found, with the reason."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from simmim.callbacks.pictures import BACKGROUND, INK, fitting

SIDE, GAP, COLUMNS = 112, 8, 8  # px of a picture's longer side, between pictures; pictures in a row
LINE, LINES, HEAD = 13, 3, 24  # px of a line, lines below a picture, px of a row's heading
GROUND, CROSS = (238, 238, 238), (190, 60, 60)


@dataclass(frozen=True)
class Tile:
    """A picture on the sheet.

    Attributes:
        pixels: (H, W, 1 or 3), at most SIDE px; None: it cannot be read.
        caption: What stands below it.
    """

    pixels: npt.NDArray[np.uint8] | None
    caption: str


@dataclass(frozen=True)
class Row:
    """Pictures that belong together, at most COLUMNS."""

    heading: str
    tiles: Sequence[Tile]


def draw_sheet(rows: Sequence[Row]) -> Image.Image:
    """Draw rows of pictures below their headings, RGB."""
    heights = [HEAD + SIDE + _lines(row) * LINE + GAP for row in rows]
    width = COLUMNS * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, sum(heights) + GAP), BACKGROUND)
    draw, top = ImageDraw.Draw(sheet), GAP
    font, bold = ImageFont.load_default(size=10), ImageFont.load_default(size=13)
    for row, height in zip(rows, heights, strict=True):
        heading = fitting(row.heading, bold, width - 2 * GAP)
        draw.text((GAP, top + HEAD // 2), heading, INK, bold, anchor="lm")
        for column, tile in enumerate(row.tiles[:COLUMNS]):
            left = GAP + column * (SIDE + GAP)
            _paste(sheet, draw, tile, left, top + HEAD)
            for i, line in enumerate(_wrapped(tile.caption)):
                at = (left, top + HEAD + SIDE + 3 + i * LINE)
                draw.text(at, fitting(line, font, SIDE), INK, font)
        top += height
    return sheet


def _paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, left: int, top: int) -> None:
    """Put a picture into the middle of its place, on gray: narrow ones stay narrow."""
    draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), fill=GROUND)
    if tile.pixels is None:
        a, b = SIDE // 3, SIDE - SIDE // 3
        draw.line((left + a, top + a, left + b, top + b), fill=CROSS, width=3)
        draw.line((left + a, top + b, left + b, top + a), fill=CROSS, width=3)
        return
    chans = tile.pixels.shape[2]
    picture = Image.fromarray(tile.pixels if chans == 3 else tile.pixels[..., 0]).convert("RGB")
    factor = max(SIDE // max(picture.size), 1)  # small ones are enlarged by whole pixels
    picture = picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )
    middle = left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2
    sheet.paste(picture, middle)


def _lines(row: Row) -> int:
    return max((len(_wrapped(tile.caption)) for tile in row.tiles), default=0)


def _wrapped(caption: str) -> list[str]:
    """Lines of a caption: the first, a name, keeps its end; the rest is wrapped."""
    name, _, reason = caption.partition("\n")
    name = name if len(name) <= 20 else f"…{name[-19:]}"
    return [name, *textwrap.wrap(reason, 22, max_lines=LINES, placeholder=" …")]
