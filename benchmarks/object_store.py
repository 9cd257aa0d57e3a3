"""A packed folder in an object store: image by image, or shard by shard?

    python benchmarks/object_store.py --root s3://BUCKET/PACKED

Training asks for any image at any time. So either each is asked for by itself, or the shards are
copied to each machine first, as `--data.root URL` does. Both are measured against the store itself,
with as many requests at a time. `ObjectStore` is a store on this machine.
"""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import numpy as np
from jsonargparse import auto_cli

from simmim.data.remote import ask_store, read_store, shown
from simmim.data.shards import Packed, Shard

BLOCK = 32 * 10**6  # bytes of a shard that are asked for at once
SPEED = 90e6  # bytes a second for a request: what AWS's guidelines count with for S3
SENT = 2**20


class ObjectStore(ThreadingHTTPServer):
    """Serves HTTP, and so what clients of S3 ask for when they read.

    Args:
        folder: A bucket is a folder in it.
        latency: Seconds to the first byte of each request.

    Attributes:
        url: Its address.
        requests: That were answered.
        bytes: That were sent in them.
    """

    def __init__(self, folder: Path, latency: float) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Answer, directory=str(folder)))
        self.latency, self.requests, self.bytes, self._lock = latency, 0, 0, Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def count(self, size: int) -> None:
        """Count an answer of so many bytes."""
        with self._lock:
            self.requests, self.bytes = self.requests + 1, self.bytes + size

    def handle_error(self, *request: Any) -> None:
        """Say nothing: a client may leave early."""


class _Answer(SimpleHTTPRequestHandler):
    server: ObjectStore
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a body waits until its head is acknowledged

    def do_GET(self) -> None:
        """Send a file, or a range of it; for HEAD, only what it is."""
        path = Path(self.translate_path(self.path))
        time.sleep(self.server.latency)
        if not path.is_file():
            self.server.count(0)
            self.send_error(404)
            return
        size = path.stat().st_size
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(span[1]) if span else 0
        end = min(int(span[2]) + 1, size) if span and span[2] else size
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}-{size:x}"')
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        self.end_headers()
        if self.command == "HEAD":
            start = end
        self.server.count(end - start)
        with path.open("rb") as file:
            file.seek(start)
            for place in range(start, end, SENT):
                self.wfile.write(file.read(min(SENT, end - place)))
                time.sleep(min(SENT, end - place) / SPEED)

    do_HEAD = do_GET

    def log_message(self, *words: Any) -> None:
        pass


def measure(root: str, seconds: float = 5.0, streams: int = 8, latency_ms: float = 0.0) -> str:
    """Measure whether images of a store are better read one by one, or copied shard by shard.

    One by one, each is asked for as if its place in its shard were known: the best case.

    Args:
        root: Address of a packed folder: s3://BUCKET/PACKED, https://..., file:///...
        seconds: For each of the two.
        streams: Requests at a time, as many as all workers of a machine would make.
        latency_ms: Milliseconds that are added to each request, as of a store that is farther away.

    Returns:
        Both rates, and what they mean for an epoch.
    """
    store, path, text = read_store(root)
    parts = Packed.parse(text, shown(root)).parts.values()
    shards = [shard for part in parts for shard in part.shards]
    images, size = sum(shard.rows for shard in shards), sum(shard.size for shard in shards)
    share = np.array([shard.size for shard in shards], float) / size

    def ask(length: int, seed: int) -> tuple[int, int]:
        draws, answers, received = np.random.default_rng(seed), 0, 0
        began = time.perf_counter()
        while not answers or time.perf_counter() < began + seconds:
            shard: Shard = shards[draws.choice(len(shards), p=share)]
            start = int(draws.integers(max(shard.size - length, 0) + 1))
            time.sleep(latency_ms / 1000)
            end = min(start + length, shard.size)
            received += len(store.cat_file(f"{path}/{shard.file}", start=start, end=end))
            answers += 1
        return answers, received

    def rate(length: int) -> tuple[float, float]:
        """Answers and bytes a second."""
        began = time.perf_counter()
        with ThreadPoolExecutor(streams) as pool:
            numbers = list(pool.map(partial(ask, length), range(streams)))
        took = time.perf_counter() - began
        return sum(n for n, _ in numbers) / took, sum(n for _, n in numbers) / took

    each = max(size // images, 1)
    single, whole = (ask_store(root, partial(rate, length)) for length in (each, BLOCK))
    rows = {"image by image": single, "whole shards": (whole[1] / each, whole[1])}
    return "\n".join(
        [
            f"{shown(root)}: {images:,} images, {size / 1e9:,.3f} GB in {len(shards):,} shards; "
            f"{streams} requests at a time, each {latency_ms:g} ms later",
            *(
                f"{name:<15} {n:>10,.0f} images/s {b / 1e6:>10,.1f} MB/s"
                for name, (n, b) in rows.items()
            ),
            f"An epoch image by image takes at least {images / single[0]:,.1f} s, each time; the "
            f"shards are copied in {size / whole[1]:,.1f} s, once to each machine.",
        ]
    )


if __name__ == "__main__":
    print(auto_cli(measure))
