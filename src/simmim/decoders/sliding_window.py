"""A window slides over an image of any size; where windows overlap, their logits are averaged."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]  # height, width


def slide(
    function: Callable[[Tensor], Tensor], images: Tensor, window: Size, stride: Size
) -> Tensor:
    """Ask a function that knows one size about images of any size, as mmsegmentation does.

    The last window of a row or column ends where the image ends. Images that are smaller than the
    window are padded with their mean colour, to the right and below.

    Args:
        function: Images of the window's size, (B, C, h, w) -> logits, (B, K, h, w).
        images: (B, C, H, W).
        window: Height and width.
        stride: Pixels from window to window, down and across; no more than the window.

    Returns:
        Logits, (B, K, H, W).
    """
    height, width = images.shape[-2:]
    images = _pad(images, window)
    tops = starts(images.shape[-2], window[0], stride[0])
    lefts = starts(images.shape[-1], window[1], stride[1])
    if len(tops) == len(lefts) == 1:
        return function(images)[..., :height, :width]
    total, counts = None, images.new_zeros(images.shape[-2:], dtype=torch.float32)
    for top in tops:
        for left in lefts:
            here = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = function(images[here].contiguous()).float()
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
            total[here] += logits
            counts[here[1:]] += 1
    assert total is not None
    return (total / counts)[..., :height, :width]


def count_windows(images: Tensor, window: Size, stride: Size) -> int:
    """How often `slide` asks its function."""
    sides = zip(images.shape[-2:], window, stride, strict=True)
    return math.prod(len(starts(max(length, w), w, s)) for length, w, s in sides)


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin, along one side of the image, so that they cover all of it."""
    count = -(-max(length - window, 0) // stride) + 1
    return [min(i * stride, max(length - window, 0)) for i in range(count)]


def _pad(images: Tensor, window: Size) -> Tensor:
    down, right = (max(w - s, 0) for w, s in zip(window, images.shape[-2:], strict=True))
    if not down and not right:
        return images
    mean = images.mean((-2, -1), keepdim=True)
    return F.pad(images - mean, (0, right, 0, down)) + mean
