"""The benchmark of a store: what one by one and whole shards give is what the store does."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from simmim.benchmark import store as benchmark
from simmim.benchmark.store import measure
from simmim.data import pack
from simmim.data.shards import Packed, Shard

URL = "memory://bucket/photos"


@pytest.fixture
def packed(tmp_path: Path, make_images: Callable[..., Path]) -> Iterator[Packed]:
    make_images(tmp_path / "root", 20, size=200)
    pack.pack(str(tmp_path / "root"), str(tmp_path / "packed"), "raw", shard_mb=1, workers=0)
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "packed"), "/bucket/photos", recursive=True)
    yield Packed.load(tmp_path / "packed")
    store.rm("/bucket", recursive=True)


def numbers(line: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*", line)]


def test_each_request_waits(packed: Packed) -> None:
    """Twenty milliseconds a request, four at a time: at most 200 images a second."""
    (part,) = packed.parts.values()
    shards, size = len(part.shards), sum(shard.size for shard in part.shards)
    said = benchmark(URL, seconds=0.5, streams=4, latency_ms=20).splitlines()
    assert said[0] == (
        f"{URL}: 20 images, {size / 1e9:.3f} GB in {shards} shards; "
        "4 requests at a time, each 20 ms later"
    )
    single, megabytes = numbers(said[1])
    assert 2 < single < 200
    assert megabytes == pytest.approx(single * size / 20 / 1e6, rel=0.1, abs=0.1)
    whole, _ = numbers(said[2])
    assert whole > 3 * single  # a shard has eight images
    assert "An epoch image by image takes at least" in said[4]


def test_several_at_a_time_and_no_byte_outside() -> None:
    at_once, most, lock = 0, 0, threading.Lock()

    def ask(file: str, start: int, end: int) -> int:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.01)
        with lock:
            at_once -= 1
        assert 0 <= start < end <= {"a": 50, "b": 3000}[file]
        return end - start

    rate = measure(ask, [Shard("a", 1, 50, 0), Shard("b", 9, 3000, 0)], 100, 0.3, 3)
    assert most == 3
    assert 50 < rate.bytes / rate.answers <= 100


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"root": "photos"}, "--root photos is no address of a store: give s3://BUCKET/PACKED"),
        ({"root": "memory://bucket/none"}, r"memory://bucket/none holds no packed\.json"),
        ({"root": URL, "seconds": 0}, "--seconds 0 is too small: use 0.1"),
        ({"root": URL, "streams": 0}, "--streams 0 is too small: use 1"),
    ],
)
def test_mistakes(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        benchmark(**options)


def test_a_store_that_breaks_off(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    cat = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, start: Any = None, **kwargs: Any) -> Any:
        if start is not None:
            raise OSError("connection reset")
        return cat(self, path, start=start, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    with pytest.raises(ValueError, match=f"{URL} cannot be read: connection reset"):
        benchmark(URL, seconds=0.1)
