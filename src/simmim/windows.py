"""Encode the visible tokens of a Swin transformer alone: GreenMIM's grouped windows.

Huang et al., "Green Hierarchical Vision Transformer for Masked Image Modeling", NeurIPS 2022,
arXiv:2205.13515. Under a mask the windows hold uneven numbers of visible tokens. Windows are put
together into groups of about equal size, and attention runs within groups, masked so that no window
sees another. Everything else (norms, projections, MLPs, patch merging) sees visible tokens only.

The paper's code hides the same cells of all images of a GPU's batch, so that one grouping serves
them. Here each image keeps its own mask, as in SimMIM, and windows of all images are grouped
together. The tokens' order makes patch merging a reshape: tokens that are merged lie beside each
other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

HIERARCHICAL = (SwinTransformer, SwinTransformerV2)
Integers = npt.NDArray[np.int64]


class GroupedWindows:
    """Runs Swin or SwinV2 of timm on visible tokens alone.

    A step reads the masks back from the device, as the groups are planned on the host.

    Args:
        model: The timm model; it is not changed.
        name: What to call it in errors.

    Raises:
        ValueError: If its windows do not tile its grids: timm would pad them, and visible tokens
            would attend to the padding.
    """

    def __init__(self, model: Any, name: str) -> None:
        for block in _blocks(model):
            for side, window in zip(block.input_resolution, block.window_size, strict=True):
                if side % window:
                    raise ValueError(
                        f"hidden_tokens 'skip' needs windows that tile the grid, and a window of "
                        f"{window} tokens does not tile {side} of {name}: choose img_size or "
                        "encoder_kwargs window_size so that it does"
                    )

    def __call__(
        self, model: Any, images: Float[Tensor, "b c H W"], place: Int[Tensor, "b n"]
    ) -> Float[Tensor, "b n d"]:
        """The features at these places of the last stage's grid."""
        tokens = model.patch_embed(images)
        rows, columns = _stem_places(place, tokens.shape[2], len(model.layers))
        flat = (rows * tokens.shape[2] + columns)[:, :, None].expand(-1, -1, tokens.shape[3])
        tokens = tokens.flatten(1, 2).gather(1, flat)[:, :, None]  # b, n, 1, d
        across, down = columns.cpu().numpy(), rows.cpu().numpy()
        for level, stage in enumerate(model.layers):
            if level:  # four tokens that are merged lie in two rows of two
                tokens = tokens.reshape(len(tokens), -1, 2, tokens.shape[3])
                down, across = down[:, ::4] >> 1, across[:, ::4] >> 1
            tokens = _run_stage(stage, tokens, down, across)
        return cast(Tensor, model.norm(tokens).flatten(1, 2))


def group(sizes: Integers) -> tuple[Integers, int]:
    """Put windows together into groups, so that attention within all groups costs least.

    As in the paper, the size of a group is searched for, the cost being number x size^2. It is at
    least tokens x size, which ends the search soon. The paper fills each group by dynamic
    programming; here, where a batch has many small windows, the largest that fits is as good.

    Args:
        sizes: Visible tokens of each window, none of them 0.

    Returns:
        The group of each window, and the size of a group.
    """
    size, best, cheapest = int(sizes.max()), None, np.inf
    while sizes.sum() * size < cheapest:
        groups = _pack(sizes, size)
        cost = (groups.max() + 1) * size**2
        if cost < cheapest:
            best, cheapest = (groups, size), cost
        size += 1
    assert best is not None
    return best


