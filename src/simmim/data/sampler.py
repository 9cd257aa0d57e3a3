"""In which order the samples of a part come, and which of them are this process's."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

from simmim.data.draws import permutation

# Both samplers are DistributedSamplers by name, so that Lightning puts none of its own around them.


class EpochSampler(DistributedSampler[Any]):
    """An endless training order: epoch e is a permutation by (seed, e) and nothing else.

    Global batch t of an epoch is a slice of that permutation, and each process takes its part of
    the slice: for any number of processes, the global batch holds the same images. It yields
    (epoch, index), so that workers that outlive the epoch know which one they work for.

    Args:
        dataset: What is sampled.
        batch_size: Of one process.
        batches: In an epoch; with `batch_size` and `replicas`, at most the data set.
        seed: Of the order.
        replicas: Number of processes.
        rank: Number of this process.
        start: Says where a pass begins, as (epoch, batch), when it begins: Lightning makes loaders
            before it restores a checkpoint. Without it, or where it gives None, a pass is a whole
            epoch: that which `set_epoch` said, or else the next.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        batches: int,
        seed: int = 0,
        replicas: int = 1,
        rank: int = 0,
        start: Callable[[], tuple[int, int] | None] | None = None,
    ) -> None:
        super().__init__(dataset, replicas, rank, seed=seed)
        self.batch_size, self.batches, self.start = batch_size, batches, start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, batch = (self.start() if self.start else None) or (self.epoch, 0)
        self.epoch = epoch + 1
        return self._pairs(epoch, batch)

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def _pairs(self, epoch: int, batch: int) -> Iterator[tuple[int, int]]:
        n = len(self.dataset)  # type: ignore[arg-type]
        order = permutation(n, self.seed, epoch)[
            : self.batches * self.num_replicas * self.batch_size
        ]
        mine = order.reshape(self.batches, self.num_replicas, self.batch_size)[batch:, self.rank]
        if self.num_replicas > 1:  # keep one's own share, not the whole order
            mine = mine.copy()
        del order
        for indices in mine:
            yield from ((epoch, index) for index in indices.tolist())


class EvenSampler(DistributedSampler[Any]):
    """Every sample once, in order: process r of n takes the samples r, r + n, r + 2n, ...

    Nothing is repeated to make the shares equal: there are no fewer samples than processes.
    """

    def __init__(self, dataset: Dataset[Any], replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, replicas, rank, shuffle=False)
        n = len(dataset)  # type: ignore[arg-type]
        self.indices = range(rank, n, replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def even_batch_size(n: int, batch_size: int, replicas: int) -> int:
    """Find the batch size, the wanted one or just below, with which all processes have as many.

    DDP and FSDP talk in every forward pass: a process with a batch more would wait for ever. It is
    only where a single sample would make up a process's last batch that the size changes.
    """
    least, most = n // replicas, math.ceil(n / replicas)
    sizes = (*range(batch_size, 0, -1), *range(batch_size, most + 1))
    return next(size for size in sizes if math.ceil(least / size) == math.ceil(most / size))


def choose(n: int, limit: int | None, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Pick at most `limit` of n places, evenly at random and the same ones always, in order."""
    if limit is None or limit >= n:
        return np.arange(n)
    return np.sort(permutation(n, seed, 0)[:limit])
