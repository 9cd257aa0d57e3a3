"""What fine-tuning does to a batch on the device: random erasing, mixup and cutmix."""

import math

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor

from simmim.masking import fill_pixels, hash_integers

ATTEMPTS = 10  # rectangles that are tried for each image, as in timm
AREA = (0.02, 1 / 3)  # of the image (Zhong et al., arXiv:1708.04896)
LOG_ASPECT = (math.log(0.3), -math.log(0.3))


def erase(images: Tensor, keys: Tensor, probability: float) -> Tensor:
    """Put noise in place of one rectangle of some images, as timm's RandomErasing("pixel") does.

    Unlike timm's, the draw depends on each sample's key alone.

    Args:
        images: Normalised, (B, C, H, W); not changed.
        keys: From `masking.sample_keys`, (B,).
        probability: Share of the images that lose a rectangle.

    Returns:
        The images.
    """
    height, width = images.shape[-2:]
    draws = hash_integers(keys, 1 + 4 * ATTEMPTS).float() / 2**31  # uniform in [0, 1)
    chosen, tries = draws[:, 0] < probability, draws[:, 1:].unflatten(1, (4, ATTEMPTS))
    area = (AREA[0] + (AREA[1] - AREA[0]) * tries[:, 0]) * height * width
    aspect = (LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * tries[:, 1]).exp()
    h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (h < height) & (w < width)
    first = fits.int().argmax(1, keepdim=True)  # the first of the attempts that fits
    h, w, y, x = (values.gather(1, first) for values in (h, w, tries[:, 2], tries[:, 3]))
    top, left = ((height - h + 1) * y).floor(), ((width - w + 1) * x).floor()
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    inside_rows = (rows >= top) & (rows < top + h)  # (B, H)
    inside_columns = (columns >= left) & (columns < left + w)  # (B, W)
    erased = inside_rows[:, :, None] & inside_columns[:, None, :]
    erased &= (chosen & fits.any(1))[:, None, None]
    return fill_pixels(images, erased, "noise", keys)


class Mixer:
    """Mix each image, and its target, with the one at the mirrored place in the batch.

    timm's Mixup, whose draws come from a seed of the step instead of numpy's global state, with
    targets that may be anything to average.

    Args:
        mixup: Alpha of mixup's Beta distribution (arXiv:1710.09412); 0 = none.
        cutmix: Alpha of cutmix's (arXiv:1905.04899); 0 = none. With both, each batch draws one.
    """

    def __init__(self, mixup: float, cutmix: float) -> None:
        for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
            if alpha < 0:
                raise ValueError(f"{name} {alpha} is negative: use 0 for none, or 0.8 or 1")
        self.mixup = Mixup(mixup, cutmix) if mixup or cutmix else None

    def __call__(self, images: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: Normalised, (B, C, H, W); not changed.
            targets: Shares or presence of each class, (B, K).
            seed: Of the step; the draw depends on nothing else.

        Returns:
            Images and targets.
        """
        if self.mixup is None:
            return images, targets
        before = np.random.get_state()  # noqa: NPY002 - timm draws from the global state
        try:
            np.random.seed(seed)  # noqa: NPY002
            images = images.clone()
            share = self.mixup._mix_batch(images)
        finally:
            np.random.set_state(before)  # noqa: NPY002
        return images, targets * share + targets.flip(0) * (1 - share)
