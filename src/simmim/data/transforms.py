"""Which part of an image is taken, and to which size it is brought; still uint8, on the CPU.

Flip and normalisation wait for the device: until then an image is a quarter of its float self.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]  # height, width


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class RandomCrop:
    """The pretraining transform of the paper: a random crop, resized; and whether to flip it.

    Attributes:
        size: Height and width that the crop is brought to.
        scale: Share of the image's area that is taken, from and to.
        ratio: Width over height of what is taken, from and to.
        hflip: Probability of a horizontal flip.
    """

    size: Size
    scale: tuple[float, float] = (0.67, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5

    def __call__(self, image: Tensor, draws: Iterator[float]) -> dict[str, object]:
        """Crop and resize (C, H, W), by uniform random numbers; colour stays HWC in memory."""
        box = random_box(image.shape[1], image.shape[2], self.scale, self.ratio, draws)
        sample: dict[str, object] = {"image": _crop_and_resize(image, box, self.size)}
        if self.hflip:
            sample["flip"] = next(draws) < self.hflip
        return sample


@dataclass(frozen=True)
class CenterCrop:
    """What is evaluated: the middle of the image, without any randomness.

    Attributes:
        size: Height and width that the crop is brought to.
        share: Side of the crop, as a share of the largest one that fits.
    """

    size: Size
    share: float = 1.0

    def __call__(self, image: Tensor, draws: Iterator[float]) -> dict[str, object]:
        """Crop and resize (C, H, W)."""
        box = center_box(image.shape[1], image.shape[2], self.size, self.share)
        return {"image": crop_and_resize(image, box, self.size)}


def random_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: Iterator[float],
) -> Box:
    """Draw a rectangle by the law of torchvision's `RandomResizedCrop.get_params`.

    Area uniform in `scale`, logarithm of the aspect ratio uniform in `ratio`, place uniform; after
    ten that do not fit, the largest in the middle that has a legal ratio.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * next(draws))
        aspect = math.exp(low + (high - low) * next(draws))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(next(draws) * (height - h + 1)), int(next(draws) * (width - w + 1))
            return Box(top, left, h, w)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    return _middle(height, width, min(height, width / aspect), min(width, height * aspect))


def center_box(height: int, width: int, size: Size, share: float) -> Box:
    """Find the rectangle in the middle, of the shape of `size`."""
    scale = share * min(height / size[0], width / size[1])
    return _middle(height, width, scale * size[0], scale * size[1])


def crop_and_resize(image: Tensor, box: Box, size: Size) -> Tensor:
    """Cut a rectangle out of (C, H, W) and resize it, bilinear and with antialiasing.

    As Pillow does, to within one grey level; uint8 stays uint8.
    """
    return _crop_and_resize(image, box, size).contiguous()


def _crop_and_resize(image: Tensor, box: Box, size: Size) -> Tensor:
    """Crop and resize; 8-bit colour is HWC in memory then, as it was decoded.

    To put it in the order CHW takes a fifth as long as all the rest: the device does that.
    """
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    if crop.dtype == torch.uint8 and crop.shape[1] == 3:
        crop = crop.contiguous(memory_format=torch.channels_last)
    if (height, width) != size:
        crop = F.interpolate(crop, size, mode="bilinear", antialias=True)
        if crop.is_floating_point():
            crop = crop.clamp_(0, 1)  # rounding can end just above 1
    return crop[0]


def flip_marked(images: Tensor, flip: Tensor) -> Tensor:
    """Mirror the images (B, C, H, W) that are marked in `flip` (B,), on any device."""
    return torch.where(flip[:, None, None, None], images.flip(-1), images)


def _middle(height: int, width: int, box_height: float, box_width: float) -> Box:
    h, w = max(round(box_height), 1), max(round(box_width), 1)
    return Box((height - h) // 2, (width - w) // 2, h, w)
