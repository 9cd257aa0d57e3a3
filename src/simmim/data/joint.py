"""What is done to an image and its mask together; for an image alone see `transforms`."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from simmim.data.class_map import VOID
from simmim.data.transforms import Box, Size, crop_and_resize

ATTEMPTS = 10  # crops that are tried for one with several classes, as in mmsegmentation
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32 / 255, 0.5, 0.5, 18 / 180  # mmsegmentation's


@dataclass(frozen=True)
class PairCrop:
    """The usual training transform: a random scale, a random crop, a flip, other colours.

    What reaches beyond the image has its mean colour, and no class.

    Attributes:
        size: Height and width of the crop.
        scale: Factor by which the image is enlarged first, from and to; uniform.
        short_side: Pixels that the image's shorter side is brought to before; None: its own.
        hflip: Probability of a horizontal flip.
        max_class_share: Share of a crop that one class may cover, if ten others are no better.
        jitter: Whether brightness, contrast, saturation and hue are changed.
    """

    size: Size
    scale: tuple[float, float] = (0.5, 2.0)
    short_side: int | None = None
    hflip: float = 0.5
    max_class_share: float = 0.75
    jitter: bool = True

    def __call__(self, pair: tuple[Tensor, Tensor], draws: Iterator[float]) -> dict[str, object]:
        """Transform an image, (C, H, W), and its mask, (H, W), by uniform random numbers."""
        image, mask = pair
        height, width = mask.shape
        factor = self.scale[0] + (self.scale[1] - self.scale[0]) * next(draws)
        factor *= fitting(height, width, self.short_side)
        for _ in range(ATTEMPTS):
            box, inside, corner = random_window(height, width, factor, self.size, draws)
            if _greatest_share(crop_mask(mask, box, inside)) <= self.max_class_share:
                break
        image, mask = crop_and_resize(image, box, inside), crop_mask(mask, box, inside)
        image, mask = _place(image, mask, self.size, corner)
        if next(draws) < self.hflip:
            image, mask = image.flip(-1), mask.flip(-1)
        if self.jitter:
            image = jitter(image, draws)
        return {"image": image, "mask": mask}


@dataclass(frozen=True)
class Whole:
    """A whole image as it is evaluated; its mask stays as it is.

    Attributes:
        short_side: Pixels that the image's shorter side is brought to; None: its own.
    """

    short_side: int | None = None

    def __call__(
        self, content: Tensor | tuple[Tensor, Tensor], draws: Iterator[float]
    ) -> dict[str, object]:
        """Resize an image, (C, H, W); `size` is what it was, (2,)."""
        image, *mask = content if isinstance(content, tuple) else (content,)
        height, width = image.shape[1:]
        factor = fitting(height, width, self.short_side)
        size = max(round(height * factor), 1), max(round(width * factor), 1)
        sample: dict[str, object] = {
            "image": crop_and_resize(image, Box(0, 0, height, width), size),
            "size": torch.tensor([height, width]),
        }
        return {**sample, "mask": mask[0]} if mask else sample


def fitting(height: int, width: int, short_side: int | None) -> float:
    """The factor that brings an image's shorter side to a number of pixels."""
    return 1.0 if short_side is None else short_side / min(height, width)


def random_window(
    height: int, width: int, factor: float, size: Size, draws: Iterator[float]
) -> tuple[Box, Size, tuple[int, int]]:
    """Draw a window of an enlarged image, or of a small one all, and a place for it.

    Returns:
        The part of the image as it is; the size that it is brought to; and where its corner lies
        in the window, down and across.
    """
    starts, lengths, sides, corners = [], [], [], []
    for length, side in zip((height, width), size, strict=True):
        large = max(round(length * factor), 1)
        draw = next(draws)
        if large >= side:
            taken = min(max(round(side / factor), 1), length)
            start, shown, corner = int(draw * (length - taken + 1)), side, 0
        else:
            taken, start, shown, corner = length, 0, large, int(draw * (side - large + 1))
        starts.append(start)
        lengths.append(taken)
        sides.append(shown)
        corners.append(corner)
    return Box(*starts, *lengths), (sides[0], sides[1]), (corners[0], corners[1])


def crop_mask(mask: Tensor, box: Box, size: Size) -> Tensor:
    """Cut a rectangle out of a mask, (H, W), and resize it: the class at each pixel's middle."""
    rows, columns = (
        start + ((torch.arange(side) + 0.5) * (length / side)).long()
        for start, length, side in zip(box[:2], box[2:], size, strict=True)
    )
    return mask[rows[:, None], columns]


def jitter(image: Tensor, draws: Iterator[float]) -> Tensor:
    """Change brightness, contrast, saturation and hue, each of half of the images.

    mmsegmentation's PhotoMetricDistortion, in one order. Saturation and hue are those of RGB.

    Args:
        image: uint8, or float in 0..1, (C, H, W).
        draws: Uniform random numbers.
    """
    pixels = image / 255 if image.dtype == torch.uint8 else image
    if next(draws) < 0.5:
        pixels = pixels + BRIGHTNESS * (2 * next(draws) - 1)
    if next(draws) < 0.5:
        pixels = pixels * (1 + CONTRAST * (2 * next(draws) - 1))
    pixels = pixels.clamp(0, 1)
    if len(image) == 3:
        from torchvision.transforms.v2 import functional as color

        if next(draws) < 0.5:
            pixels = color.adjust_saturation(pixels, 1 + SATURATION * (2 * next(draws) - 1))
        if next(draws) < 0.5:
            pixels = color.adjust_hue(pixels, HUE * (2 * next(draws) - 1))
    return (pixels * 255).round().byte() if image.dtype == torch.uint8 else pixels


def _place(
    image: Tensor, mask: Tensor, size: Size, corner: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Put an image and its mask into a window of this size."""
    if tuple(mask.shape) == size:
        return image, mask
    top, left = corner
    below, right = size[0] - top - mask.shape[0], size[1] - left - mask.shape[1]
    mean = image.float().mean((1, 2), keepdim=True)
    mean = mean.round().byte() if image.dtype == torch.uint8 else mean
    window = mean.expand(-1, *size).clone()
    window[:, top : top + mask.shape[0], left : left + mask.shape[1]] = image
    return window, F.pad(mask, (left, right, top, below), value=VOID)


def _greatest_share(mask: Tensor) -> float:
    """Share of the pixels with a class that belongs to the most frequent one; 1 without any."""
    counts = torch.bincount((mask.flatten() - VOID).long())[1:]  # VOID is the first
    return float(counts.max() / counts.sum()) if counts.sum() else 1.0
