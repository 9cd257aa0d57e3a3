"""Encode the visible tokens of a Swin transformer alone, as GreenMIM does.

Huang et al., "Green Hierarchical Vision Transformer for Masked Image Modeling", NeurIPS 2022,
arXiv:2205.13515. Norms, projections, MLPs and patch merging see visible tokens only. The tokens'
order makes patch merging a reshape: tokens that are merged lie beside each other.

Under a mask the windows hold uneven numbers of visible tokens. The paper packs windows into groups
of about equal size, the same for all images of a GPU's batch, which hide the same cells. Here each
image keeps its own mask, as in SimMIM, and attention alone sees whole windows, where the places of
hidden tokens are empty and seen by none: a few hundredths of the arithmetic, for which shapes are
the same in each step, and no mask is read back from the device.
"""

from functools import partial
from math import inf
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from simmim.encoders.attention import position_bias, unit_query_key_value

HIERARCHICAL = (SwinTransformer, SwinTransformerV2)


class VisibleInWindows:
    """Runs Swin or SwinV2 of timm on visible tokens alone.

    Its stages and blocks are told where these lie, and are called as timm calls them: their weights
    may be gathered from shards for the call alone.

    Args:
        model: The timm model. Without a call of ours it runs as before.
        name: What to call it in errors.

    Raises:
        ValueError: If its windows do not tile its grids: timm would pad them, and visible tokens
            would attend to the padding.
    """

    def __init__(self, model: Any, name: str) -> None:
        for stage in model.layers:
            stage.forward = partial(_through_stage, stage)
            for block in stage.blocks:
                block.forward = partial(_through_block, block)
                for side, window in zip(block.input_resolution, block.window_size, strict=True):
                    if side % window:
                        raise ValueError(
                            "hidden_tokens 'skip' needs windows that tile the grid, and a window "
                            f"of {window} tokens does not tile {side} of {name}: choose img_size "
                            "or encoder_kwargs window_size so that it does"
                        )

    def __call__(
        self, model: Any, images: Float[Tensor, "b c H W"], place: Int[Tensor, "b n"]
    ) -> Float[Tensor, "b n d"]:
        """The features at these places of the last stage's grid."""
        tokens = model.patch_embed(images)
        rows, columns = _stem_places(place, tokens.shape[2], len(model.layers))
        flat = (rows * tokens.shape[2] + columns)[:, :, None].expand(-1, -1, tokens.shape[3])
        tokens = tokens.flatten(1, 2).gather(1, flat)[:, :, None]  # b, n, 1, d
        for level, stage in enumerate(model.layers):
            if level:  # four tokens that are merged lie in two rows of two
                tokens = tokens.reshape(len(tokens), -1, 2, tokens.shape[3])
                rows, columns = rows[:, ::4] >> 1, columns[:, ::4] >> 1
            tokens = stage(tokens, rows, columns)
        return cast(Tensor, model.norm(tokens).flatten(1, 2))


