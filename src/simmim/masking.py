"""Which cells of an image are hidden, and what stands in their place.

An image is covered by square cells of `mask_patch_size` pixels. A mask is a bool tensor (B, h, w),
one element a cell, and **True = hidden**, here and in the whole project.

Nothing here has a state. Every draw is an integer hash of a sample's key, and the key is a hash of
(seed, epoch, index of the sample): the mask of a sample is the same on CPU, GPU and TPU, in any
batch, on any number of devices, before and after an interruption. Shapes are static and no value
is read back from the device, so that all of it may be compiled.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

Number = float | int
Numbers = Number | Sequence[Number] | Tensor | np.ndarray
Masking = Callable[..., Tensor]

# Draws of one key for different purposes must not be the same numbers: each has its own stream.
_MASK, _CUT, _COUNT, _NOISE = 1, 2, 3, 4
_RECTANGLES = 16  # in a block mask: they fall short in 1 mask of 400 at ratio 0.9, in 0 at 0.8


def mask_images(
    images: Num[Tensor, "b c H W"],
    mask_ratio: Number | Sequence[Number] = 0.6,
    mask_patch_size: int = 32,
    fill: Numbers | str = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Num[Tensor, "b c H W"], Bool[Tensor, "b h w"]]:
    """Hide random cells of images: SimMIM's masking, done in pixel space.

    Args:
        images: Floats or uint8, on any device. They are not changed.
        mask_ratio: Share of the cells to hide, from 0 to 1 (0.6: the paper's section 4.1), or
            [low, high] to draw each image's share from.
        mask_patch_size: Side of a cell in pixels (32: the paper's section 4.1).
        fill: What the hidden pixels become: a number, one for each channel (a list, tensor or
            array), "zero", "mean" (of the image's visible pixels) or "noise" (standard normal).
        generator: Where the masks' keys are drawn from; torch's global CPU generator if None.

    Returns:
        The masked images, and the mask on their device. Each image hides exactly
        ceil(ratio x cells) cells.

    Raises:
        ValueError: If the image is not a whole number of cells, or the ratio is outside [0, 1].
    """
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), not {tuple(images.shape)}")
    grid = mask_grid((images.shape[2], images.shape[3]), mask_patch_size)
    source = generator.device if generator is not None else torch.device("cpu")
    keys = torch.randint(2**62, (len(images),), generator=generator, device=source)
    keys = keys.to(images.device)
    mask = draw_masks(random_mask, keys, grid, mask_ratio)
    return fill_pixels(images, mask, fill, keys), mask


def mask_count(cells: int, ratio: Number) -> int:
    """Number of cells to hide: ceil(ratio x cells), with the ratio read as the decimal it is.

    0.55 of 100 is 55, where floating point says 56.

    Raises:
        ValueError: If the ratio is outside [0, 1].
    """
    share = _fraction(ratio)
    return -(-cells * share.numerator // share.denominator)


def ratio_range(mask_ratio: Number | Sequence[Number]) -> tuple[Number, Number]:
    """The lowest and the highest ratio of a `mask_ratio`, which is a number or [low, high].

    Raises:
        ValueError: If it is neither, or outside [0, 1].
    """
    if isinstance(mask_ratio, (int, float)):  # no union: torch 2.9 cannot compile one
        mask_ratio = (mask_ratio, mask_ratio)
    ratios = tuple(mask_ratio)
    if len(ratios) != 2 or _fraction(ratios[0]) > _fraction(ratios[1]):
        raise ValueError(f"mask_ratio {mask_ratio} is neither a number nor [low, high], low first")
    return ratios[0], ratios[1]


def mask_grid(img_size: tuple[int, int], mask_patch_size: int) -> tuple[int, int]:
    """Number of cells along an image's height and width.

    Raises:
        ValueError: If a side is not a multiple of `mask_patch_size`, naming sizes that go together.
    """
    height, width = img_size
    if mask_patch_size < 1:
        raise ValueError(f"mask_patch_size {mask_patch_size} must be at least 1 pixel")
    if height % mask_patch_size or width % mask_patch_size:
        size = f"{height} x {width}" if height != width else f"{height}"
        raise ValueError(
            f"img_size {size} is not a multiple of mask_patch_size {mask_patch_size}: "
            f"{_legal_sizes(height, width, mask_patch_size)}"
        )
    return height // mask_patch_size, width // mask_patch_size


def sample_keys(index: Int[Tensor, " b"], seed: int, epoch: int) -> Int[Tensor, " b"]:
    """Hash (seed, epoch, index of the sample) to one int64 key a sample, on the index's device.

    Different samples of an epoch never share a key (each step of the hash is a bijection).
    """
    # Host scalars: they join the device's arithmetic without a copy that would wait for it.
    start = _mix(_mix(torch.tensor(seed, device="cpu")) + epoch)
    return _mix(index.long() + start)


def hash_integers(keys: Int[Tensor, " b"], n: int, stream: int = 0) -> Int[Tensor, "b n"]:
    """Draw n independent integers, uniform in [0, 2^31), for each key.

    Args:
        keys: From `sample_keys`.
        n: How many.
        stream: Draws of the same key in different streams are independent. Masks and fills use
            1 to 4; 0 is everybody else's.
    """
    return _shift(_hash64(keys, n, stream), 33)


def draw_masks(
    masking: Masking,
    keys: Int[Tensor, " b"],
    grid: tuple[int, int],
    mask_ratio: Number | Sequence[Number],
    valid: Bool[Tensor, "b h w"] | None = None,
    **kwargs: object,
) -> Bool[Tensor, "b h w"]:
    """Draw one mask for each key.

    Args:
        masking: A function of `MASKINGS`, or the user's own (given `valid` where there is one).
        keys: From `sample_keys`.
        grid: Cells along height and width.
        mask_ratio: Share of the cells to hide, or [low, high] to draw each sample's share from.
        valid: Cells that may be hidden; the ratio is then a share of these. None: all of them.
        kwargs: Passed on to a user's own masking.

    Raises:
        ValueError: If the masking gives anything but one bool a cell.
    """
    cells = grid[0] * grid[1] if valid is None else valid.flatten(1).sum(1)
    counts = draw_counts(keys, cells, mask_ratio)
    given = {} if valid is None else {"valid": valid}
    mask, shape = masking(keys, grid, counts, **given, **kwargs), (len(keys), *grid)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        name = getattr(masking, "__name__", masking)
        raise ValueError(f"masking {name} gives {found}: return torch.bool {shape}, True = hidden")
    return mask


def draw_counts(
    keys: Int[Tensor, " b"],
    cells: int | Int[Tensor, " b"],
    mask_ratio: Number | Sequence[Number],
) -> Int[Tensor, " b"]:
    """How many of a sample's cells to hide: `mask_count`, also where `cells` is a tensor.

    With a range, uniform over the whole numbers from the lowest ratio's count to the highest's.
    """
    shares = [_fraction(ratio) for ratio in ratio_range(mask_ratio)]
    low, high = (-(-cells * share.numerator // share.denominator) for share in shares)
    if isinstance(low, int) and low == high:  # nothing is left to chance
        return torch.full_like(keys, low)
    draw = hash_integers(keys, 1, _COUNT)[:, 0]
    return low + draw % (high - low + 1)


def random_mask(
    keys: Int[Tensor, " b"],
    grid: tuple[int, int],
    counts: Int[Tensor, " b"],
    *,
    valid: Bool[Tensor, "b h w"] | None = None,
) -> Bool[Tensor, "b h w"]:
    """Hide exactly `counts` cells, each choice equally likely (the paper's section 3.2)."""
    priority = hash_integers(keys, grid[0] * grid[1], _MASK)
    return _hide_first(priority.unflatten(1, grid), counts, valid)


def block_mask(
    keys: Int[Tensor, " b"],
    grid: tuple[int, int],
    counts: Int[Tensor, " b"],
    *,
    valid: Bool[Tensor, "b h w"] | None = None,
) -> Bool[Tensor, "b h w"]:
    """Hide exactly `counts` cells in rectangles, after BEiT's block-wise masking.

    As there (arXiv:2106.08254, algorithm 1), rectangles with an area from 16/196 of the image to
    all that is to be hidden, and sides of at least 0.3 to 1, are laid over each other until enough
    is covered. Otherwise than there, the last one is cut row by row, so that every sample hides the
    same number; and the ratio of short to long side is uniform in 0.3 to 1, upright as often as
    lying, so that all arithmetic is exact in integers.
    """
    cells = torch.arange(grid[0] * grid[1], device=keys.device).view(grid)
    # Rows are counted from above or from below, so that the cut favours neither end.
    upward = hash_integers(keys, 1, _CUT)[:, :, None] % 2 == 1
    raster = torch.where(upward, cells.flip(0, 1), cells)
    covered = _rectangles(keys, grid, counts)
    number = torch.arange(_RECTANGLES, device=keys.device)[:, None, None]
    first = torch.where(covered, number, _RECTANGLES).amin(1)  # the first rectangle on each cell
    return _hide_first(first * cells.numel() + raster, counts, valid)


def square_mask(
    keys: Int[Tensor, " b"],
    grid: tuple[int, int],
    counts: Int[Tensor, " b"],
    *,
    valid: Bool[Tensor, "b h w"] | None = None,
) -> Bool[Tensor, "b h w"]:
    """Hide one square, placed at random (the paper's section 4.1).

    Its side is the square root of `counts`, rounded, and at most the grid's shorter side. So the
    number of hidden cells is `counts` only where that is a square number: 22 of 36 cells becomes
    5 x 5 = 25. Every sample of a fixed ratio hides the same number, unless `valid` cuts the square.
    """
    side = _rounded_root(counts[:, None], torch.ones_like(counts)[:, None], min(grid))
    y, x = hash_integers(keys, 2, _MASK)[:, :, None].unbind(1)
    mask = _span(side, y, grid[0])[:, 0, :, None] & _span(side, x, grid[1])[:, 0, None, :]
    return mask if valid is None else mask & valid


def foreground_mask(
    keys: Int[Tensor, " b"],
    grid: tuple[int, int],
    counts: Int[Tensor, " b"],
    *,
    valid: Bool[Tensor, "b h w"] | None = None,
) -> Bool[Tensor, "b h w"]:
    """Hide `counts` of the valid cells, and no others (see `foreground_cells`).

    Raises:
        ValueError: If `valid` is not given.
    """
    if valid is None:
        raise ValueError("foreground masking needs `valid`: draw it with foreground_cells(images)")
    return random_mask(keys, grid, counts, valid=valid)


MASKINGS: Mapping[str, Masking] = {
    "random": random_mask,
    "block": block_mask,
    "square": square_mask,
    "token": random_mask,  # its cells are the encoder's own patches
    "foreground": foreground_mask,
}


def foreground_cells(
    images: Num[Tensor, "b c H W"],
    grid: tuple[int, int],
    nodata: Number | None = None,
    mask_channel: int | None = None,
) -> Bool[Tensor, "b h w"]:
    """The cells in which any pixel is data.

    Args:
        images: As they were read, before any normalisation.
        grid: Cells along height and width.
        nodata: The value that means "no data" (0 if None). NaN never is data.
        mask_channel: The channel that tells. None: a pixel is data where any channel is.
    """
    channels = images if mask_channel is None else images.select(1, mask_channel)[:, None]
    data = channels != (0 if nodata is None else nodata)
    if images.is_floating_point():
        data = data & ~channels.isnan()
    height, width = images.shape[2] // grid[0], images.shape[3] // grid[1]
    return data.any(1).unflatten(2, (-1, width)).unflatten(1, (-1, height)).any(4).any(2)


def upsample_mask(mask: Bool[Tensor, "b h w"], size: tuple[int, int]) -> Bool[Tensor, "b 1 H W"]:
    """Repeat each cell of a mask up to `size`: of an image, of tokens or of a target.

    Raises:
        ValueError: If `size` is not a whole multiple of the mask's.
    """
    batch, height, width = mask.shape
    if size[0] % height or size[1] % width:
        raise ValueError(
            f"a mask of {height} x {width} cells does not divide a size of {size[0]} x {size[1]}"
        )
    blocks = mask[:, None, :, None, :, None].expand(
        batch, 1, height, size[0] // height, width, size[1] // width
    )
    return blocks.reshape(batch, 1, *size)


def fill_pixels(
    images: Num[Tensor, "b c H W"],
    mask: Bool[Tensor, "b h w"],
    fill: Numbers | str,
    keys: Int[Tensor, " b"] | None = None,
) -> Num[Tensor, "b c H W"]:
    """Put something else in place of the hidden pixels; the input is not changed.

    Args:
        images: Floats or integers.
        mask: At the resolution of the cells.
        fill: A number, one for each channel, "zero", "mean" (of the image's visible pixels, for
            each channel; 0 where none is visible) or "noise" (standard normal, a hash of the key).
        keys: What the noise is drawn from; the sample's place in the batch if None.

    Raises:
        ValueError: If the fill is not one of these, or the images' integers cannot hold it.
    """
    hidden = upsample_mask(mask, (images.shape[2], images.shape[3]))
    if keys is None:
        keys = torch.arange(len(images), device=images.device)
    value = _fill_value(images, hidden, fill, keys)
    return torch.where(hidden, value, images)


def visible_distance(mask: Bool[Tensor, "b h w"], mask_patch_size: int) -> Float[Tensor, "b H W"]:
    """Distance in pixels of each pixel from the nearest visible one; infinite if none is."""
    rows, columns = (_squared_distance(n, mask_patch_size, mask.device) for n in mask.shape[1:])
    hidden = torch.where(mask, math.inf, 0.0)
    # Exact in two passes: to the nearest visible cell of each column of cells (b, H, w), then to
    # the nearest of all columns; one after the other, as (b, H, W, w) is a lot of memory.
    vertical = (rows[:, :, None] + hidden[:, None]).amin(2)
    squared = vertical[:, :, :1] + columns[:, 0]
    for j in range(1, mask.shape[2]):
        squared = torch.minimum(squared, vertical[:, :, j, None] + columns[:, j])
    return squared.sqrt()


def average_distance(mask: Bool[Tensor, "b h w"], mask_patch_size: int) -> Float[Tensor, " b"]:
    """AvgDist: how far a hidden pixel is from the nearest visible one (the paper's section 4.1).

    Returns:
        The Euclidean distance between pixel centres, in pixels, averaged over the hidden pixels.
        NaN where nothing is hidden or nothing is visible: average with `torch.nanmean`.
    """
    distance = visible_distance(mask, mask_patch_size)
    mean = distance.sum((1, 2)) / (mask.sum((1, 2)) * mask_patch_size**2)
    return torch.where(mean.isinf(), math.nan, mean)


def _fraction(ratio: Number) -> Fraction:
    if not 0 <= ratio <= 1:
        raise ValueError(f"mask_ratio {ratio} is not between 0 and 1")
    # The decimal that was meant, not the binary number next to it; and small enough for int64.
    return Fraction(str(float(ratio))).limit_denominator(10**9)


def _legal_sizes(height: int, width: int, cell: int) -> str:
    near_height, near_width = (
        " or ".join(map(str, sorted({max(side // cell, 1) * cell, -(-side // cell) * cell})))
        for side in (height, width)
    )
    sizes = f"a height of {near_height} and a width of {near_width}"
    shared = math.gcd(height, width)
    cells = sorted(range(1, shared + 1), key=lambda n: (shared % n > 0, abs(n - cell)))
    legal = sorted(n for n in cells[:4] if shared % n == 0)
    return (
        f"use {near_height if height == width else sizes}, "
        f"or a mask_patch_size of {' or '.join(map(str, legal))}"
    )


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al. 2014) on int64: a bijection; products wrap."""
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: int64's own repeats the sign, and XLA's rounds towards 0."""
    return ((x & (2**63 - 1)) >> bits) + (x < 0) * 2 ** (63 - bits)


def _hash64(keys: Int[Tensor, " b"], n: int, stream: int) -> Int[Tensor, "b n"]:
    # Counted in ones: torch.compile works a product of arange out as if integers had no end.
    return _mix(_mix(keys ^ (stream << 40))[:, None] + torch.arange(n, device=keys.device))


def _hide_first(
    priority: Int[Tensor, "b h w"], counts: Int[Tensor, " b"], valid: Bool[Tensor, "b h w"] | None
) -> Bool[Tensor, "b h w"]:
    """Hide the `counts` cells of lowest priority, among the valid ones."""
    place = torch.arange(math.prod(priority.shape[1:]), device=priority.device)
    unique = priority.flatten(1) * len(place) + place  # no ties: any sort gives the same order
    if valid is not None:
        unique = torch.where(valid.flatten(1), unique, torch.iinfo(torch.int64).max)
    hide = place < counts[:, None]
    hidden = torch.zeros_like(hide).scatter(1, unique.argsort(1), hide).view(priority.shape)
    return hidden if valid is None else hidden & valid


def _rectangles(
    keys: Int[Tensor, " b"], grid: tuple[int, int], counts: Int[Tensor, " b"]
) -> Bool[Tensor, "b n h w"]:
    """The cells that each of a sample's rectangles covers."""
    draws = hash_integers(keys, 5 * _RECTANGLES, _MASK).unflatten(1, (5, _RECTANGLES))
    area, ratio, upright, y, x = draws.unbind(1)
    most = counts[:, None]
    least = most.clamp(max=grid[0] * grid[1] * 16 // 196)
    area = least + area % (most - least + 1)
    ratio = 300 + ratio % 701  # of short to long side, in thousandths
    thousand = torch.full_like(ratio, 1000)
    short = _rounded_root(area * ratio, thousand, max(grid))
    long = _rounded_root(area * thousand, ratio, max(grid))
    height = torch.where(upright % 2 == 1, long, short)
    rows, columns = _span(height, y, grid[0]), _span(short + long - height, x, grid[1])
    return rows[:, :, :, None] & columns[:, :, None, :]


def _rounded_root(
    numerator: Int[Tensor, "b n"], denominator: Int[Tensor, "b n"], most: int
) -> Int[Tensor, "b n"]:
    """round(sqrt(numerator / denominator)), at most `most`, without a float that may round."""
    halves = 2 * torch.arange(1, most + 1, device=numerator.device) - 1  # 2 (k - 1/2)
    squares = halves**2 * denominator[..., None]
    return (squares <= 4 * numerator[..., None]).sum(-1)


def _span(
    length: Int[Tensor, "b n"], draw: Int[Tensor, "b n"], size: int
) -> Bool[Tensor, "b n size"]:
    """True over `length` places in a row of `size`, beginning anywhere it fits."""
    length = length.clamp(max=size)
    start = draw % (size - length + 1)
    place = torch.arange(size, device=draw.device)
    return (place >= start[..., None]) & (place < (start + length)[..., None])


def _fill_value(
    images: Tensor, hidden: Tensor, fill: Numbers | str, keys: Tensor
) -> Tensor | Number:
    if isinstance(fill, Tensor | np.ndarray | np.generic):
        return _numbers(images, fill.flatten().tolist())
    if fill == "zero":
        return 0
    if fill == "mean":
        return _visible_mean(images, hidden)
    if fill == "noise" and images.is_floating_point():
        return _noise(keys, images)
    if isinstance(fill, str):
        raise ValueError(f"fill {fill!r} is none of zero, mean, noise (for floats) or numbers")
    return _numbers(images, [fill] if isinstance(fill, Number) else list(fill))


def _numbers(images: Tensor, values: list[Number]) -> Tensor | Number:
    """One number, or (c, 1, 1), that the images' type can hold."""
    if len(values) not in (1, images.shape[1]):
        raise ValueError(f"fill has {len(values)} numbers for {images.shape[1]} channels")
    if not images.is_floating_point():
        limits = torch.iinfo(images.dtype)
        if any(value != int(value) or not limits.min <= value <= limits.max for value in values):
            raise ValueError(
                f"fill {values} does not fit into {images.dtype} images: "
                f"use whole numbers from {limits.min} to {limits.max}"
            )
        values = [int(value) for value in values]
    return values[0] if len(values) == 1 else images.new_tensor(values)[:, None, None]


def _visible_mean(images: Tensor, hidden: Tensor) -> Tensor:
    visible = torch.where(hidden, 0, images.float()).sum((2, 3), keepdim=True)
    mean = visible / (~hidden).sum((2, 3), keepdim=True).clamp(min=1)
    return (mean if images.is_floating_point() else mean.round()).to(images.dtype)


def _noise(keys: Tensor, images: Tensor) -> Tensor:
    """Standard normal numbers in the images' shape and type, by Box and Muller's method."""
    size = math.prod(images.shape[1:])
    bits = _hash64(keys, -(-size // 2), _NOISE)
    uniform = [(_shift(bits, place) & 0xFFFFFF).float() * 2**-24 for place in (40, 16)]
    radius = (-2 * (1 - uniform[0]).log()).sqrt()  # 1 - u: in (0, 1]
    angle = 2 * math.pi * uniform[1]
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :size]
    return normal.view(images.shape).to(images.dtype)


def _squared_distance(cells: int, size: int, device: torch.device) -> Float[Tensor, "n cells"]:
    """From each pixel along a side to the nearest pixel of each cell, squared."""
    pixel = torch.arange(cells * size, device=device)[:, None]
    first = torch.arange(0, cells * size, size, device=device)
    return torch.maximum(first - pixel, pixel - first - size + 1).clamp(min=0).float() ** 2
