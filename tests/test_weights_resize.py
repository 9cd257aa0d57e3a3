"""Positions for another size: the official interpolation, and timm's."""

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor
from torch.nn import functional as F

from simmim.weights.resize import resize_positions, resize_table


def progression(old: int, new: int) -> np.ndarray:
    """Offsets 1, 1 + q, 1 + q + q^2, ... that end at new - 1, with q from 1.01 to 1.5."""
    n = old - 1
    ratios = np.linspace(1.01, 1.5, 2_000_001)
    sums = (1 - ratios**n) / (1 - ratios)
    q = ratios[np.argmin(np.abs(sums - (new - 1)))]
    one_side = np.cumsum(q ** np.arange(n))
    return np.concatenate([-one_side[::-1], [0], one_side])


def expected_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """One spline down, one across; a cubic interpolation through all points is "not a knot"."""
    grid = table.double().numpy().reshape(2 * old[0] - 1, 2 * old[1] - 1, -1)
    for axis in (0, 1):
        at = progression(old[axis], new[axis])
        wanted = np.clip(np.arange(1 - new[axis], new[axis]), at[0], at[-1])
        grid = CubicSpline(at, grid, axis=axis, bc_type="not-a-knot")(wanted)
    return grid.reshape(-1, table.shape[1])


@pytest.mark.parametrize(("old", "new", "extra"), [(6, 7, 0), (7, 12, 3), (4, 3, 3), (3, 24, 0)])
def test_tables_as_the_official_code_resizes_them(old: int, new: int, extra: int) -> None:
    table = torch.randn((2 * old - 1) ** 2 + extra, 2)
    found = resize_table(table, (new, new))
    assert found.shape == ((2 * new - 1) ** 2 + extra, 2)
    assert found.dtype == table.dtype
    rows = (2 * old - 1) ** 2
    expected = expected_table(table[:rows], (old, old), (new, new))
    # The bisection stops within 1e-6 of q, the spline swings between random numbers.
    assert np.abs(found[: (2 * new - 1) ** 2].numpy() - expected).max() < 1e-3
    assert torch.equal(found[len(found) - extra :], table[rows:])


@pytest.mark.parametrize(
    ("old", "new", "row", "expected"),
    [
        (
            4,
            5,
            3,
            "0.99060756 0.94744563 0.4688004 -0.2879033 -0.96139747 "
            "-0.75098723 -0.073492706 0.60802835 0.9129453",
        ),
        (
            3,
            5,
            6,
            "1.3007951 1.3007951 1.4728879 0.735042 -0.50650525 "
            "-1.2823739 -1.2529097 -0.8792339 -0.8792339",
        ),
    ],
)
def test_numbers_of_interp2d(old: int, new: int, row: int, expected: str) -> None:
    # What scipy 1.10 gave, the last to have the interp2d of the official code. On random tables
    # of windows 6 to 7, 12 to 14, 7 to 12, 4 to 3, 14 to 7 and 3 to 24 all digits were equal too.
    side = 2 * old - 1
    table = torch.from_numpy(np.sin(np.arange(side**2)).astype(np.float32))[:, None]
    found = resize_table(table, (new, new)).view(2 * new - 1, 2 * new - 1)
    wanted = torch.tensor([float(number) for number in expected.split()])
    torch.testing.assert_close(found[row], wanted, rtol=0, atol=1e-7)


def test_the_offsets_by_hand() -> None:
    # Window 3 to 4: 1 + q = 3 would be q = 2, which is capped at 1.5: the last offset lies at 2.5,
    # and 3 takes its value.
    table = torch.zeros(25, 1)
    at = torch.tensor([-2.5, -1.0, 0.0, 1.0, 2.5])
    table[:, 0] = (10 * at[:, None] + at[None, :]).flatten()
    found = resize_table(table, (4, 4)).view(7, 7)
    wanted = torch.tensor([-2.5, -2, -1, 0, 1, 2, 2.5])
    torch.testing.assert_close(found, 10 * wanted[:, None] + wanted[None, :], atol=2e-4, rtol=0)


def test_rectangles_are_resized_axis_by_axis() -> None:
    table = torch.randn(7 * 9 + 3, 2)
    found = resize_table(table, (5, 7), old=(4, 5))
    expected = expected_table(table[:63], (4, 5), (5, 7))
    assert np.abs(found[:-3].numpy() - expected).max() < 1e-3
    swapped = resize_table(table, (5, 4), old=(4, 5))
    assert swapped.shape == table.shape
    assert not torch.equal(swapped, table)
    with pytest.raises(ValueError, match="66 relative positions is of no square window"):
        resize_table(table, (5, 7))


@pytest.mark.filterwarnings("ignore")  # timm's interpolation on torch 2.9 and later
def test_tables_as_timm_resizes_them() -> None:
    for extra in (0, 3):
        table = torch.randn(11 * 11 + extra, 2)
        found = resize_table(table, (7, 7), method="timm")
        expected = resize_rel_pos_bias_table(table, (7, 7), (13 * 13 + extra, 2))
        assert torch.equal(found, expected)
        official = resize_table(table, (7, 7))
        assert torch.equal(resize_table(table, (6, 6)), table)  # the right size already
        assert (found - official).abs().max() > 0.01  # linear, not cubic


def test_absolute_positions() -> None:
    positions = torch.randn(1, 1 + 16, 4)
    found = resize_positions(positions, (6, 6), prefix=1)
    assert torch.equal(found[:, :1], positions[:, :1])
    grid = positions[0, 1:].T.reshape(1, 4, 4, 4)
    expected = F.interpolate(grid, (6, 6), mode="bicubic", align_corners=False)
    assert torch.equal(found[0, 1:].T.reshape(1, 4, 6, 6), expected)


def test_absolute_positions_of_rectangles_and_as_timm_does_it() -> None:
    positions = torch.randn(1, 2 + 15, 4)
    found = resize_positions(positions, (2, 3), prefix=2, old=(3, 5))
    timm = resize_positions(positions, (2, 3), prefix=2, old=(3, 5), method="timm")
    assert found.shape == timm.shape == (1, 8, 4)
    expected = resample_abs_pos_embed(positions, [2, 3], [3, 5], num_prefix_tokens=2)
    assert torch.equal(timm, expected)
    assert (found - timm).abs().max() > 0.01  # without antialiasing, with it
    with pytest.raises(ValueError, match="15 positions are of no square image"):
        resize_positions(positions, (2, 3), prefix=2)
