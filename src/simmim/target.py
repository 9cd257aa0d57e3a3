"""What is to be predicted: normalised images -> target, and a prediction back to a picture.

A target says how many channels the head must give, how many pixels one element of it covers and
which losses go with it. It is computed from visible and hidden pixels alike, in float32; only a
teacher runs in the precision of the step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float, Int
from timm.data.constants import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from timm.data.constants import IMAGENET_DEFAULT_STD as IMAGENET_STD
from torch import Tensor, nn
from torch.nn import functional as F

Values = Sequence[float]
Pair = tuple[int, int]
Size = int | Sequence[int] | None  # height and width in pixels, or one number for both
Images = Float[Tensor, "b c H W"]
Picture = Float[Tensor, "b 3 H W"]


class Target(nn.Module):
    """What all targets have in common. A subclass computes `forward`, and may show itself.

    Options that do not fit the images raise a ValueError.

    Args:
        in_chans: Channels of the images.
        img_size: Height and width of the images in pixels.
        mean: Of each channel, for pixels in 0..1: how the images were normalised.
        std: Likewise.

    Attributes:
        out_chans: Channels that the prediction must have.
        stride: Pixels that one element of the target covers, along a side.
        losses: Names of the losses it goes with.
    """

    losses: tuple[str, ...] = ("l1", "l2", "smooth_l1")
    mean: Tensor  # buffers, of targets that need them
    std: Tensor

    def __init__(self, in_chans: int, img_size: Pair, mean: Values, std: Values) -> None:
        super().__init__()
        self.in_chans = self.out_chans = in_chans
        self.stride = 1

    def to_pixels(self, prediction: Tensor, images: Tensor) -> Tensor | None:
        """Show a prediction as normalised pixels, (B, C, H, W); None where it is no picture.

        What the target left out (the mean and contrast of a patch) is taken from the true images.
        """
        return None

    def picture(self, tensor: Tensor, reference: Tensor | None = None) -> Tensor:
        """Show a target or prediction that is no picture as one, (B, 3, H, W) in 0..1.

        With the target as `reference`, a prediction is drawn in its colours (here: grays).
        """
        known = (tensor if reference is None else reference).float().mean(1, keepdim=True)
        scale = (known.amax() - known.amin()).clamp(min=1e-6)
        gray = (tensor.float().mean(1, keepdim=True) - known.amin()) / scale
        return _enlarge(gray.clamp(0, 1), self.stride).expand(-1, 3, -1, -1)


class Pixels(Target):
    """The normalised pixels themselves (SimMIM, section 3.4), or those of a smaller image.

    The official code has nothing of the paper's ablation of the resolution. Here each element is
    the mean of the pixels it covers, so that the target of a hidden cell depends on no visible one.

    Args:
        size: Height and width of the smaller image, or one number for both; None: the image's own.
    """

    def __init__(
        self, in_chans: int, img_size: Pair, mean: Values, std: Values, size: Size = None
    ) -> None:
        super().__init__(in_chans, img_size, mean, std)
        self.stride = _stride_of_size(img_size, size)

    def forward(self, images: Images) -> Float[Tensor, "b c h w"]:
        """Mean of the pixels that each element covers."""
        return F.avg_pool2d(images.float(), self.stride) if self.stride > 1 else images.float()

    def to_pixels(self, prediction: Float[Tensor, "b c h w"], images: Images) -> Images:
        """Give each pixel the value of its element."""
        return _enlarge(prediction.float(), self.stride)


class LocallyNormalized(Target):
    """Pixels less the mean, over the deviation, of their surroundings (variance + 1e-6)."""

    surroundings: Callable[[Tensor], tuple[Tensor, Tensor]]  # mean, unbiased variance

    def forward(self, images: Images) -> Images:
        """Pixels in units of their surroundings' deviation, from their surroundings' mean."""
        mean, variance = self.surroundings(images.float())
        return (images.float() - mean) / (variance + 1e-6).sqrt()

    def to_pixels(self, prediction: Images, images: Images) -> Images:
        """Put the true image's local mean and contrast back."""
        mean, variance = self.surroundings(images.float())
        return prediction.float() * (variance + 1e-6).sqrt() + mean


