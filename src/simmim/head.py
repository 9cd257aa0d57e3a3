"""Feature map of the encoder -> prediction of the target.

In every head a feature vector predicts the target elements that it covers, and the end is the
paper's: a 1x1 convolution to upsample^2 x out_chans channels and a pixel shuffle, in the order
(channel, row, column). `upsample` is the encoder's stride over the target's, a whole number. Where
the target is coarser than the features it is 1 over a whole number n: then each head begins with
the mean of the n x n features that an element covers.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm

from jaxtyping import Float
from timm.layers import build_sincos2d_pos_embed
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

Upsample = int | Fraction


class LinearHead(nn.Module):
    """One linear layer: the paper's head (section 3.3).

    Args:
        in_features: Channels of the features.
        out_chans: Channels of the prediction.
        upsample: Target elements along the side of one feature, or 1 over the features along the
            side of one element.

    Raises:
        ValueError: If `upsample` is neither a whole number nor 1 over one.
    """

    def __init__(self, in_features: int, out_chans: int, upsample: Upsample) -> None:
        super().__init__()
        self.pool, factor = _resolve(upsample)
        self.proj = nn.Conv2d(in_features, factor**2 * out_chans, kernel_size=1)
        self.shuffle = nn.PixelShuffle(factor)

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c H W"]:
        """Predict."""
        return self.shuffle(self.proj(self.pool(features)))

    @property
    def is_pointwise(self) -> bool:
        """Whether each feature predicts its own elements, whatever lies beside it."""
        return isinstance(self.pool, nn.Identity)


class MLPHead(nn.Module):
    """Two linear layers with GELU between them: the "2-layer MLP" of the paper's ablation.

    Args:
        in_features: As of `LinearHead`; so are out_chans and upsample.
        out_chans: Channels of the prediction.
        upsample: Target elements along the side of one feature.
        hidden_features: Channels between the layers; None: as many as the features have.

    Raises:
        ValueError: As of `LinearHead`.
    """

    def __init__(
        self,
        in_features: int,
        out_chans: int,
        upsample: Upsample,
        hidden_features: int | None = None,
    ) -> None:
        super().__init__()
        self.pool, _ = _resolve(upsample)
        hidden = hidden_features or in_features
        self.hidden = nn.Sequential(nn.Conv2d(in_features, hidden, kernel_size=1), nn.GELU())
        self.out = LinearHead(hidden, out_chans, max(upsample, 1))

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c H W"]:
        """Predict."""
        return self.out(self.hidden(self.pool(features)))

    @property
    def is_pointwise(self) -> bool:
        """As of `LinearHead`."""
        return isinstance(self.pool, nn.Identity)


class TransformerHead(nn.Module):
    """A light transformer decoder after MAE's (arXiv:2111.06377), over all tokens.

    Features are projected to `width`, fixed 2-D sin-cos positions are added, and after `depth`
    blocks and a norm the prediction is linear. MAE's own has 8 blocks; in its ablation a single one
    is as good for fine-tuning.

    Args:
        in_features: As of `LinearHead`; so are out_chans and upsample.
        out_chans: Channels of the prediction.
        upsample: Target elements along the side of one feature.
        depth: Transformer blocks. 1.
        width: Channels of the blocks. 512: MAE's.
        num_heads: Attention heads. 16: MAE's.

    Raises:
        ValueError: As of `LinearHead`; if `width` is not a multiple of 4 and of `num_heads`.
    """

    def __init__(
        self,
        in_features: int,
        out_chans: int,
        upsample: Upsample,
        depth: int = 1,
        width: int = 512,
        num_heads: int = 16,
    ) -> None:
        super().__init__()
        if width % 4 or width % num_heads:
            raise ValueError(
                f"width {width} of head 'transformer' is not a multiple of 4 and of its "
                f"{num_heads} heads: use a width of {_multiple(width, num_heads)}"
            )
        self.pool, _ = _resolve(upsample)
        self.embed = nn.Conv2d(in_features, width, kernel_size=1)
        self.blocks = nn.Sequential(*(Block(width, num_heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(_init_linear)
        self.out = LinearHead(width, out_chans, max(upsample, 1))

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c H W"]:
        """Predict."""
        tokens = self.embed(self.pool(features))
        grid = tokens.shape[2:]
        positions = build_sincos2d_pos_embed(
            list(grid), tokens.shape[1], device=tokens.device, dtype=self.embed.weight.dtype
        )
        tokens = tokens.flatten(2).transpose(1, 2) + positions  # NCHW -> NLC
        tokens = self.norm(self.blocks(tokens))
        return self.out(tokens.transpose(1, 2).unflatten(2, grid))  # NLC -> NCHW


class InverseHead(nn.Module):
    """A Swin transformer the other way round: the paper's "inverse Swin-T" and "inverse Swin-B".

    The official code has no such head. Here: Swin's stages in reverse order, each but the first
    entered by the inverse of patch merging (twice the side, half the channels), until a token
    covers 4 x 4 elements of the target, Swin's own patch, which a linear layer predicts. A target
    that needs fewer doublings keeps side and channels in the stages that are left. The first stage,
    like Swin's last, does not shift its windows.

    Args:
        in_features: As of `LinearHead`; so are out_chans and upsample.
        out_chans: Channels of the prediction.
        upsample: Target elements along the side of one feature.
        variant: "tiny" or "base": depths 2, 6, 2, 2 from 768 channels, or 2, 18, 2, 2 from 1024.
        depths: Blocks of each stage, in place of the variant's.
        width: Channels of the first stage, in place of the variant's.
        window_size: Tokens along the side of a window. 7; the paper has 6 at 192 px.

    Raises:
        ValueError: As of `LinearHead`; if the variant is neither, or `width` cannot be halved as
            often as needed.
    """

    def __init__(
        self,
        in_features: int,
        out_chans: int,
        upsample: Upsample,
        variant: str = "tiny",
        depths: Sequence[int] | None = None,
        width: int | None = None,
        window_size: int = 7,
    ) -> None:
        super().__init__()
        if variant not in _INVERSE:
            raise ValueError(f"variant {variant!r} of head 'inverse' is neither tiny nor base")
        depths, width = depths or _INVERSE[variant][0], width or _INVERSE[variant][1]
        self.pool, factor = _resolve(upsample)
        doublings = _doublings(factor, len(depths))
        if width % 2**doublings:
            raise ValueError(
                f"width {width} of head 'inverse' cannot be halved {doublings} times: "
                f"use a multiple of {2**doublings}"
            )
        self.embed = nn.Conv2d(in_features, width, kernel_size=1)
        self.stages = nn.Sequential()
        for i, depth in enumerate(depths):
            if 0 < i <= doublings:
                self.stages.append(_PatchExpanding(width))
                width //= 2
            for j in range(depth):
                shift = window_size // 2 if i and j % 2 else 0
                self.stages.append(_swin_block(width, window_size, shift))
        self.norm = nn.LayerNorm(width)
        self.apply(_init_linear)
        self.out = LinearHead(width, out_chans, factor // 2**doublings)

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c H W"]:
        """Predict."""
        tokens = self.embed(self.pool(features)).permute(0, 2, 3, 1)  # NCHW -> NHWC
        return self.out(self.norm(self.stages(tokens)).permute(0, 3, 1, 2))  # NHWC -> NCHW


HEADS: Mapping[str, type[nn.Module]] = {
    "linear": LinearHead,
    "mlp": MLPHead,
    "transformer": TransformerHead,
    "inverse": InverseHead,
}

_INVERSE = {"tiny": ((2, 6, 2, 2), 768), "base": ((2, 18, 2, 2), 1024)}


class _PatchExpanding(nn.Module):
    """The inverse of Swin's patch merging: (b, h, w, d) -> (b, 2h, 2w, d / 2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.expansion = nn.Linear(dim, 2 * dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        quarters = self.expansion(self.norm(tokens)).unflatten(3, (2, 2, -1))
        return quarters.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


