"""Masks: exact counts, exact frequencies, no state; fills; the foreground; AvgDist."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from jaxtyping import config
from scipy.ndimage import distance_transform_edt
from scipy.stats import chi2, kstest
from torch import Tensor

from simmim.masking import (
    MASKINGS,
    average_distance,
    block_mask,
    draw_counts,
    draw_masks,
    fill_pixels,
    foreground_cells,
    foreground_mask,
    hash_integers,
    mask_count,
    mask_grid,
    mask_images,
    random_mask,
    ratio_range,
    sample_keys,
    square_mask,
    upsample_mask,
    visible_distance,
)
from simmim.testing import check_masking


def keys(n: int, seed: int = 0, epoch: int = 0) -> Tensor:
    return sample_keys(torch.arange(n), seed, epoch)


def hidden_cells(mask: Tensor) -> list[int]:
    return mask.flatten(1).sum(1).unique().tolist()


def assert_uniform(counts: Tensor, p: float = 1e-4) -> None:
    """Pearson's chi-square test."""
    expected = counts.sum() / len(counts)
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    low, high = chi2.ppf([p / 2, 1 - p / 2], len(counts) - 1)
    assert low < statistic < high, f"{statistic} outside {low} .. {high}"


# Counts


@pytest.mark.parametrize(
    ("cells", "ratio", "count"),
    [
        (36, 0.6, 22),  # Swin at 192 px: the released runs' 22 of 36
        (49, 0.6, 30),  # ViT at 224 px
        (100, 0.55, 55),  # 56 in floating point
        (10, 0.1 + 0.2, 3),  # 0.30000000000000004 means 0.3
        (9, 1 / 3, 3),
        (36, 0, 0),
        (36, 1, 36),
        (36, 1e-9, 1),
        (0, 0.6, 0),
        *((100, i / 100, i) for i in (7, 14, 28, 29, 56, 57, 58)),  # products that are inexact
    ],
)
def test_mask_count_is_the_ceiling_of_the_decimal(cells: int, ratio: float, count: int) -> None:
    assert mask_count(cells, ratio) == count
    assert draw_counts(keys(3), cells, ratio).tolist() == [count] * 3
    assert draw_counts(keys(3), torch.full((3,), cells), ratio).tolist() == [count] * 3


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan, [0.6, 0.4], [0.4], [0.1, 0.2, 0.3], [0, 2]])
def test_an_impossible_ratio_is_refused_with_its_value(ratio: float | list[float]) -> None:
    with pytest.raises(ValueError, match=r"mask_ratio .*(-0\.1|1\.1|nan|\[|2)"):
        ratio_range(ratio)


@pytest.mark.parametrize("masking", ["random", "block", "token"])
def test_every_sample_hides_exactly_the_same_number(masking: str) -> None:
    for grid in ((6, 6), (4, 9), (1, 8), (14, 14)):
        for ratio in (0.0, 0.1, 0.6, 0.95, 1.0):
            mask = draw_masks(MASKINGS[masking], keys(100), grid, ratio)
            assert mask.shape == (100, *grid)
            assert hidden_cells(mask) == [mask_count(grid[0] * grid[1], ratio)]


def test_a_range_of_ratios_draws_every_count_equally_often() -> None:
    mask = draw_masks(random_mask, keys(20_000), (6, 6), [0.25, 0.5])
    counts = mask.flatten(1).sum(1).bincount(minlength=37)
    assert counts.nonzero()[:, 0].tolist() == list(range(9, 19))  # ceil(9.0) .. ceil(18.0)
    assert_uniform(counts[9:19])


# The hash


