"""torchvision's Faster R-CNN and Mask R-CNN on any pyramid, at any stride and in any precision."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from math import log2
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from simmim.decoders.pyramid import Pyramid

Head = Literal["mlp", "conv"]
ANCHOR = 8  # strides of an anchor's side: 32 px on the map of stride 4 (FPN, arXiv:1612.03144)
HIDDEN = 1024  # of the box head


class Neck(nn.Module):
    """An encoder's maps -> maps of equal width, and one that is twice as coarse as the coarsest.

    Args:
        pyramid: What the encoder's maps are brought to.
        channels: Of each map.
        norm: Whether each convolution ends with a LayerNorm, as ViTDet's.

    Attributes:
        out_channels: Of each map.
        strides: Pixels per feature of each map.
    """

    def __init__(self, pyramid: Pyramid, channels: int, *, norm: bool = False) -> None:
        super().__init__()
        self.pyramid, self.out_channels = pyramid, channels
        self.strides = [*pyramid.strides, 2 * pyramid.strides[-1]]
        self.fpn = FeaturePyramidNetwork(
            pyramid.channels, channels, LastLevelMaxPool(), LayerNorm2d if norm else None
        )

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        """The encoder's maps, as `Pyramid.read` gives them -> maps by "0", "1", ..., "pool"."""
        levels = self.pyramid(maps)
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(levels)))


