"""Mean and standard deviation of the pixels, by which the model normalises them."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from simmim.base.files import write_whole
from simmim.base.progress import Bar
from simmim.data.checks import check_choice
from simmim.data.dataset import ImageData, Loader, collate
from simmim.data.decode import UnreadableImage
from simmim.data.mapped import cache_folder
from simmim.data.sampler import choose
from simmim.data.scans import Intensity, Pixels

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel, in 0..1

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0..1; torchvision's and timm's constants
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_SCANS, SCAN_SAMPLE = 1_000, 2**12  # scans, and values of each: four million in all
MAX_IMAGES = 10_000  # their mean is known to a few thousandths of its standard deviation


def imagenet_statistics(in_chans: int) -> Statistics:
    """Take ImageNet's, or for other than three channels the mean of the three."""
    if in_chans == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (sum(IMAGENET_MEAN) / 3,) * in_chans, (sum(IMAGENET_STD) / 3,) * in_chans


def given_statistics(values: Sequence[Sequence[float]], in_chans: int) -> Statistics:
    """Take what the user gives.

    Raises:
        ValueError: If it is not a mean and a std for each channel.
    """
    if len(values) != 2 or any(len(v) != in_chans for v in values) or min(values[1]) <= 0:
        raise ValueError(
            f"data.statistics {list(map(list, values))} is not [means, stds] with {in_chans} "
            "numbers each: give as many as data.in_chans, stds above 0"
        )
    mean, std = (tuple(float(x) for x in v) for v in values)
    return mean, std


def check_statistics(wanted: str | Sequence[Sequence[float]], in_chans: int) -> None:
    """Refuse what is neither a way to find the statistics nor these themselves."""
    if isinstance(wanted, str):
        check_choice("statistics", wanted, ("imagenet", "measured"))
    else:
        given_statistics(wanted, in_chans)


def measured_statistics(data: ImageData, num_workers: int = 0) -> Statistics:
    """Measure the pixels of the images, or of 10,000 of them chosen at random, once.

    What was measured is kept in the user's cache folder, under a key of the files' names, sizes and
    times and of how they are read, so that other processes and later runs need not read them again.

    Args:
        data: The training images with the validation transform.
        num_workers: Processes that read.
    """
    places = choose(len(data), MAX_IMAGES).tolist()
    mean, std = _once("statistics", data, places, lambda: _measure(data, places, num_workers))
    return tuple(mean), tuple(std)


def measured_window(data: ImageData, num_workers: int = 0) -> tuple[float, float] | None:
    """Take the percentiles of the data's intensity over all images, or 1,000 chosen at random.

    Each image counts the same, however large it is. Kept like the statistics.

    Args:
        data: The training images.
        num_workers: Processes that read.

    Returns:
        The two values; None where no image is deeper than 8 bits.
    """
    places = choose(len(data), MAX_SCANS).tolist()
    window = _once("window", data, places, lambda: _percentiles(data, places, num_workers))
    return None if window is None else (window[0], window[1])


def _once(kind: str, data: ImageData, places: list[int], measure: Callable[[], Any]) -> Any:
    """Measure, unless it is in the user's cache folder, and put it there."""
    cache = cache_folder()
    if cache is None:
        return measure()
    file = cache / f"{kind}-{_key(data, places)}.json"
    with suppress(OSError, ValueError):
        return json.loads(file.read_text())
    measured = measure()
    with suppress(OSError):  # a home that cannot be written costs the next run a few seconds
        write_whole(file, json.dumps(measured))
    return measured


class _OwnUnits(Intensity):
    """Leaves a scan its own numbers, as floats."""

    def __call__(self, values: Pixels, inverted: bool = False) -> npt.NDArray[np.float32]:
        return values.astype(np.float32)


class _Values(Dataset[Tensor]):
    """Some values of each scan in its own units, evenly spread; none of what has 8 bits."""

    def __init__(self, data: ImageData, places: list[int]) -> None:
        self.data, self.places = copy(data), places
        self.data.intensity = _OwnUnits()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> Tensor:
        try:
            image = self.data.read(self.places[place])
        except UnreadableImage:  # which the epoch reports
            return torch.empty(0)
        if image.dtype == torch.uint8:
            return torch.empty(0)
        values = image[torch.isfinite(image)]
        if not len(values):
            return values
        # In whole numbers: float32 rounds past the end of a large scan.
        return values[torch.arange(SCAN_SAMPLE) * (len(values) - 1) // (SCAN_SAMPLE - 1)]


def _percentiles(data: ImageData, places: list[int], num_workers: int) -> list[float] | None:
    loader: Loader[Any] = Loader(
        _Values(data, places),
        batch_size=None,
        num_workers=num_workers,
    )
    bar = Bar(loader, desc="Intensities", leave=False, delay=1.0)
    values = torch.cat(list(bar)).numpy()
    if not values.size:
        return None
    low, high = np.percentile(values, data.intensity.percentiles)
    if low == high:  # a few bright spots on a black ground
        low, high = values.min(), values.max()
    return [float(low), float(high)]


def _measure(data: ImageData, places: list[int], num_workers: int) -> Statistics:
    loader: Loader[Any] = Loader(
        Subset(data, places),
        batch_size=32,
        num_workers=num_workers,
        collate_fn=collate,
    )
    pixels = 0
    total = torch.zeros(data.in_chans, dtype=torch.float64)
    squares = torch.zeros(data.in_chans, dtype=torch.float64)
    for batch in Bar(loader, desc="Pixel statistics", leave=False, delay=1.0):
        images = batch["image"].double()
        images = images / 255 if batch["image"].dtype == torch.uint8 else images
        pixels += images.numel() // data.in_chans
        total += images.sum((0, 2, 3))
        squares += images.square().sum((0, 2, 3))
    mean = total / pixels
    std = (squares / pixels - mean.square()).clamp_min(0).sqrt()
    return tuple(mean.tolist()), tuple(std.clamp_min(1 / 255).tolist())  # a grey level: never 0


def _key(data: ImageData, places: list[int]) -> str:
    digest = blake2b(digest_size=16)
    digest.update(repr((data.transform, data.intensity, data.in_chans, len(data))).encode())
    for place in places:
        digest.update(os.fsencode(data.name(place)))
        with suppress(OSError):
            status = os.stat(data.container(place))
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()