def splitmix64(x: int) -> int:
    """Its finaliser (Steele et al. 2014), in Python's integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@pytest.mark.parametrize(("seed", "epoch", "index"), [(7, 3, 41), (0, 0, 0), (1, 799, 1_281_166)])
def test_keys_draws_and_masks_are_those_of_splitmix64(seed: int, epoch: int, index: int) -> None:
    key = splitmix64((splitmix64((splitmix64(seed) + epoch) % 2**64) + index) % 2**64)
    sample = sample_keys(torch.tensor([index]), seed, epoch)
    assert sample.item() % 2**64 == key
    for stream in (0, 1, 5):
        start = splitmix64(key ^ stream << 40)
        draws = [splitmix64((start + i) % 2**64) >> 33 for i in range(16)]
        assert hash_integers(sample, 16, stream).tolist() == [draws]
        if stream == 1:  # hidden are the cells that draw the lowest numbers
            hidden = sorted(range(16), key=lambda i: draws[i])[:10]
            mask = draw_masks(random_mask, sample, (4, 4), 0.6).flatten()
            assert mask.nonzero()[:, 0].tolist() == sorted(hidden)


def test_draws_are_independent_of_each_other() -> None:
    """Of draw, index, epoch, seed and stream: neighbours' correlations are those of chance."""
    index = torch.arange(20_000)
    first = hash_integers(sample_keys(index, 0, 0), 2)
    others = [
        first[:, 1],
        first[:, 0].roll(1),
        hash_integers(sample_keys(index, 0, 1), 1)[:, 0],
        hash_integers(sample_keys(index, 1, 0), 1)[:, 0],
        hash_integers(sample_keys(index + 1, 0, 1), 1)[:, 0],
        hash_integers(sample_keys(index, 0, 0), 1, stream=1)[:, 0],
    ]
    table = torch.corrcoef(torch.stack([first[:, 0], *others]).double())
    assert (table - torch.eye(len(table))).abs().max() < 5 / len(index) ** 0.5
    for other in others:
        assert_uniform((first[:, 0] % 16 * 16 + other % 16).bincount(minlength=256))


# Random masks


def test_masks_of_neighbouring_samples_and_epochs_overlap_by_chance_only() -> None:
    here = draw_masks(random_mask, keys(20_000), (6, 6), 0.6)
    for other in (
        here.roll(1, 0),
        draw_masks(random_mask, keys(20_000, epoch=1), (6, 6), 0.6),
        draw_masks(random_mask, keys(20_000, seed=1), (6, 6), 0.6),
    ):
        shared = (here & other).flatten(1).sum(1).double()
        # Hypergeometric: 22 of 36 twice, mean 22 x 22 / 36, variance 22 x 22 x 14 x 14 / 36^2 / 35.
        assert abs(shared.mean() - 22 * 22 / 36) < 5 * (2.0914 / 20_000) ** 0.5
        assert abs(shared.var() / 2.0914 - 1) < 0.05


def test_all_choices_of_cells_are_equally_likely() -> None:
    mask = draw_masks(random_mask, keys(21_000), (2, 4), 0.5).flatten(1)
    code = (mask * 2 ** torch.arange(8)).sum(1)
    counts = code.bincount(minlength=256)
    assert (counts > 0).sum() == math.comb(8, 4)
    assert_uniform(counts[counts > 0])


@pytest.mark.parametrize(
    ("masking", "tolerance"),
    [("random", 0), ("block", 0), ("token", 0), ("square", 17 / 36)],  # 4 x 4 of 4 x 9 for 33
)
def test_each_masking_holds_to_what_a_users_own_must(masking: str, tolerance: float) -> None:
    check_masking(MASKINGS[masking], tolerance=tolerance)


def test_masks_are_what_they_were() -> None:
    """Stored on the day they were first drawn: a run interrupted today goes on after an update."""
    stored = {
        "random": [".##....#.#####..", "....#.#.##.#.###"],
        "block": ["........########", ".##..##.###.#..."],
        "square": [".###.###.###....", ".###.###.###...."],
    }
    for masking, expected in stored.items():
        masks = draw_masks(MASKINGS[masking], keys(2, seed=1, epoch=2), (4, 4), 0.5)
        rows = ["".join(".#"[cell] for cell in row) for row in masks.flatten(1).int().tolist()]
        assert rows == expected, masking


# Block and square masks


