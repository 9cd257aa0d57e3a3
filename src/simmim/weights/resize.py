"""Positions for another size: tables of relative positions and absolute position embeddings.

"official" is what the released code does (remap_pretrained_keys_swin and _vit in utils.py of
github.com/microsoft/SimMIM; the absolute positions as in utils.py of Swin-Transformer), "timm" is
what timm does with its own pretrained weights: also a geometric progression, but linear
between its points, and an antialiased bicubic.
"""

from math import isqrt
from typing import Literal, cast

import numpy as np
import torch
from scipy.interpolate import RectBivariateSpline
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor
from torch.nn import functional as F

Resize = Literal["official", "timm"]
Size = tuple[int, int]


def resize_table(
    table: Tensor, new: Size, old: Size | None = None, method: Resize = "official"
) -> Tensor:
    """Resize a table of relative position biases.

    Args:
        table: (offsets, heads), the offsets row by row; behind them any number of extra rows, for
            the class token, which are kept.
        new: Height and width of the window that it is for.
        old: Height and width of the window that it was for; by default a square.
        method: "official" or "timm".

    Returns:
        The table for the new window, (offsets, heads).

    Raises:
        ValueError: If the table is of no square window, and old is not given.
    """
    if old is None:
        side = (isqrt(len(table)) + 1) // 2
        old = (side, side)
    extra = len(table) - _offsets(old)
    if extra not in (0, 3):
        raise ValueError(f"a table of {len(table)} relative positions is of no square window")
    shape = (_offsets(new) + extra, table.shape[1])
    if method == "timm":
        return cast(Tensor, resize_rel_pos_bias_table(table, new, shape, old))
    grid, rest = table[: len(table) - extra], table[len(table) - extra :]
    if old != new:
        grid = _resize_official(grid, old, new)
    return torch.cat([grid, rest])


def _offsets(window: Size) -> int:
    return (2 * window[0] - 1) * (2 * window[1] - 1)


def _resize_official(table: Tensor, old: Size, new: Size) -> Tensor:
    """Cubic spline through the old offsets, placed in geometric progression over the new range."""
    y, x = (_progression(a, b) for a, b in zip(old, new, strict=True))
    # Outside the old offsets the official interp2d takes the nearest of them.
    new_y, new_x = (
        np.clip(np.arange(1 - side, side, dtype=np.float64), at[0], at[-1])
        for side, at in ((new[0], y), (new[1], x))
    )
    degrees = {"kx": min(3, len(y) - 1), "ky": min(3, len(x) - 1), "s": 0}
    heads = [
        RectBivariateSpline(y, x, head.reshape(len(y), len(x)), **degrees)(new_y, new_x)
        for head in table.detach().float().T.numpy()
    ]
    resized = torch.from_numpy(np.stack(heads, -1)).to(table.dtype)
    return resized.reshape(-1, table.shape[1])


def _progression(old: int, new: int) -> np.ndarray:
    """Where the offsets of a window of `old` lie in one of `new`: 1, 1 + q, 1 + q + q^2, ...

    The ratio q, from 1.01 to 1.5, is the one at which the last offset meets the end of the new
    range: the last middle that the official bisection tries before its interval is below 1e-6.
    """
    left, right, n, q = 1.01, 1.5, old - 1, 1.01
    while right - left > 1e-6:
        q = (left + right) / 2
        if (1 - q**n) / (1 - q) > new - 1:
            right = q
        else:
            left = q
    distances, distance = [], 1.0
    for i in range(n):
        distances.append(distance)
        distance += q ** (i + 1)  # in this order, to the last digit
    return np.array([-d for d in reversed(distances)] + [0.0] + distances)


def resize_positions(
    positions: Tensor,
    new: Size,
    prefix: int,
    old: Size | None = None,
    method: Resize = "official",
) -> Tensor:
    """Resize absolute position embeddings.

    Args:
        positions: (1, prefix + patches, C).
        new: Rows and columns of patches that they are for.
        prefix: Class and register tokens, whose positions are kept.
        old: Rows and columns that they were for; by default a square.
        method: "official" (bicubic) or "timm" (bicubic, antialiased where it shrinks).

    Returns:
        (1, prefix + new patches, C).

    Raises:
        ValueError: If the positions are of no square, and old is not given.
    """
    side = isqrt(positions.shape[1] - prefix)
    old = old or (side, side)
    if old[0] * old[1] != positions.shape[1] - prefix:
        raise ValueError(f"{positions.shape[1] - prefix} positions are of no square image")
    if method == "timm":
        return cast(Tensor, resample_abs_pos_embed(positions, list(new), list(old), prefix))
    tokens, grid = positions[:, :prefix], positions[:, prefix:]
    grid = grid.unflatten(1, old).permute(0, 3, 1, 2)  # NLC -> NCHW
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([tokens, grid.flatten(2).transpose(1, 2)], dim=1)