def _through_stage(
    stage: Any, tokens: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """What a stage does in place of its own forward, where it is told its tokens' places."""
    if rows is None or columns is None:
        return cast(Tensor, type(stage).forward(stage, tokens))
    tokens = stage.downsample(tokens)
    kinds: dict[Any, tuple[Tensor, Tensor]] = {}
    for block in stage.blocks:
        kind = (*block.window_size, *block.shift_size)
        if kind not in kinds:
            kinds[kind] = _find_windows(block, rows, columns)
        if stage.grad_checkpointing:
            tokens = checkpoint(block, tokens, *kinds[kind], use_reentrant=False)
        else:
            tokens = block(tokens, *kinds[kind])
    return tokens


def _through_block(
    block: Any, tokens: Tensor, slot: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """What a block does in place of its own forward, where it is told its tokens' windows."""
    if slot is None or mask is None:
        return cast(Tensor, type(block).forward(block, tokens))
    if isinstance(block, SwinTransformerV2Block):  # it normalises what a branch gives
        attended = _attend(block.attn, slot, mask, tokens)
        tokens = tokens + block.drop_path1(block.norm1(attended))
        return cast(Tensor, tokens + block.drop_path2(block.norm2(block.mlp(tokens))))
    attended = _attend(block.attn, slot, mask, block.norm1(tokens))
    tokens = tokens + block.drop_path1(attended)
    return cast(Tensor, tokens + block.drop_path2(block.mlp(block.norm2(tokens))))


def _find_windows(
    block: Any, rows: Int[Tensor, "b n"], columns: Int[Tensor, "b n"]
) -> tuple[Int[Tensor, " tokens"], Float[Tensor, "windows 1 slots slots"]]:
    """Find the windows of one kind of block, from where the visible tokens lie.

    Returns:
        The slot of each token, counted over all windows of all images; and what may see what there:
        0 where a slot sees another, else -inf.
    """
    (height, width), (window_h, window_w) = block.input_resolution, block.window_size
    shift_h, shift_w = block.shift_size
    y, x = (rows - shift_h) % height, (columns - shift_w) % width
    window = y // window_h * (width // window_w) + x // window_w
    image = torch.arange(len(rows), device=rows.device)[:, None]
    first = (image * height * width + window * window_h * window_w).flatten()
    slot = first + (y % window_h * window_w + x % window_w).flatten()

    y, x = (torch.arange(side, device=rows.device) for side in (height, width))
    # Swin's shift is cyclic, and what comes round from the other side is a window of its own.
    round_ = 2 * (y >= height - shift_h)[:, None] + (x >= width - shift_w)
    round_ = round_.unflatten(1, (-1, window_w)).unflatten(0, (-1, window_h)).movedim(2, 1)
    round_ = round_.flatten(2).flatten(0, 1)  # windows, slots
    together = (round_[:, :, None] == round_[:, None, :])[:, None]
    filled = torch.zeros(len(rows) * height * width, dtype=torch.bool, device=rows.device)
    filled = filled.index_fill(0, slot, True).view(len(rows), len(together), 1, 1, -1)
    itself = torch.eye(window_h * window_w, dtype=torch.bool, device=rows.device)
    # An empty slot sees itself, as a softmax over nothing is no number.
    seen = (filled & together | itself).flatten(0, 1)
    return slot, torch.where(seen, 0.0, -inf)


def _attend(
    attn: Any,
    slot: Int[Tensor, " tokens"],
    mask: Float[Tensor, "windows 1 slots slots"],
    tokens: Float[Tensor, "b m k d"],
) -> Float[Tensor, "b m k d"]:
    version = _version_2 if hasattr(attn, "cpb_mlp") else _version_1
    visible, bias, scale = version(attn, tokens.flatten(0, 2))
    count, _, size, _ = mask.shape
    slots = visible.new_zeros(count * size, visible.shape[1]).index_copy(0, slot, visible)
    query, key, value = slots.view(count, size, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    bias = (bias + mask).to(query.dtype)
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scale)
    out = out.transpose(1, 2).reshape(count * size, -1).index_select(0, slot)
    return cast(Tensor, attn.proj_drop(attn.proj(out))).view(tokens.shape)


def _version_1(attn: Any, flat: Tensor) -> tuple[Tensor, Tensor, float]:
    """Query, key and value (tokens, 3 x channels), bias (heads, slots, slots), and the scale."""
    return attn.qkv(flat), attn._get_rel_pos_bias()[0], attn.scale


def _version_2(attn: Any, flat: Tensor) -> tuple[Tensor, Tensor, float]:
    """As `_version_1`, with SwinV2's cosine attention and continuous positions."""
    parts = torch.stack(unit_query_key_value(attn, flat), dim=1)
    return parts.flatten(1), position_bias(attn), 1.0


def _stem_places(
    place: Int[Tensor, "b n"], width: int, stages: int
) -> tuple[Int[Tensor, "b m"], Int[Tensor, "b m"]]:
    """Rows and columns of the stem's tokens inside tokens of the last stage.

    Four that are merged lie beside each other, row by row; so do the four of each of these, ...:
    the bits of a token's number are those of row and column in turn (a Z-order curve).
    """
    doublings = stages - 1
    last = width >> doublings
    number = torch.arange(4**doublings, device=place.device)
    row, column = torch.zeros_like(number), torch.zeros_like(number)
    for bit in range(doublings):
        column |= (number >> 2 * bit & 1) << bit
        row |= (number >> 2 * bit + 1 & 1) << bit
    rows = (place // last << doublings)[:, :, None] + row
    columns = (place % last << doublings)[:, :, None] + column
    return rows.flatten(1), columns.flatten(1)