def test_block_masks_are_of_blocks() -> None:
    """Hidden cells have more hidden neighbours, and are farther from what is visible."""
    sides = {}
    for masking in (random_mask, block_mask):
        mask = draw_masks(masking, keys(100), (14, 14), 0.4)
        alike = (mask[:, 1:] == mask[:, :-1]).float().mean()
        distance = average_distance(mask, 4).mean()
        sides[masking] = alike.item(), distance.item()
        assert len(mask.flatten(1).unique(dim=0)) > 97
    assert sides[random_mask][0] == pytest.approx(0.4**2 + 0.6**2, abs=0.02)
    assert sides[block_mask][0] > 0.88
    assert sides[block_mask][1] > 3 * sides[random_mask][1]


def test_block_masks_favour_no_side() -> None:
    often = draw_masks(block_mask, keys(5000), (6, 6), 0.6).float().mean(0)
    for turned in (often.flip(0), often.flip(1), often.T):
        assert (often - turned).abs().max() < 0.04
    assert often.min() > 0.2
    assert often.max() < 0.95


@pytest.mark.parametrize(
    ("grid", "ratio", "side"),
    [((6, 6), 0.6, 5), ((14, 14), 0.4, 9), ((4, 9), 0.9, 4), ((6, 6), 0, 0)],
)
def test_square_masks_are_squares_anywhere(grid: tuple[int, int], ratio: float, side: int) -> None:
    mask = draw_masks(square_mask, keys(4000), grid, ratio)
    assert hidden_cells(mask) == [side**2]
    rows, columns = mask.any(2), mask.any(1)
    assert torch.equal(mask, rows[:, :, None] & columns[:, None, :])
    assert rows.sum(1).unique().tolist() == columns.sum(1).unique().tolist() == [side]
    places = (grid[0] - side + 1) * (grid[1] - side + 1) if side else 1
    assert len(mask.flatten(1).unique(dim=0)) == places


# Foreground


def test_foreground_hides_the_ratio_of_each_samples_valid_cells_and_nothing_else() -> None:
    valid = torch.rand(500, 6, 6) < torch.rand(500, 1, 1)
    valid[0] = False
    wanted = [math.ceil(round(0.6 * n, 9)) for n in valid.flatten(1).sum(1).tolist()]
    for masking in (foreground_mask, block_mask):
        mask = draw_masks(masking, keys(500), (6, 6), 0.6, valid)
        assert not (mask & ~valid).any()
        assert mask.flatten(1).sum(1).tolist() == wanted
    with pytest.raises(ValueError, match=r"draw it with foreground_cells"):
        draw_masks(foreground_mask, keys(2), (6, 6), 0.6)


def test_a_cell_is_foreground_where_any_pixel_is_data() -> None:
    images = torch.full((1, 2, 8, 12), 7, dtype=torch.uint8)
    images[0, 1, 3, 4] = 8  # the last row of cell (0, 1), which is 4 x 4 pixels
    expected = [[False, True, False], [False] * 3]
    assert foreground_cells(images, (2, 3), nodata=7)[0].tolist() == expected
    assert foreground_cells(images, (2, 3)).all()  # nodata is 0
    channel = torch.zeros(1, 2, 8, 12)
    channel[:, 0] = 1.0
    channel[:, 1, :4] = 1.0  # says which rows are data
    expected = [[True] * 3, [False] * 3]
    assert foreground_cells(channel, (2, 3), mask_channel=1)[0].tolist() == expected
    assert not foreground_cells(torch.full((1, 1, 8, 12), math.nan), (2, 3), nodata=math.nan).any()


# Resolution


def test_upsampling_repeats_cells() -> None:
    mask = draw_masks(random_mask, keys(3), (2, 3), 0.5)
    expected = mask.repeat_interleave(4, 1).repeat_interleave(2, 2)[:, None]
    assert torch.equal(upsample_mask(mask, (8, 6)), expected)
    with pytest.raises(ValueError, match="2 x 3 cells does not divide a size of 8 x 7"):
        upsample_mask(mask, (8, 7))