class Anchors(AnchorGenerator):
    """torchvision's anchors at the strides that the maps have, whole numbers or not, in float32.

    torchvision divides the image's size by the map's without a remainder, and counts in the
    features' precision: with patches of 14 px, or in bf16, anchors would lie pixels off.

    Args:
        sizes: Side of an anchor on each map, in pixels.
        ratios: Height over width of the anchors at each place.
        strides: Of each map.
    """

    def __init__(
        self, sizes: Sequence[float], ratios: Sequence[float], strides: Sequence[float]
    ) -> None:
        super().__init__(tuple((size,) for size in sizes), (tuple(ratios),) * len(sizes))
        self.strides = list(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of each image: boxes by their corners, (n, 4)."""
        device = feature_maps[0].device
        grids = [list(features.shape[-2:]) for features in feature_maps]
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        self.set_cell_anchors(torch.float32, device)
        anchors = torch.cat(self.grid_anchors(grids, strides))
        return [anchors] * len(image_list.image_sizes)


class BoxSampler(BalancedPositiveNegativeSampler):
    """torchvision's choice of the boxes that a loss is taken over.

    Attributes:
        seeds: Of what is drawn for each image; None: the common random state.
    """

    seeds: Sequence[int] | None = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Choose positive and negative boxes, masks over those of each image."""
        if self.seeds is None:
            return super().__call__(matched_idxs)
        positive: list[Tensor] = []
        negative: list[Tensor] = []
        for seed, labels in zip(self.seeds, matched_idxs, strict=True):
            torch.manual_seed(seed)
            (chosen,), (others,) = super().__call__([labels])
            positive.append(chosen)
            negative.append(others)
        return positive, negative


class Heads(NamedTuple):
    """What proposes boxes, and what says what is in them (and where exactly)."""

    rpn: Any
    roi_heads: Any


def build_heads(
    neck: Neck,
    num_classes: int,
    img_size: tuple[int, int],
    *,
    masks: bool,
    head: Head = "mlp",
    anchor_sizes: Sequence[float] | None = None,
    anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    proposals: int = 1000,
    rois_per_image: int = 512,
    score_threshold: float = 0.05,
    max_detections: int = 100,
) -> Heads:
    """Build torchvision's heads.

    Args:
        neck: What they look at.
        num_classes: Without the background.
        img_size: Height and width of the canvas.
        masks: Mask R-CNN instead of Faster R-CNN.
        head: "mlp" (Faster R-CNN's two layers), or "conv" (four convolutions with LayerNorm before
            one layer, and two in the proposals' head, as in ViTDet).
        anchor_sizes: Of each map of the neck; by default 8 strides, but none above the canvas.
        anchor_ratios: Height over width.
        proposals: Boxes that are looked at, of each image.
        rois_per_image: Of these, how many are trained on.
        score_threshold: Below it nothing is reported.
        max_detections: In an image.

    Raises:
        ValueError: If there are not as many anchor sizes as maps.
    """
    sizes = anchor_sizes or default_anchor_sizes(neck.strides, img_size)
    if len(sizes) != len(neck.strides):
        raise ValueError(
            f"anchor_sizes {list(sizes)} are {len(sizes)}, not {len(neck.strides)}: give one for "
            f"each map of the pyramid, which have strides {_shown(neck.strides)}"
        )
    channels, conv = neck.out_channels, head == "conv"
    names = [str(i) for i in range(len(neck.strides) - 1)]
    align = partial(_roi_align, names, neck.strides[:-1])
    options: dict[str, Any] = {
        "rpn_anchor_generator": Anchors(sizes, anchor_ratios, neck.strides),
        "rpn_head": RPNHead(channels, len(anchor_ratios), conv_depth=2 if conv else 1),
        "rpn_pre_nms_top_n_train": 2 * proposals,
        "rpn_pre_nms_top_n_test": proposals,
        "rpn_post_nms_top_n_train": proposals,
        "rpn_post_nms_top_n_test": proposals,
        "box_roi_pool": align(7),
        "box_head": _conv_head(channels) if conv else TwoMLPHead(channels * 7 * 7, HIDDEN),
        "box_batch_size_per_image": rois_per_image,
        "box_score_thresh": score_threshold,
        "box_detections_per_img": max_detections,
    }
    if masks:
        norm = LayerNorm2d if conv else None
        options["mask_roi_pool"] = align(14)
        options["mask_head"] = MaskRCNNHeads(channels, [256] * 4, 1, norm_layer=norm)
    # Its transform would resize and normalise: we do that.
    whole = (MaskRCNN if masks else FasterRCNN)(neck, num_classes + 1, **options)
    whole.rpn.head.register_forward_hook(_to_float)
    whole.roi_heads.box_predictor.register_forward_hook(_to_float)
    if masks:
        whole.roi_heads.mask_predictor.register_forward_hook(_to_float)
    for part in (whole.rpn, whole.roi_heads):
        old = part.fg_bg_sampler
        part.fg_bg_sampler = BoxSampler(old.batch_size_per_image, old.positive_fraction)
    return Heads(whole.rpn, whole.roi_heads)


def default_anchor_sizes(strides: Sequence[float], img_size: tuple[int, int]) -> list[float]:
    """8 strides of each map, or less, so that the largest anchor is no larger than the canvas."""
    scale = min(ANCHOR, max(img_size) / strides[-1])
    return [scale * stride for stride in strides]


def image_list(images: Tensor, sizes: Sequence[tuple[int, int]]) -> ImageList:
    """What torchvision's heads take: images and the height and width that each fills."""
    return ImageList(images, list(sizes))


def _conv_head(channels: int) -> nn.Module:
    return FastRCNNConvFCHead((channels, 7, 7), [256] * 4, [HIDDEN], norm_layer=LayerNorm2d)


def _roi_align(names: list[str], strides: Sequence[float], size: int) -> MultiScaleRoIAlign:
    """RoIAlign with the strides that the maps have.

    torchvision guesses them, as powers of 2, from the largest image of the first batch: images that
    fill a part of the canvas only would mislead it for good.
    """
    align = MultiScaleRoIAlign(names, size, sampling_ratio=2)
    align.scales = [1 / stride for stride in strides]
    align.map_levels = LevelMapper(round(log2(strides[0])), round(log2(strides[-1])))
    return align


def _to_float(module: nn.Module, args: Any, output: Any) -> Any:
    """Go on in float32: scores, offsets of boxes and losses do not bear less."""
    if isinstance(output, Tensor):
        return output.float()
    return type(output)(_to_float(module, args, value) for value in output)


def _shown(strides: Sequence[float]) -> str:
    return ", ".join(f"{stride:g}" for stride in strides)