def _resolve(upsample: Upsample) -> tuple[nn.Module, int]:
    """The pooling that a head begins with, and the factor by which it enlarges."""
    ratio = Fraction(upsample)
    if ratio <= 0 or 1 not in (ratio.numerator, ratio.denominator):
        raise ValueError(
            f"a feature cannot predict {ratio} target elements a side: choose a size of the target "
            "whose elements cover a whole number of features, or the reverse"
        )
    pool = nn.Identity() if ratio >= 1 else nn.AvgPool2d(ratio.denominator)
    return pool, ratio.numerator


def _doublings(factor: int, stages: int) -> int:
    """How often the side is doubled: between stages, down to 4 elements a token, while even."""
    doublings = 0
    while doublings < stages - 1 and factor > 4 and factor % 2 == 0:
        doublings, factor = doublings + 1, factor // 2
    return doublings


def _swin_block(width: int, window_size: int, shift: int) -> SwinTransformerBlock:
    """A block that takes any grid: its windows are padded and its mask is made for each input."""
    return SwinTransformerBlock(
        width,
        input_resolution=(window_size, window_size),
        num_heads=max(width // 32, 1),  # Swin's 32 channels a head
        window_size=window_size,
        shift_size=shift,
        always_partition=True,
        dynamic_mask=True,
    )


def _init_linear(module: nn.Module) -> None:
    """Initialise as timm's transformers are: normal weights of deviation 0.02, no biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _multiple(width: int, num_heads: int) -> int:
    """The nearest width from here up that 4 and the heads divide."""
    step = lcm(4, num_heads)
    return -(-width // step) * step