def _pack(sizes: Integers, capacity: int) -> Integers:
    """First-fit decreasing, for all windows of a size at once."""
    left = np.bincount(sizes, minlength=capacity + 1)
    order = np.argsort(sizes, kind="stable")
    taken = np.cumsum(left) - left  # place in that order of the next window of each size
    groups, count = np.empty_like(sizes), 0
    while left.any():
        content = _fill(left, capacity)
        times = min(left[size] // number for size, number in content.items())
        for size, number in content.items():
            windows = order[taken[size] : taken[size] + number * times]
            groups[windows] = count + np.arange(number * times) % times
            taken[size] += number * times
            left[size] -= number * times
        count += times
    return groups


def _fill(left: Integers, capacity: int) -> dict[int, int]:
    """How many windows of which size fill one group, the largest first."""
    content = {}
    for size in np.flatnonzero(left)[::-1].tolist():
        if number := min(int(left[size]), capacity // size):
            content[size] = number
            capacity -= number * size
    return content


@dataclass(frozen=True)
class _Plan:
    """Which token stands in which slot of which group, and what may see what."""

    slot: Tensor  # (tokens,): of each token, counted over all groups
    token: Tensor  # (groups, size): in each slot; the first token fills those that are left
    bias: Tensor  # (groups, size, size): place in the table of relative positions
    apart: Tensor  # (groups, 1, size, size): whether two slots are of different windows


def _plan(block: Any, rows: Integers, columns: Integers, device: torch.device) -> _Plan:
    """Plan the groups of one kind of block, from where the visible tokens lie."""
    (height, width), (window_h, window_w) = block.input_resolution, block.window_size
    shift_h, shift_w = block.shift_size
    y, x = (rows - shift_h) % height, (columns - shift_w) % width
    # Swin's shift is cyclic, and what comes round from the other side is a window of its own.
    down = 2 * (y // window_h) + (y >= height - shift_h)
    across = 2 * (x // window_w) + (x >= width - shift_w)
    image = np.arange(len(rows))[:, None]
    window = ((image * 2 * height + down) * 2 * width + across).ravel()
    code = ((y % window_h) * (2 * window_w - 1) + x % window_w).ravel()

    _, window, sizes = np.unique(window, return_inverse=True, return_counts=True)
    groups, size = group(sizes)
    order = np.argsort(groups[window] * len(sizes) + window, kind="stable")
    filled = np.bincount(groups[window])
    start = np.cumsum(filled) - filled
    slot = np.empty_like(order)
    slot[order] = (
        np.arange(len(order)) + (np.arange(len(filled)) * size - start)[groups[window][order]]
    )
    slots = np.zeros((3, len(filled) * size), dtype=np.int64)
    slots[1] = -1
    slots[:, slot] = np.arange(len(slot)), window, code
    on_device = torch.from_numpy(np.concatenate([slot, slots.ravel()])).to(device)
    slot_of, (token, which, at) = on_device[: len(slot)], on_device[len(slot) :].view(3, -1, size)
    centre = (window_h - 1) * (2 * window_w - 1) + window_w - 1
    return _Plan(
        slot=slot_of,
        token=token,
        bias=at[:, :, None] - at[:, None, :] + centre,
        apart=(which[:, :, None] != which[:, None, :])[:, None],
    )


def _run_stage(stage: Any, tokens: Tensor, rows: Integers, columns: Integers) -> Tensor:
    """Run timm's own stage; it is called, as its weights may be gathered for the call only."""
    inside = _unwrapped(stage)
    inside.forward = partial(_through_blocks, inside, rows=rows, columns=columns)
    try:
        return cast(Tensor, stage(tokens))
    finally:
        del inside.forward


def _through_blocks(stage: Any, tokens: Tensor, rows: Integers, columns: Integers) -> Tensor:
    tokens = stage.downsample(tokens)
    plans: dict[Any, _Plan] = {}
    for block in stage.blocks:
        kind = (block.window_size, block.shift_size)
        if kind not in plans:
            plans[kind] = _plan(block, rows, columns, tokens.device)
        if stage.grad_checkpointing:
            tokens = checkpoint(_run_block, block, plans[kind], tokens, use_reentrant=False)
        else:
            tokens = _run_block(block, plans[kind], tokens)
    return tokens


def _run_block(block: Any, plan: _Plan, tokens: Tensor) -> Tensor:
    """Run timm's own block, with attention within groups in place of windows."""
    inside = _unwrapped(block)
    inside._attn = partial(_attend, inside.attn, plan)
    try:
        return cast(Tensor, block(tokens))
    finally:
        del inside._attn


def _unwrapped(module: Any) -> Any:
    """The module itself, where torch's FSDP has wrapped it."""
    return getattr(module, "_fsdp_wrapped_module", module)


def _attend(attn: Any, plan: _Plan, tokens: Float[Tensor, "b m k d"]) -> Float[Tensor, "b m k d"]:
    flat = tokens.flatten(0, 2)
    query, key, value, table = (
        _version_2(attn, flat) if hasattr(attn, "cpb_mlp") else _version_1(attn, flat)
    )
    query, key, value = (
        part.index_select(0, plan.token.flatten())
        .view(*plan.token.shape, attn.num_heads, -1)
        .transpose(1, 2)  # groups, heads, slots, channels
        for part in (query, key, value)
    )
    bias = F.embedding(plan.bias, table).permute(0, 3, 1, 2)  # groups, heads, slots, slots
    bias = bias.masked_fill(plan.apart, -torch.inf).to(query.dtype)
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=1.0)
    out = out.transpose(1, 2).flatten(0, 1).flatten(1).index_select(0, plan.slot)
    return cast(Tensor, attn.proj_drop(attn.proj(out))).view(tokens.shape)


def _version_1(attn: Any, flat: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value (tokens, heads x channels), and the table of biases (places, heads)."""
    query, key, value = attn.qkv(flat).chunk(3, dim=1)
    return query * attn.scale, key, value, attn.relative_position_bias_table


def _version_2(attn: Any, flat: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_version_1`, with SwinV2's cosine attention and continuous positions."""
    bias = None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    query, key, value = F.linear(flat, attn.qkv.weight, bias).chunk(3, dim=1)
    query, key = (
        F.normalize(part.unflatten(1, (attn.num_heads, -1)), dim=-1) for part in (query, key)
    )
    query = query * attn.logit_scale.clamp(max=np.log(100.0)).exp()[:, 0]
    table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
    return query.flatten(1), key.flatten(1), value, 16 * table.sigmoid()


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


def _blocks(model: Any) -> Iterator[Any]:
    return (block for stage in model.layers for block in stage.blocks)
