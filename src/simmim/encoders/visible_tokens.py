"""Encode the visible tokens of a plain vision transformer alone, as MAE does.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv:2111.06377, section
3: hidden patches are dropped behind the position embedding, and the decoder gets a mask token in
their place. Each image keeps its own mask; all hide the same number of cells.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from simmim.masking import upsample_mask

PLAIN = (VisionTransformer, Eva, Beit)


def visible_places(
    mask: Bool[Tensor, "b h w"], size: tuple[int, int], hidden_count: int | None = None
) -> Int[Tensor, "b n"]:
    """Where the visible tokens of each image lie, in the order of rows.

    Args:
        mask: Cells, True = hidden.
        size: Height and width of the grid of tokens.
        hidden_count: Cells that are hidden in each image; it is not checked. None: they are
            counted, for which a GPU is waited for.

    Raises:
        ValueError: If images hide different numbers of cells, or all of them.
    """
    cells = mask[0].numel()
    if hidden_count is None:
        counts = sorted(set(mask.flatten(1).sum(1).tolist()))
        if len(counts) > 1 or counts[0] == cells:
            raise ValueError(
                f"the masks hide {' and '.join(map(str, counts))} of {cells} cells: where hidden "
                "tokens are skipped, all images hide the same number and leave a cell visible"
            )
        hidden_count = counts[0]
    visible = (cells - hidden_count) * (size[0] * size[1] // cells)
    hidden = upsample_mask(mask, size).flatten(1)
    # Visible ones first: a stable sort leaves their order alone and its shapes are static.
    return hidden.int().argsort(dim=1, stable=True)[:, :visible]


def restore_grid(
    features: Float[Tensor, "b n d"],
    place: Int[Tensor, "b n"],
    token: Float[Tensor, "1 1 d"],
    size: tuple[int, int],
) -> Float[Tensor, "b d h w"]:
    """Put features where they belong in a grid of this size, and a token everywhere else."""
    grid = token.to(features.dtype).expand(len(features), size[0] * size[1], -1)
    grid = grid.scatter(1, place[:, :, None].expand_as(features), features)
    return grid.transpose(1, 2).unflatten(2, size)  # NLC -> NCHW


class VisibleTokens:
    """Runs a plain vision transformer of timm on visible tokens alone.

    They are picked where timm's own patch dropout would drop them: behind the position embedding,
    beside class and register tokens. Rotary positions (Eva, DINOv3) and the shared relative
    position bias of BEiT, the paper's ViT, are picked alike.

    Args:
        model: The timm model. Without a call of ours it runs as before.
        name: What to call it in errors.

    Raises:
        ValueError: If its blocks have tables of positions of their own.
    """

    def __init__(self, model: Any, name: str) -> None:
        self._prefix: int = model.num_prefix_tokens
        self._kept: Tensor | None = None  # while the model runs
        if isinstance(model, Eva):
            model.patch_drop = self._pick_with_rope
            return
        if any(
            getattr(block.attn, "relative_position_bias_table", None) is not None
            for block in model.blocks
        ):
            raise ValueError(
                f"hidden_tokens 'skip' cannot thin out the relative positions of each block of "
                f"{name}: set encoder_kwargs use_rel_pos_bias to false, and to true "
                "use_shared_rel_pos_bias, as the paper's ViT has it"
            )
        # Bound methods and no closures: the deep copy of an encoder gets hooks of its own.
        model.pos_drop.register_forward_hook(self._pick_tokens)
        if getattr(model, "rel_pos_bias", None) is not None:
            model.rel_pos_bias.register_forward_hook(self._pick_bias)

    def __call__(
        self, model: Any, images: Float[Tensor, "b c H W"], place: Int[Tensor, "b n"]
    ) -> Float[Tensor, "b n d"]:
        """The features of the tokens at these places, without class and register tokens."""
        self._kept = place
        try:
            features: Tensor = model.forward_features(images)
        finally:
            self._kept = None
        return features[:, self._prefix :]

    def _pick(self, tokens: Tensor) -> Tensor:
        assert self._kept is not None
        kept = self._kept[:, :, None].expand(-1, -1, tokens.shape[2])
        prefix, grid = tokens[:, : self._prefix], tokens[:, self._prefix :]
        return torch.cat([prefix, grid.gather(1, kept)], dim=1)

    def _pick_tokens(self, module: Any, args: Any, tokens: Tensor) -> Tensor:
        return tokens if self._kept is None else self._pick(tokens)

    def _pick_with_rope(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        return (tokens if self._kept is None else self._pick(tokens)), self._kept

    def _pick_bias(self, module: Any, args: Any, bias: Tensor) -> Tensor:
        """(1, heads, length, length), or without the 1 -> the kept rows and columns of each."""
        if self._kept is None:
            return bias
        first = torch.arange(self._prefix, device=bias.device).expand(len(self._kept), -1)
        kept = torch.cat([first, self._kept + self._prefix], dim=1)
        pairs = kept[:, :, None] * bias.shape[-1] + kept[:, None, :]
        table = bias.view(-1, bias.shape[-1] ** 2).t()  # places, heads
        return F.embedding(pairs, table).permute(0, 3, 1, 2)
