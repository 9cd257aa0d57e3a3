"""How an image and the boxes in it come onto the canvas that a detector sees.

A canvas has one size for all images, so that every encoder works (windows, tables of positions):
the image lies at its top left, with its own aspect ratio, and the rest is empty.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from simmim.data.transforms import Box, Size, crop_and_resize


class Placement(NamedTuple):
    """Which part of an image is shown, and how.

    Attributes:
        part: The rectangle that is cut out, in the image's pixels.
        size: Height and width that it is brought to, on the canvas.
        flip: Whether it is mirrored, left to right.
    """

    part: Box
    size: Size
    flip: bool = False

    def image(self, image: Tensor, canvas: Size) -> Tensor:
        """Put the pixels of (C, H, W) on the canvas; zeros around them."""
        shown = crop_and_resize(image, self.part, self.size)
        shown = shown.flip(-1) if self.flip else shown
        return F.pad(shown, (0, canvas[1] - self.size[1], 0, canvas[0] - self.size[0]))

    def boxes(self, boxes: Tensor) -> Tensor:
        """Move boxes, (n, 4) by their corners, and clip them to what is shown."""
        top, left, height, width = self.part
        scale = boxes.new_tensor([self.size[1] / width, self.size[0] / height] * 2)
        moved = (boxes - boxes.new_tensor([left, top] * 2)) * scale
        moved[:, 0::2] = moved[:, 0::2].clamp(0, self.size[1])
        moved[:, 1::2] = moved[:, 1::2].clamp(0, self.size[0])
        if self.flip:
            moved[:, 0::2] = self.size[1] - moved[:, [2, 0]]
        return moved

    def masks(self, masks: Tensor) -> Tensor:
        """Cut, resize and mirror masks, uint8, (n, H, W) -> (n, h, w) without what is empty."""
        top, left, height, width = self.part
        shown = masks[:, top : top + height, left : left + width]
        if len(masks) and (height, width) != self.size:
            shown = F.interpolate(shown[None], self.size, mode="nearest-exact")[0]
        elif not len(masks):
            shown = masks.new_zeros(0, *self.size)
        return (shown.flip(-1) if self.flip else shown).contiguous()


@dataclass(frozen=True)
class Fit:
    """The whole image, as large as it fits onto the canvas.

    Attributes:
        canvas: Its height and width.
    """

    canvas: Size

    def place(self, height: int, width: int, draws: Iterator[float]) -> Placement:
        """Place an image of this size."""
        scale = _scale(height, width, self.canvas)
        return Placement(Box(0, 0, height, width), _round(height, width, scale, self.canvas))

    def __call__(self, image: Tensor, draws: Iterator[float]) -> dict[str, Any]:
        """Put (C, H, W) on the canvas."""
        placement = self.place(image.shape[1], image.shape[2], draws)
        return {
            "image": placement.image(image, self.canvas),
            "size": torch.tensor(placement.size),
            "original": torch.tensor(image.shape[1:]),
        }


@dataclass(frozen=True)
class Jitter(Fit):
    """The training transform: large-scale jitter (Ghiasi et al., arXiv:2012.07177) and a mirror.

    Attributes:
        scale: Size of the image, as a share of the one that fits the canvas, from and to. What is
            larger than the canvas is cut at random.
        hflip: Probability that it is mirrored.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    hflip: float = 0.5

    def place(self, height: int, width: int, draws: Iterator[float]) -> Placement:
        """Place an image of this size, by uniform random numbers."""
        share = self.scale[0] + (self.scale[1] - self.scale[0]) * next(draws)
        scale = share * _scale(height, width, self.canvas)
        h = min(height, max(round(self.canvas[0] / scale), 1))
        w = min(width, max(round(self.canvas[1] / scale), 1))
        top, left = int(next(draws) * (height - h + 1)), int(next(draws) * (width - w + 1))
        size = _round(h, w, scale, self.canvas)
        return Placement(Box(top, left, h, w), size, next(draws) < self.hflip)


def _scale(height: int, width: int, canvas: Size) -> float:
    return min(canvas[0] / height, canvas[1] / width)


def _round(height: int, width: int, scale: float, canvas: Size) -> Size:
    sides = round(height * scale), round(width * scale)
    return min(max(sides[0], 1), canvas[0]), min(max(sides[1], 1), canvas[1])
