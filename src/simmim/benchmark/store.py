"""A packed folder in an object store: image by image, or shard by shard?

An exact shuffle wants any image at any time. So either each is asked for by itself, or the shards
are copied to each machine first, which is what `--data.root URL` does. Both are measured against
the store itself, with as many requests at a time.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from simmim.data.remote import ask_store, is_url, read_store, shown
from simmim.data.shards import Packed, Shard

BLOCK = 32 * 10**6  # bytes of a shard that are asked for at once


class Rate(NamedTuple):
    """What a store gave in a second: answers, and bytes in them."""

    answers: float
    bytes: float


def store(root: str, seconds: float = 5.0, streams: int = 8, latency_ms: float = 0.0) -> str:
    """Measure whether images of a store are better read one by one, or copied shard by shard.

    One by one, each is asked for as if its place in its shard were known: the best case.

    Args:
        root: Address of a packed folder: s3://BUCKET/PACKED, https://..., file:///...
        seconds: For each of the two.
        streams: Requests at a time, as many as all workers of a machine would make.
        latency_ms: Milliseconds that are added to each request: what a store that is farther away
            would do.

    Returns:
        Both rates, and what they mean for an epoch.

    Raises:
        ValueError: If it is no address of a packed folder, or a number is too small.
    """
    if not is_url(root):
        raise ValueError(f"--root {root} is no address of a store: give s3://BUCKET/PACKED")
    for name, value, least in (("seconds", seconds, 0.1), ("streams", streams, 1)):
        if value < least:
            raise ValueError(f"--{name} {value} is too small: use {least} or more")
    store, path, text = read_store(root)
    parts = Packed.parse(text, shown(root)).parts.values()
    shards = [shard for part in parts for shard in part.shards]
    images, size = sum(shard.rows for shard in shards), sum(shard.size for shard in shards)

    def ask(file: str, start: int, end: int) -> int:
        time.sleep(latency_ms / 1000)
        return len(store.cat_file(f"{path}/{file}", start=start, end=end))

    each = max(size // images, 1)
    single, whole = (
        ask_store(root, partial(measure, ask, shards, length, seconds, streams))
        for length in (each, BLOCK)
    )
    later = f", each {latency_ms:g} ms later" if latency_ms else ""
    lines = [
        f"{shown(root)}: {images:,} images, {size / 1e9:,.3f} GB in {_count(len(shards))}; "
        f"{streams} requests at a time{later}",
        _row("image by image", single.answers, single.bytes),
        _row("whole shards", whole.bytes / each, whole.bytes),
        "",
        f"An epoch image by image takes at least {_duration(images / single.answers)}, each time. "
        f"The shards are copied in {_duration(size / whole.bytes)}, once to each machine, and read "
        "from its disk from then on: simmim benchmark data says how fast.",
    ]
    return "\n".join(lines)


def measure(
    ask: Callable[[str, int, int], int],
    shards: list[Shard],
    length: int,
    seconds: float,
    streams: int,
) -> Rate:
    """Read parts of shards, anywhere in them, several at a time.

    Args:
        ask: Reads a file from a byte to another; gives how many came.
        shards: What is read.
        length: Of a part, in bytes.
        seconds: How long no new one is begun after.
        streams: How many at a time.
    """
    sizes = np.array([shard.size for shard in shards], float)
    began = time.perf_counter()

    def work(seed: int) -> tuple[int, int]:
        draws, answers, received = np.random.default_rng(seed), 0, 0
        while not answers or time.perf_counter() < began + seconds:
            shard = shards[draws.choice(len(shards), p=sizes / sizes.sum())]
            start = int(draws.integers(max(shard.size - length, 0) + 1))
            received += ask(shard.file, start, min(start + length, shard.size))
            answers += 1
        return answers, received

    with ThreadPoolExecutor(streams) as pool:
        found = list(pool.map(work, range(streams)))
    took = time.perf_counter() - began
    return Rate(*(sum(numbers) / took for numbers in zip(*found, strict=True)))


def _row(name: str, images: float, received: float) -> str:
    return f"{name:<15} {images:>10,.0f} images/s {received / 1e6:>10,.1f} MB/s"


def _duration(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"


def _count(shards: int) -> str:
    return "1 shard" if shards == 1 else f"{shards:,} shards"