@pytest.mark.parametrize(
    ("size", "remedy"),
    [
        ((200, 200), "use 192 or 224, or a mask_patch_size of 20 or 25 or 40"),
        ((192, 300), "a height of 192 and a width of 288 or 320, or a mask_"),
        ((28, 28), "use 32, or a mask_patch_size of 4 or 7 or 14 or 28$"),
        ((97, 89), "mask_patch_size of"),
        ((33, 64), "mask_patch_size of"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_some_that_do(
    size: tuple[int, int], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy) as error:
        mask_grid(size, 32)
    sizes, cells = str(error.value).split(": use ")[1].split(", or a mask_patch_size of ")
    assert all(int(word) % 32 == 0 for word in sizes.split() if word.isdigit())
    for cell in cells.split(" or "):
        assert mask_grid(size, int(cell)) == (size[0] // int(cell), size[1] // int(cell))
    with pytest.raises(ValueError, match="mask_patch_size 0 must be at least 1"):
        mask_grid(size, 0)


# Fills


@pytest.mark.parametrize("fill", ["zero", "mean", "noise", 0.5, 1, (0.1, 0.2, 0.3)])
def test_a_fill_leaves_the_visible_pixels_and_the_input_alone(
    fill: float | str | tuple[float, ...],
) -> None:
    mask = draw_masks(random_mask, keys(4), (3, 2), 0.5)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        images = torch.randn(4, 3, 12, 8).to(dtype)
        before = images.clone()
        hidden = upsample_mask(mask, (12, 8)).expand_as(images)
        filled = fill_pixels(images, mask, fill)
        assert filled.dtype == dtype
        assert torch.equal(images, before)
        assert torch.equal(filled[~hidden], images[~hidden])
        other = torch.where(hidden, torch.full_like(images, math.nan), images)
        assert torch.equal(fill_pixels(other, mask, fill), filled)  # nothing hidden gets through


def test_the_values_of_a_fill() -> None:
    images = torch.randn(2, 3, 4, 4)
    mask = torch.tensor([[[True, False]], [[True, True]]])
    assert fill_pixels(images, mask, "zero")[1].eq(0).all()
    for half in (0.5, torch.tensor(0.5)):
        assert fill_pixels(images, mask, half)[1].eq(0.5).all()
    for channels in ([1.0, 2.0, 3.0], torch.tensor([1.0, 2.0, 3.0]), np.array([1, 2, 3])):
        assert fill_pixels(images, mask, channels)[1].mean((1, 2)).tolist() == [1, 2, 3]
    mean = fill_pixels(images, mask, "mean")
    torch.testing.assert_close(mean[0, :, 3, 1], images[0, :, :, 2:].mean((1, 2)))
    assert mean[1].eq(0).all()  # nothing is visible
    whole = torch.tensor([0, 1, 3, 4]).view(1, 1, 1, 4).byte()
    assert fill_pixels(whole, mask[:1], "mean").tolist() == [[[[4, 4, 3, 4]]]]  # 3.5, to even


def test_noise_is_standard_normal_and_depends_on_the_key_alone() -> None:
    images = torch.zeros(8, 3, 65, 65)  # an odd number of pixels
    mask = torch.ones(8, 1, 1, dtype=torch.bool)
    noise = fill_pixels(images, mask, "noise", keys(8))
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    table = torch.corrcoef(noise.flatten(1)) - torch.eye(8)
    assert table.abs().max() < 5 / noise[0].numel() ** 0.5
    assert torch.equal(noise[3:5], fill_pixels(images[3:5], mask[3:5], "noise", keys(8)[3:5]))
    other = fill_pixels(images, mask, "noise", keys(8, epoch=1))
    assert torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1].abs() < 0.02


def test_a_fill_that_the_images_cannot_hold_is_refused() -> None:
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    for fill in (0.5, 256, -1):
        with pytest.raises(ValueError, match=f"{fill}.* whole numbers from 0 to 255"):
            fill_pixels(images, mask, fill)
    with pytest.raises(ValueError, match="2 numbers for 3 channels"):
        fill_pixels(images, mask, [1, 2])
    for pixels, name in ((images.float(), "nois"), (images, "noise")):
        with pytest.raises(ValueError, match=f"'{name}' is none of zero, mean, noise"):
            fill_pixels(pixels, mask, name)


# mask_images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_mask_images_hides_the_ratio_of_32_px_cells(dtype: torch.dtype) -> None:
    images = torch.randint(1, 255, (5, 3, 192, 224)).to(dtype)
    before = images.clone()
    masked, mask = mask_images(images)
    assert mask.shape == (5, 6, 7)
    assert mask.dtype == torch.bool
    assert hidden_cells(mask) == [26]  # ceil(0.6 x 42)
    hidden = upsample_mask(mask, (192, 224)).expand_as(images)
    assert masked.dtype == dtype
    assert masked[hidden].eq(0).all()
    assert torch.equal(masked[~hidden], images[~hidden])
    assert torch.equal(images, before)
    assert len(mask.flatten(1).unique(dim=0)) == 5


def test_mask_images_takes_all_and_nothing_and_refuses_more() -> None:
    images = torch.rand(2, 1, 8, 8)
    masked, mask = mask_images(images, 0, 4)
    assert not mask.any()
    assert torch.equal(masked, images)
    masked, mask = mask_images(images, 1.0, 4, fill=[0.25])
    assert mask.all()
    assert masked.eq(0.25).all()
    assert hidden_cells(mask_images(torch.rand(99, 1, 8, 8), [0.25, 0.75], 4)[1]) == [1, 2, 3]
    assert mask_images(images[:0], 0.5, 4)[1].shape == (0, 2, 2)
    with pytest.raises(ValueError, match=r"mask_ratio 1\.5 is not between 0 and 1"):
        mask_images(images, 1.5, 4)


def test_mask_images_is_reproduced_by_its_generator() -> None:
    images = torch.rand(8, 3, 64, 64)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return mask_images(images, 0.5, 8, generator=generator)[1]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(3)
    first, second = (mask_images(images, 0.5, 8)[1] for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, mask_images(images, 0.5, 8)[1])
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    draw(1)
    assert torch.equal(state, torch.get_rng_state())


# AvgDist


def test_average_distance_is_the_distance_transforms_mean() -> None:
    for grid, size in (((6, 6), 32), ((3, 5), 4), ((14, 14), 3)):
        mask = draw_masks(random_mask, keys(10), grid, 0.7)
        pixels = upsample_mask(mask, (grid[0] * size, grid[1] * size))[:, 0].numpy()
        expected = [distance_transform_edt(one)[one].mean() for one in pixels]
        np.testing.assert_allclose(average_distance(mask, size).numpy(), expected, rtol=1e-5)
    both = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)]).bool()
    assert average_distance(both, 4).isnan().all()


