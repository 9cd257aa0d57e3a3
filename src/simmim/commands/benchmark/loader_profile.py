"""Where the time of an image goes, on one core; and what a whole loader gives."""

import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from multiprocessing.reduction import ForkingPickler
from statistics import median
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from torch.utils.data import Dataset, Sampler

from simmim.data.dataset import ImageData, Key, Loader
from simmim.data.decode import decode_image
from simmim.data.draws import permutation, uniforms

STAGES = ("read", "decode", "crop", "collate", "transfer")
PREFETCHED = 2  # batches of each worker, torch's default: they were read before the clock ran


def stage_times(
    data: ImageData,
    indices: Sequence[int],
    collate: Callable[[list[Any]], Any],
    device: torch.device,
    seconds: float,
) -> dict[str, float]:
    """Take the time of each stage, in rounds over the same images.

    Args:
        data: Whose images.
        indices: Which; each must be readable.
        collate: Makes a batch of them.
        device: Where the batch goes. To a CPU that is the hand-over from a worker, whose batch
            lies in shared memory; to a GPU the copy into pinned memory and on.
        seconds: How long, after a first round; three rounds at least.

    Returns:
        Seconds an image of each stage: of each the median of the rounds.
    """
    _round(data, indices, collate, device)
    rounds: list[dict[str, float]] = []
    began = time.perf_counter()
    while len(rounds) < 3 or time.perf_counter() - began < seconds:
        rounds.append(_round(data, indices, collate, device))
    return {stage: median(r[stage] for r in rounds) / len(indices) for stage in STAGES}


def _round(
    data: ImageData,
    indices: Sequence[int],
    collate: Callable[[list[Any]], Any],
    device: torch.device,
) -> dict[str, float]:
    spent = dict.fromkeys(STAGES, 0.0)
    samples = []
    for index in indices:
        times = [time.perf_counter()]
        place = data._place(index)
        content = data.files.read(place)
        name = data.files.name(place) if ".dcm" in data.files.suffixes else ""
        times.append(time.perf_counter())
        image = decode_image(content, data.in_chans, data.intensity, name, data.whole)
        times.append(time.perf_counter())
        samples.append({**data.transform(image, uniforms(data.seed, 0, index)), "index": index})
        times.append(time.perf_counter())
        for stage, start, end in zip(STAGES, times, times[1:], strict=False):
            spent[stage] += end - start
    start = time.perf_counter()
    batch = collate(samples)
    spent["collate"] = time.perf_counter() - start
    start = time.perf_counter()
    _transfer(batch, device)
    spent["transfer"] = time.perf_counter() - start
    return spent


def _transfer(batch: dict[str, Any], device: torch.device) -> None:
    if device.type == "cuda":
        moved = [v.pin_memory().to(device, non_blocking=True) for v in batch.values()]
        torch.cuda.synchronize(device)
        del moved
    else:
        pickle.loads(ForkingPickler.dumps(batch))


def sample_time(data: Dataset[Any], keys: Sequence[Any]) -> float:
    """Ask a data set for some samples, on one core.

    Returns:
        Seconds of a sample.
    """
    start = time.perf_counter()
    for key in keys:
        data[key]
    return (time.perf_counter() - start) / len(keys)


class Endless(Sampler[Key]):
    """Samples without end, every epoch in another order: no loader waits for an epoch's end.

    Args:
        indices: Of the samples.
        plain: Whether to give an index alone, without the epoch.
    """

    def __init__(self, indices: Sequence[int], *, plain: bool = False) -> None:
        self.indices, self.plain = indices, plain

    def __iter__(self) -> Iterator[Key]:
        for epoch in count():
            for place in permutation(len(self.indices), 0, epoch).tolist():
                index = self.indices[place]
                yield index if self.plain else (epoch, index)


class Feed:
    """A loader whose batches are asked for as fast as they come.

    Args:
        data: What is read.
        sampler: Without end.
        batch_size: Images in a batch.
        workers: Processes that read.
        collate: Makes a batch of samples; None: torch's own.
        pin: Whether batches go into pinned memory.
    """

    def __init__(
        self,
        data: Dataset[Any],
        sampler: Endless,
        batch_size: int,
        workers: int,
        collate: Callable[[list[Any]], Any] | None = None,
        pin: bool = False,
    ) -> None:
        with catch_warnings():
            filterwarnings("ignore", ".*worker processes in total")  # to see that is the purpose
            loader: Loader[Any] = Loader(
                data,
                batch_size=batch_size,
                sampler=sampler,
                num_workers=workers,
                collate_fn=collate,
                pin_memory=pin,
            )
            self._batches = iter(loader)
        self.batch_size, self.ahead = batch_size, PREFETCHED * workers + 1

    def rate(self, seconds: float) -> float:
        """Read batches, and do nothing with them.

        Args:
            seconds: How long, once the batches that were waiting are gone; two batches at least.

        Returns:
            Images/s.
        """
        for _ in range(self.ahead):
            next(self._batches)
        batches, began = 0, time.perf_counter()
        while batches < 2 or time.perf_counter() - began < seconds:
            next(self._batches)
            batches += 1
        return batches * self.batch_size / (time.perf_counter() - began)
