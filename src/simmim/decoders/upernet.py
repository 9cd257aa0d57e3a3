"""Feature maps -> one map that the class of each pixel is read from: UPerNet, or no decoder."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from simmim.decoders.pyramid import Pyramid, freeze_unread
from simmim.evaluation.readout import choose_layers

Size = tuple[int, int]  # height, width


class UPerNet(nn.Module):
    """The decoder of UPerNet (Xiao et al., arXiv:1807.10221) on a feature pyramid.

    Pyramid pooling of the coarsest map, then from map to map up to the finest, and all of them
    fused. It is segmentation-models-pytorch's.

    Args:
        model: A timm model, of the size that it will be used with; it is no part of this module.
        name: Its name, for the errors.
        in_chans: Channels of its images.
        img_size: Their height and width in pixels.
        width: Channels of the decoder.

    Attributes:
        out_channels: Channels of the map that comes out.
        aux_channels: Channels of the map that an auxiliary head reads: the last but one.
    """

    def __init__(self, model: Any, name: str, in_chans: int, img_size: Size, width: int) -> None:
        super().__init__()
        # It imports all of its networks, which takes a second.
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        # A plain transformer is read in each quarter of its depth, as by BEiT and MAE.
        self.pyramid = Pyramid(model, name, in_chans, img_size, spread=True)
        channels = self.pyramid.channels
        self.decoder = UPerNetDecoder([0, 0, *channels], len(channels) + 1, width)
        self.decoder.feature_norms = nn.ModuleList(nn.Identity() for _ in channels)  # has norms
        _spare_single_values(self.decoder)
        self.out_channels, self.aux_channels = width, channels[-2]

    def read(self, model: Any, images: Tensor) -> list[Tensor]:
        """Run the model: images, (B, C, H, W) -> its maps, for `forward`."""
        return self.pyramid.read(model, images)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The model's maps -> the fused map, as fine as the finest, and that of the auxiliary."""
        levels = self.pyramid(maps)
        return self.decoder([None, None, *levels]), levels[-2]


class Plain(nn.Module):
    """No decoder: one map of the encoder, each channel normalised over the batch.

    Args:
        model: A timm model, as in `UPerNet`; so are the next three.
        name: Its name.
        in_chans: Channels of its images.
        img_size: Their height and width.
        layer: Block, or stage, that is read, counted from 1; None: the last, behind the final norm.

    Attributes:
        out_channels: Channels of the map.
    """

    def __init__(
        self, model: Any, name: str, in_chans: int, img_size: Size, layer: int | None
    ) -> None:
        super().__init__()
        last = len(getattr(model, "feature_info", ()))
        self.norm_first = layer is None
        self.layer = choose_layers(layer or last, model, name)[0] - 1
        (features,) = freeze_unread(self.read, model, in_chans, img_size)
        self.out_channels = features.shape[1]
        self.norm = nn.BatchNorm2d(self.out_channels)
        _spare_single_values(self)

    def read(self, model: Any, images: Tensor) -> list[Tensor]:
        """Run the model: images, (B, C, H, W) -> its map, for `forward`."""
        found: list[Tensor] = model.forward_intermediates(
            images,
            indices=[self.layer],
            norm=self.norm_first,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return found

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, None]:
        """The model's map, normalised; there is none for an auxiliary head."""
        return self.norm(maps[0]), None


class AuxiliaryHead(nn.Sequential):
    """A small head on a middle map, whose loss helps to train: FCN's, with one convolution.

    Args:
        channels: Of the map.
        num_classes: Classes.
        dropout: Share of the channels that is dropped before the classifier.
        width: Channels in between. 256 (mmsegmentation's UPerNet).
    """

    def __init__(self, channels: int, num_classes: int, dropout: float, width: int = 256) -> None:
        width = min(width, channels)
        super().__init__(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout2d(dropout),
            nn.Conv2d(width, num_classes, 1),
        )
        _spare_single_values(self)


def enlarge(logits: Tensor, size: Size) -> Tensor:
    """Bring logits, (B, K, h, w), to the size of the image, bilinear and in float32."""
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)


class _BatchNorm(nn.BatchNorm2d):
    """A BatchNorm that takes its running statistics where a batch has one value a channel.

    Pyramid pooling to 1 x 1 leaves one for a batch of one image, and that has no variance.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            statistics = (self.running_mean, self.running_var)
            return F.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def _spare_single_values(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(parent, name, _BatchNorm(child.num_features))