class NormalizedPixels(LocallyNormalized):
    """Pixels normalised by a window that slides over each channel (SwinV2's, for SimMIM).

    As in the official `norm_targets`, windows at the border count the pixels inside the image
    alone. The same numbers in exact arithmetic; but the official float32 sums over 2,209 pixels are
    so coarse that a flat image becomes noise of 0.02. Here the image's mean is taken off first and
    rows are summed before columns, which is also 14 times as fast.

    Args:
        window: Side of the window in pixels, odd. 47: SwinV2's.
    """

    def __init__(
        self, in_chans: int, img_size: Pair, mean: Values, std: Values, window: int = 47
    ) -> None:
        super().__init__(in_chans, img_size, mean, std)
        if window < 3 or window % 2 == 0:
            raise ValueError(
                f"window {window} of target 'normalized_pixels' has no pixel in its centre: "
                "use an odd number from 3, such as 47"
            )
        self.window = window

    def surroundings(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the window around each pixel, each (B, C, H, W)."""
        level = images.mean((2, 3), keepdim=True)
        images = images - level
        mean, square = self._window_mean(images), self._window_mean(images**2)
        rows, columns = (self._inside(side, images.device) for side in images.shape[2:])
        count = rows[:, None] * columns
        return mean + level, ((square - mean**2) * (count / (count - 1))).clamp(min=0)

    def _window_mean(self, images: Tensor) -> Tensor:
        k, pad = self.window, self.window // 2
        rows = F.avg_pool2d(images, (1, k), 1, (0, pad), count_include_pad=False)
        return F.avg_pool2d(rows, (k, 1), 1, (pad, 0), count_include_pad=False)

    def _inside(self, side: int, device: torch.device) -> Tensor:
        """How many pixels of the window lie inside the image, at each place along a side."""
        place, reach = torch.arange(side, device=device), self.window // 2
        return (place + reach).clamp(max=side - 1) - (place - reach).clamp(min=0) + 1


class PatchNormalizedPixels(LocallyNormalized):
    """Pixels normalised by their patch, over all its channels together (MAE's `norm_pix_loss`).

    Args:
        patch_size: Side of a patch in pixels. 16: MAE's, whatever the encoder's own.
    """

    def __init__(
        self, in_chans: int, img_size: Pair, mean: Values, std: Values, patch_size: int = 16
    ) -> None:
        super().__init__(in_chans, img_size, mean, std)
        _check_multiple(img_size, patch_size, "patch_size")
        self.patch_size = patch_size

    def surroundings(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each pixel's patch, each (B, 1, H, W)."""
        p = self.patch_size
        patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # b c h p w p
        variance, mean = torch.var_mean(patches, (1, 3, 5))
        return _enlarge(mean[:, None], p), _enlarge(variance[:, None], p)


class HOG(Target):
    """Histograms of oriented gradients (MaskFeat, arXiv:2112.09133, section 3.2).

    As in PySlowFast's `HOGLayerC` for images: for each channel, Sobel gradients with reflected
    borders, orientations without sign in `bins`, weighted by their magnitude, summed over cells and
    scaled to length 1 over the bins; no Gaussian window. The scale and the offset of a channel
    cancel, so the normalisation of the images does not matter. Differences are taken before sums,
    so that a flat cell is exactly 0, where rounding errors would become a vector of length 1.

    Args:
        cell: Side of a cell in pixels. 8: MaskFeat's.
        bins: Orientations in half a turn. 9: MaskFeat's.
    """

    losses = ("l2", "l1", "smooth_l1")  # MaskFeat's is l2

    def __init__(
        self, in_chans: int, img_size: Pair, mean: Values, std: Values, cell: int = 8, bins: int = 9
    ) -> None:
        super().__init__(in_chans, img_size, mean, std)
        _check_multiple(img_size, cell, "cell")
        if bins < 2:
            raise ValueError(f"bins {bins} of target 'hog' is too few: use at least 2, such as 9")
        self.bins, self.stride, self.out_chans = bins, cell, in_chans * bins

    def forward(self, images: Images) -> Float[Tensor, "b cn h w"]:
        """Histograms, from 0 to 1: the bins of channel 0, then those of channel 1, ..."""
        padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
        across = padded[..., :-2] - padded[..., 2:]  # left less right
        across = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
        down = padded[..., :-2, :] - padded[..., 2:, :]  # upper less lower
        down = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
        magnitude = (across**2 + down**2).sqrt()
        bin_ = (torch.atan2(across, down) / math.pi * self.bins).floor() % self.bins
        sums = [F.avg_pool2d(magnitude * (bin_ == k), self.stride) for k in range(self.bins)]
        return F.normalize(torch.stack(sums, 2), dim=2).flatten(1, 2)

    def picture(self, tensor: Tensor, reference: Tensor | None = None) -> Picture:
        """Draw a star in each cell: a line along the edges of each bin, as bright as it is full.

        Of three channels and more the first three are the colours; fewer are drawn in gray.
        """
        histograms = tensor.float().unflatten(1, (self.in_chans, self.bins)).clamp(0, 1)
        histograms = histograms[:, : 3 if self.in_chans >= 3 else 1]
        lines = self._lines(tensor.device)[:, None, :, None, :]  # n, 1, cell, 1, cell
        stars = (histograms[..., None, :, None] * lines).amax(2)  # b, c, h, cell, w, cell
        return stars.flatten(4, 5).flatten(2, 3).expand(-1, 3, -1, -1)

    def _lines(self, device: torch.device) -> Tensor:
        """A line through the middle of a cell for each bin, (n, cell, cell), from 0 to 1."""
        place = torch.arange(self.stride, device=device) - (self.stride - 1) / 2
        angle = (torch.arange(self.bins, device=device) + 0.5) * math.pi / self.bins
        # A gradient (across, down) = (sin, cos) of the angle; the edge is perpendicular to it.
        x, y = angle.cos()[:, None, None], -angle.sin()[:, None, None]
        return (1 - (place * y - place[:, None] * x).abs()).clamp(min=0)


class Features(Target):
    """Features of a frozen timm model, the teacher, which sees the whole image.

    The teacher is no part of the model that is trained: always in eval mode, without gradients,
    and neither its parameters nor its buffers are in the state dict, in `parameters()` or in the
    optimiser. So it is built again, from its name, when a checkpoint is opened.

    Args:
        teacher: Name of a timm model, or "hf-hub:..." or "local-dir:...".
        pretrained: Whether the teacher has its published weights, which are downloaded once. False:
            random ones, the same in every process and every run.
        weights: A local file or folder with weights of the teacher, in place of the published ones.
        size: Height and width in pixels to which the images are resized for the teacher. A size
            of 196 gives a teacher with patches of 14 px the grid of an encoder with 16 at 224.
        normalize: Whether each feature vector is normalised to mean 0 and variance 1, as is usual
            (data2vec, arXiv:2202.03555; feature distillation, arXiv:2205.14141).
    """

    losses = ("cosine", "smooth_l1", "l1", "l2")
    teacher: nn.Module
    teacher_mean: Tensor
    teacher_std: Tensor

    def __init__(
        self,
        in_chans: int,
        img_size: Pair,
        mean: Values,
        std: Values,
        teacher: str | None = None,
        pretrained: bool = True,
        weights: str | None = None,
        size: Size = None,
        normalize: bool = True,
    ) -> None:
        super().__init__(in_chans, img_size, mean, std)
        _register_statistics(self, mean, std)
        self.size, self.normalize = _pair(size or img_size), normalize
        model = _frozen_teacher(teacher, self.size, in_chans, pretrained, weights)
        # Around nn.Module's registry: not a submodule, so never trained, saved or wrapped by DDP.
        object.__setattr__(self, "teacher", model)
        seen = torch.zeros(1, in_chans, *self.size)
        self.out_chans, self.stride = _chans_and_stride(model, teacher, seen, img_size)
        for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            values = model.pretrained_cfg.get(name) or default  # type: ignore[operator, union-attr]
            if len(values) != in_chans:
                values = [sum(values) / len(values)] * in_chans
            self.register_buffer(f"teacher_{name}", _column(values), persistent=False)

    @torch.no_grad()
    def forward(self, images: Images) -> Float[Tensor, "b d h w"]:
        """The teacher's last feature map."""
        if next(self.teacher.parameters()).device != images.device:
            self.teacher.to(images.device)
        raw = images.float() * self.std + self.mean
        seen = (raw - self.teacher_mean) / self.teacher_std
        if self.size != tuple(images.shape[2:]):
            seen = F.interpolate(seen, self.size, mode="bilinear", antialias=True)
        features = _last_features(self.teacher, seen).float()
        if not self.normalize:
            return features
        channels_last = features.movedim(1, -1)
        return F.layer_norm(channels_last, channels_last.shape[-1:]).movedim(-1, 1)

    def picture(self, tensor: Tensor, reference: Tensor | None = None) -> Picture:
        """Draw the reference's three principal components as colours, from -2 to 2 deviations."""
        reference = tensor if reference is None else reference
        rows, known = (x.float().cpu().movedim(1, -1) for x in (tensor, reference))  # NCHW -> NHWC
        rows, known = rows - known.mean((0, 1, 2)), (known - known.mean((0, 1, 2))).flatten(0, 2)
        with torch.autocast("cpu", enabled=False):  # on the CPU: MPS has no eigh
            axes = torch.linalg.eigh(known.mT @ known).eigenvectors[:, -3:].flip(1)
            axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # else random
            scale = 4 * (known @ axes).std(0, correction=0).clamp(min=1e-6)
            colors = (rows @ axes / scale + 0.5).clamp(0, 1)
        return _enlarge(colors.movedim(-1, 1), self.stride).to(tensor.device)


class ColorBins(Target):
    """The class of each pixel's value among equal bins, for each channel (SimMIM, section 3.4).

    The prediction has in_chans x bins channels, the bins of channel 0 first.

    Args:
        bins: Equal bins from 0 to 1. 8 and 256 in the paper's ablation.
        size: Of a smaller image, as in `Pixels`: 256 bins are 768 numbers for each pixel.
    """

    losses = ("cross_entropy",)

    def __init__(
        self,
        in_chans: int,
        img_size: Pair,
        mean: Values,
        std: Values,
        bins: int = 8,
        size: Size = None,
    ) -> None:
        super().__init__(in_chans, img_size, mean, std)
        if bins < 2:
            raise ValueError(f"bins {bins} of target 'color_bins' is too few: use 8 or 256")
        _register_statistics(self, mean, std)
        self.bins, self.out_chans = bins, in_chans * bins
        self.stride = _stride_of_size(img_size, size)

    def forward(self, images: Images) -> Int[Tensor, "b c h w"]:
        """Classes from 0 (black) to bins - 1."""
        values = F.avg_pool2d(images.float(), self.stride) * self.std + self.mean
        return (values * self.bins).floor().long().clamp(0, self.bins - 1)

    def to_pixels(self, prediction: Float[Tensor, "b cn h w"], images: Images) -> Images:
        """The middle of each pixel's likeliest bin."""
        likeliest = prediction.unflatten(1, (self.in_chans, self.bins)).argmax(2)
        values = (likeliest + 0.5) / self.bins
        return _enlarge((values - self.mean) / self.std, self.stride)


TARGETS: Mapping[str, type[Target]] = {
    "pixels": Pixels,
    "normalized_pixels": NormalizedPixels,
    "patch_normalized_pixels": PatchNormalizedPixels,
    "hog": HOG,
    "features": Features,
    "color_bins": ColorBins,
}


def _register_statistics(target: Target, mean: Values, std: Values) -> None:
    """Keep the normalisation in buffers, which follow the data that a model is trained on."""
    target.register_buffer("mean", _column(mean))
    target.register_buffer("std", _column(std))


def _column(values: Values) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def _pair(size: int | Sequence[int]) -> Pair:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _stride(img_size: Pair, grid: Pair) -> int:
    """Pixels along the side of one cell of a grid over the image; 0 if they are no whole number."""
    stride = img_size[0] // max(grid[0], 1)
    return stride if (grid[0] * stride, grid[1] * stride) == img_size else 0


def _stride_of_size(img_size: Pair, size: Size) -> int:
    if stride := _stride(img_size, _pair(size or img_size)):
        return stride
    legal = [n for n in (2, 4, 8, 16, 32) if img_size[0] % n == 0 and img_size[1] % n == 0]
    sizes = [f"[{img_size[0] // n}, {img_size[1] // n}]" for n in legal]
    raise ValueError(
        f"size {size} of the target is not img_size {list(img_size)} divided by a whole number: "
        f"use {' or '.join(sizes) or 'an img_size that is a multiple of it'}"
    )


def _check_multiple(img_size: Pair, side: int, what: str) -> None:
    shared = math.gcd(*img_size)
    if side >= 2 and shared % side == 0:
        return
    legal = [n for n in range(2, shared + 1) if shared % n == 0]
    near = sorted(sorted(legal, key=lambda n: abs(n - side))[:3])
    raise ValueError(
        f"{what} {side} of the target does not divide img_size {list(img_size)} into whole ones: "
        f"use {' or '.join(map(str, near)) or 'another img_size'}"
    )


def _enlarge(images: Tensor, factor: int) -> Tensor:
    return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def _frozen_teacher(
    name: str | None, size: Pair, in_chans: int, pretrained: bool, weights: str | None
) -> nn.Module:
    if name is None or (":" not in name and not timm.is_model(name)):
        near = get_close_matches((name or "").partition(".")[0], timm.list_models(), n=3)
        raise ValueError(
            f"teacher {name!r} of target 'features' is not a model of timm: set target_kwargs to "
            f"{{teacher: {' or '.join(near) or 'vit_base_patch16_224.dino'}}}, for example"
        )
    options: dict[str, Any] = {"in_chans": in_chans, "pretrained": pretrained}
    if weights:
        if not Path(weights).exists():
            raise ValueError(f"weights {weights!r} of teacher {name!r} do not exist")
        overlay: dict[str, Any] = {
            "file": weights,
            "source": "local-dir" if Path(weights).is_dir() else "",
            "custom_load": weights.endswith(".npz"),  # older timm takes any file for JAX's
        }
        options |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        model = _build(name, size, **options)
    except Exception as error:  # the hub's client alone raises those of three libraries
        raise ValueError(
            f"teacher {name!r} cannot be had ({_reason(error)}): name a local file of its weights "
            "(weights, in target_kwargs), or set pretrained to false for a random one"
        ) from error
    # timm says nothing of what a file lacks: there, a model from another seed is another.
    if weights and (missing := _first_difference(model, _build(name, size, seed=1, **options))):
        raise ValueError(f"weights {weights!r} are not teacher {name!r}'s: they lack {missing}")
    return model.eval().requires_grad_(False)


def _build(name: str, size: Pair, seed: int = 0, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)  # a random teacher must be the same in each process and each run
        try:
            return timm.create_model(name, num_classes=0, img_size=size, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return timm.create_model(name, num_classes=0, **options)  # convolutions: any size


def _first_difference(model: nn.Module, twin: nn.Module) -> str | None:
    """Name of the first parameter in which two models differ."""
    pairs = zip(model.named_parameters(), twin.parameters(), strict=True)
    return next((name for (name, ours), theirs in pairs if not torch.equal(ours, theirs)), None)


def _last_features(teacher: nn.Module, images: Tensor) -> Tensor:
    last: list[Tensor] = teacher.forward_intermediates(  # type: ignore[operator]
        images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
    )
    return last[0]


@torch.no_grad()
def _chans_and_stride(
    teacher: nn.Module, name: str | None, images: Tensor, img_size: Pair
) -> tuple[int, int]:
    try:
        _, chans, height, width = _last_features(teacher, images).shape
        if stride := _stride(img_size, (height, width)):
            return chans, stride
        raise ValueError(f"{height} x {width} do not divide img_size {list(img_size)} evenly")
    except Exception as error:  # whatever a model of timm may object to
        raise ValueError(
            f"teacher {name!r} gives no features of {images.shape[2]} x {images.shape[3]} px "
            f"({_reason(error)}): set another size in target_kwargs, or name another teacher"
        ) from error


def _reason(error: Exception) -> str:
    """The first sentence of what somebody else's error says."""
    return str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".") or repr(error)
