"""Feature maps at several strides from any timm model, for segmentation and detection."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

LEVELS = 4


class Pyramid(nn.Module):
    """Feature maps from fine to coarse, each half as wide as the one before.

    A hierarchical model has them: its last four stages. A plain transformer has one resolution,
    from which transposed convolutions make maps 4 and 2 times as fine, and pooling one half as
    fine (the simple feature pyramid of ViTDet, arXiv:2203.16527). Each map ends with a LayerNorm
    over its channels.

    The model is no part of this module, but asked by `read`: so its weights keep the names that
    they have in every task. What none of the maps depends on (the final norm, class attention) is
    frozen.

    Args:
        model: A timm model, of the size that it will be used with.
        name: Its name, for the errors.
        in_chans: Channels of its images.
        img_size: Their height and width in pixels.
        spread: Where a plain transformer is read: in its last block (False, as ViTDet does), or in
            the last block of each quarter (True, as BEiT and MAE do for UPerNet).

    Attributes:
        channels: Of each map.
        strides: Pixels per feature of each map.

    Raises:
        ValueError: If the model gives no middle layers.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        in_chans: int,
        img_size: tuple[int, int],
        *,
        spread: bool = False,
    ) -> None:
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"{name} gives no middle layers to build a feature pyramid on")
        plain = len({info["reduction"] for info in model.feature_info}) == 1
        self.layers = _choose_layers(model, plain and not spread)
        maps = freeze_unread(self.read, model, in_chans, img_size)
        scales = (4, 2, 1, 0.5) if plain else (1,) * len(maps)
        strides = [img_size[0] / features.shape[2] for features in maps]
        widths = [features.shape[1] for features in maps]
        self.strides = [stride / scale for stride, scale in zip(strides, scales, strict=True)]
        self.channels = [int(width // max(s, 1)) for width, s in zip(widths, scales, strict=True)]
        self.levels = nn.ModuleList(
            nn.Sequential(*_rescale(width, scale), LayerNorm2d(channels))
            for width, scale, channels in zip(widths, scales, self.channels, strict=True)
        )

    def read(self, model: Any, images: Tensor) -> list[Tensor]:
        """Run the model: images, (B, C, H, W) -> its maps, each (B, D, h, w), for `forward`."""
        found = model.forward_intermediates(
            images,
            indices=sorted(set(self.layers)),
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        maps = dict(zip(sorted(set(self.layers)), found, strict=True))
        return [maps[layer] for layer in self.layers]

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """The model's maps -> those of the pyramid, fine to coarse."""
        return [level(features) for level, features in zip(self.levels, maps, strict=True)]


def freeze_unread(
    read: Callable[[Any, Tensor], list[Tensor]],
    model: Any,
    in_chans: int,
    img_size: tuple[int, int],
) -> list[Tensor]:
    """Run a model once on noise, and freeze what its maps do not depend on.

    Args:
        read: Runs the model on images, (B, C, H, W), and gives its maps.
        model: The model.
        in_chans: Channels of its images.
        img_size: Their height and width in pixels.

    Returns:
        The maps, for their sizes.
    """
    training = model.training
    model.eval()
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(1, in_chans, *img_size, generator=generator, device="cpu")
    with torch.enable_grad():
        maps = read(model, noise.to(next(model.parameters())))
        trained = [p for p in model.parameters() if p.requires_grad]
        if trained:
            total = torch.stack([features.sum() for features in maps]).sum()
            reached = torch.autograd.grad(total, trained, allow_unused=True)
            for parameter, gradient in zip(trained, reached, strict=True):
                parameter.requires_grad_(gradient is not None)
    model.train(training)
    return [features.detach() for features in maps]


def _choose_layers(model: Any, last: bool) -> list[int]:
    """Which of the model's layers give a map, counted from 0; a layer can give several."""
    reductions = [info["reduction"] for info in model.feature_info]
    if len(set(reductions)) > 1:
        ends = {reduction: i for i, reduction in enumerate(reductions)}  # the last of each stride
        return sorted(ends.values())[-LEVELS:]
    depth = len(reductions)
    return [depth - 1 if last else -(-depth * i // LEVELS) - 1 for i in range(1, LEVELS + 1)]


def _rescale(width: int, scale: float) -> list[nn.Module]:
    """Modules that make a map `scale` times as fine; each doubling halves the channels."""
    if scale == 4:
        return [
            nn.ConvTranspose2d(width, width // 2, 2, 2),
            LayerNorm2d(width // 2),
            nn.GELU(),
            nn.ConvTranspose2d(width // 2, width // 4, 2, 2),
        ]
    if scale == 2:
        return [nn.ConvTranspose2d(width, width // 2, 2, 2)]
    return [] if scale == 1 else [nn.MaxPool2d(2, ceil_mode=True)]