def test_distance_of_each_pixel_by_hand() -> None:
    mask = torch.tensor([[[True, False], [True, True]], [[True, True], [True, True]]])
    root = 2**0.5
    expected = [[2, 1, 0, 0], [2, 1, 0, 0], [5**0.5, root, 1, 1], [8**0.5, 5**0.5, 2, 2]]
    distance = visible_distance(mask, 2)
    torch.testing.assert_close(distance[0], torch.tensor(expected))
    assert distance[1].isinf().all()


@pytest.mark.parametrize(("ratio", "pixels"), [(0.5, 12.5), (0.8, 25.9)])
def test_average_distance_of_random_masks_at_192_px(ratio: float, pixels: float) -> None:
    mask = draw_masks(random_mask, keys(300), (6, 6), ratio)
    assert average_distance(mask, 32).mean().item() == pytest.approx(pixels, abs=0.6)


# Compilation


@pytest.fixture
def _without_shape_checks() -> Iterator[None]:
    """They are the tests' own, and no part of what is compiled."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.slow
@pytest.mark.usefixtures("_without_shape_checks")
@pytest.mark.parametrize("masking", ["random", "block", "square"])
def test_drawing_has_nothing_that_a_compiler_cannot_follow(masking: str) -> None:
    def draw(index: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        key = sample_keys(index, 0, 3)
        valid = foreground_cells(images, (4, 4))
        mask = draw_masks(MASKINGS[masking], key, (4, 4), [0.3, 0.6], valid)
        return fill_pixels(images, mask, "noise", key), mask

    index, images = torch.arange(4), torch.rand(4, 3, 16, 16)
    compiled = torch.compile(draw, backend="eager", fullgraph=True)
    for ours, theirs in zip(draw(index, images), compiled(index, images), strict=True):
        assert torch.equal(ours, theirs)
