"""Draw what a model makes of masked images, and name the files: pure functions."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 4  # px between pictures and around them
CAPTION = 20  # px of the line above the columns
CAPTIONS = {"prediction": "reconstruction"}  # the other columns are called what they are
BACKGROUND, INK = (255, 255, 255), (40, 40, 40)


def draw_panel(pictures: Mapping[str, Tensor], side: int = 128) -> Image.Image:
    """Draw a table of pictures: a row for each image, a captioned column for each name.

    Args:
        pictures: Columns by name, each (B, C, H, W) in 0..1, in the order they appear.
        side: About how many px a picture should have at least: small ones are enlarged by whole
            pixels. Larger ones than 3 x side are reduced.

    Returns:
        The table, RGB.
    """
    columns = {name: to_rgb(_resize(tensor, side)) for name, tensor in pictures.items()}
    names = {name: CAPTIONS.get(name, name) for name in columns}
    rows = zip(*columns.values(), strict=True)
    return draw_table(
        [
            {names[name]: Image.fromarray(image) for name, image in zip(columns, row, strict=True)}
            for row in rows
        ]
    )


def draw_table(rows: Sequence[Mapping[str, Image.Image]]) -> Image.Image:
    """Put pictures of any size into a table: a row for each image, a captioned column a name."""
    names = list(rows[0])
    width = max(picture.width for row in rows for picture in row.values())
    heights = [max(picture.height for picture in row.values()) for row in rows]
    right, _ = cell_origin(0, len(names), (0, width))
    panel = Image.new("RGB", (right, GAP + CAPTION + sum(heights) + GAP * len(rows)), BACKGROUND)
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(size=13)
    top = GAP + CAPTION
    for column, name in enumerate(names):
        left, _ = cell_origin(0, column, (0, width))
        middle = (left + width // 2, top - CAPTION // 2)
        draw.text(middle, fitting(name, font, width), INK, font, anchor="mm")
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row.values()):
            panel.paste(picture, (cell_origin(0, column, (height, width))[0], top))
        top += height + GAP
    return panel


def cell_origin(row: int, column: int, size: tuple[int, int]) -> tuple[int, int]:
    """Where a picture of (height, width) px lies in the panel: its left and top edge in px."""
    height, width = size
    return GAP + column * (width + GAP), GAP + CAPTION + row * (height + GAP)


def to_unit(raw: Tensor) -> Tensor:
    """Turn images as a batch has them, uint8 or 0..1, into 0..1."""
    return raw.float() / 255 if raw.dtype == torch.uint8 else raw.float()


def to_rgb(pictures: Tensor) -> NDArray[np.uint8]:
    """Turn pictures in 0..1 into bytes, (B, C, H, W) -> (B, H, W, 3).

    One or two channels are shown as gray (the first), more as the first three; not-a-number is
    shown black.
    """
    chans = 3 if pictures.shape[1] >= 3 else 1
    pixels = pictures[:, :chans].float().nan_to_num(0).clamp(0, 1).mul(255).round().byte()
    pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)  # NCHW -> NHWC
    return np.ascontiguousarray(pixels.cpu().numpy())


def safe_name(path: str) -> str:
    """Name a picture after an image: unlike for unlike paths, and safe on every file system.

    The folders and the whole file name stay ("cats/1.jpg" and "cats/1.png" differ), with ".png"
    behind. Where a part of the path had to be changed (control characters, quotes, wildcards,
    bytes that are no text, too long, a leading dash, ".."), a hash of the original follows it.

    Args:
        path: The image's path below the data's root, or any other.

    Returns:
        A relative path with forward slashes.
    """
    parts = [part for part in PurePath(path).parts if part != PurePath(path).anchor]
    return "/".join(_safe_part(part) for part in parts) + ".png"


class PictureNames:
    """Name pictures after the images of a folder, unlike for unlike images.

    "cats/1.jpg" becomes "cats/1.png", so that both have one stem; "cats/1.jpg.png" where there is
    a "cats/1.tif" too, or where it is not known what there is. Every process names them alike.

    Args:
        root: The folder; None: images are named by their whole paths.
        paths: Of all its images, where they are known.
    """

    def __init__(self, root: str | Path | None = None, paths: Iterable[str] = ()) -> None:
        self.root = root
        self._uses = Counter(  # of names, as where case does not matter
            name.casefold()
            for path in map(self.relative, paths)
            for name in {path, os.path.splitext(path)[0]}
        )
        self._given: dict[str, str] = {}  # paths by name, as where case does not matter

    def __call__(self, path: str) -> str:
        """Name the picture of an image, by its path."""
        path = self.relative(path)
        stem = os.path.splitext(path)[0]
        if self._uses[stem.casefold()] == 1:
            return safe_name(stem)
        name = safe_name(path)
        # "A.jpg" beside "a.jpg" is one file on macOS and Windows. (The same path comes twice where
        # an image stands in for one that cannot be read: that is the same picture.)
        first = self._given.setdefault(name.casefold(), path)
        return name if first == path else safe_name(path + "\0")

    def relative(self, path: str) -> str:
        """An image's path below the folder, with forward slashes."""
        if self.root is not None and Path(path).is_relative_to(self.root):
            return Path(path).relative_to(self.root).as_posix()
        return path


def _safe_part(part: str) -> str:
    safe = unicodedata.normalize("NFC", part).encode("utf-8", "replace").decode()
    safe = re.sub(r"[^\w.,()+=@# -]", "_", safe)
    safe = re.sub(r"^[-. ]|[. ]$", "_", safe)
    short = safe.encode()[:180].decode(errors="ignore")  # file systems allow 255 bytes
    if short == part:
        return part
    return f"{short}-{sha256(part.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _resize(pictures: Tensor, side: int) -> Tensor:
    size = max(pictures.shape[-2:])
    if size > 3 * side:
        return F.interpolate(pictures.float(), scale_factor=3 * side / size, mode="area")
    factor = max(1, round(side / size))
    return pictures.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def fitting(text: str, font: Any, width: int) -> str:
    """The text, or as much of it as fits; signs that cannot be shown are question marks."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
