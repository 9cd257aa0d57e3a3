"""Formats that images are kept in: the same bytes in each, read in the ways of training.

    python benchmarks/storage_formats.py --root photos

At random, in order, by several processes, and from a store as one node of many. Each number is of a
new process, and of what the format's own library offers; a format whose library is not installed is
left out: pip install 'simmim[pack]' webdataset litdata mosaicml-streaming
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jsonargparse import auto_cli
from object_store import ObjectStore
from startup import ROLLUP, be_quiet, memory_of

from simmim.data.index import FileIndex
from simmim.data.layout import read_folder
from simmim.data.mapped import PLACE
from simmim.data.pack import Encoded, Encoder, Images, ShardWriter, write_index
from simmim.data.remote import STREAMS, fetch, read_store
from simmim.data.shards import Packed, PackedPart
from simmim.data.workers import worker_context

BATCH = 256  # images that are looked at for how they are mixed
PARTS = 50  # of the data
ENVIRONMENT = {
    PLACE: "off",  # no index in the user's cache
    "LITDATA_DISABLE_VERSION_CHECK": "1",
    "AWS_ACCESS_KEY_ID": "none",  # the store here asks nobody, but its clients want to sign
    "AWS_SECRET_ACCESS_KEY": "none",
    "AWS_DEFAULT_REGION": "us-east-1",
}

BUFFER = 1000  # images that are mixed while they are streamed, as usual with webdataset
BUCKET = "kept"


class Share(NamedTuple):
    """What one of several nodes reads from a store.

    Attributes:
        way: One of the format's ways to read from a store.
        kept: The folder that the store serves, where the names of its files can be seen.
        url: Its address there.
        copy: A folder of the node.
        nodes: Their number.
        epoch: Which one; it makes the order.
    """

    way: str
    kept: Path
    url: str
    copy: Path
    nodes: int
    epoch: int


class Files:
    """Each image is a file; and what a format is asked for."""

    module = package = "simmim"
    random = True  # any image can be asked for
    ways: tuple[str, ...] = ()  # of reading from a store

    def write(self, files: FileIndex, folder: Path, shard: int) -> None:
        """Write images into an empty folder, in shards of so many bytes."""
        for i in range(len(files)):
            path = folder / files.name(i)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(files.read(i))

    def open(self, folder: Path) -> Callable[[int], Any]:
        """Make what reads an image by its place."""
        return read_folder(str(folder)).read

    def scan(self, folder: Path, images: int) -> Iterable[Any]:
        """Read all in order."""
        return map(self.open(folder), range(images))

    def stream(self, share: Share) -> Iterator[int]:
        """Read a share from a store; the place of each image that came."""
        raise NotImplementedError


class Arrow(Files):
    """What `simmim pack` writes."""

    module = package = "pyarrow"
    ways = ("one by one", "copied")

    def write(self, files: FileIndex, folder: Path, shard: int) -> None:
        part = PackedPart("", files.classes, sorted(files.suffixes), len(files))
        with ShardWriter(folder, part, "jpeg") as writer:
            for i in range(len(files)):
                writer.add(files, i, Encoded(bytes(files.read(i)), kept=False))
                if writer.size >= shard or i + 1 == len(files):
                    writer.finish()
        write_index(folder, part, files)
        Packed({"format": "jpeg"}, "", {"train": part}, complete=True).save(folder)

    def stream(self, share: Share) -> Iterator[int]:
        store, path, text = read_store(share.url)
        (part,) = Packed.parse(text, share.url).parts.values()
        order = np.random.default_rng(share.epoch).permutation(part.files)[:: share.nodes].tolist()
        if share.way == "copied":
            fetch(share.url, str(share.copy))
            read = self.open(share.copy)
            return (place for place in order if bytes(read(place)))
        each = sum(shard.size for shard in part.shards) // part.files

        def ask(place: int) -> int:  # as if it were known where in its shard it lies
            number, within = divmod(place * len(part.shards), part.files)
            shard = part.shards[number]
            start = (shard.size - each) * within // part.files
            store.cat_file(f"{path}/{shard.file}", start, start + each)
            return place

        return ThreadPoolExecutor(STREAMS).map(ask, order)


class WebDataset(Files):
    """Tar files, which are read from their beginning to their end."""

    module = package = "webdataset"
    random = False
    ways = (f"buffer of {BUFFER}",)

    def write(self, files: FileIndex, folder: Path, shard: int) -> None:
        from webdataset import ShardWriter

        with ShardWriter(f"{folder}/%05d.tar", maxsize=shard, verbose=0) as writer:
            for i in range(len(files)):
                writer.write({"__key__": f"{i:09d}", "jpg": files.read(i)})

    def scan(self, folder: Path, images: int) -> Iterable[Any]:
        from webdataset import WebDataset

        items = WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False)
        return (item["jpg"] for item in items)

    def stream(self, share: Share) -> Iterator[int]:
        from webdataset import WebDataset

        urls = [f"{share.url}/{path.name}" for path in sorted(share.kept.glob("*.tar"))][
            :: share.nodes
        ]
        items = WebDataset(urls, shardshuffle=len(urls), seed=share.epoch).shuffle(BUFFER)
        return (int(item["__key__"]) for item in items)


class LitData(Files):
    """Chunks, whose order is shuffled, and the images in each."""

    module = package = "litdata"
    ways = ("chunk by chunk",)

    def write(self, files: FileIndex, folder: Path, shard: int) -> None:
        from litdata.streaming.cache import Cache

        cache = Cache(str(folder), chunk_bytes=shard)
        for i in range(len(files)):
            cache[i] = {"place": i, "image": files.read(i)}
        cache.done()
        cache.merge()

    def open(self, folder: Path) -> Callable[[int], Any]:
        from litdata import StreamingDataset

        items = StreamingDataset(str(folder))
        return lambda place: items[place]["image"]

    def scan(self, folder: Path, images: int) -> Iterable[Any]:
        from litdata import StreamingDataset

        return (item["image"] for item in StreamingDataset(str(folder)))

    def stream(self, share: Share) -> Iterator[int]:
        from litdata import StreamingDataset
        from litdata.streaming import downloader

        # The store here has no TLS, which litdata gives no option for.
        getattr(downloader, "_OBSTORE_CLIENT_OPTIONS", {})["allow_http"] = "true"
        place = f"s3://{BUCKET}/{share.kept.name}"
        part = 1 / share.nodes  # its chunks alone: a node does not read ahead in another's
        items = StreamingDataset(
            place, str(share.copy), shuffle=True, seed=share.epoch, subsample=part
        )
        return (item["place"] for item in items)


class MDS(Files):
    """Shards of MosaicML; the images of each are spread over a block."""

    module, package = "streaming", "mosaicml-streaming"
    ways = (f"block of {BUFFER}",)

    def write(self, files: FileIndex, folder: Path, shard: int) -> None:
        from streaming import MDSWriter

        columns = {"place": "int", "image": "bytes"}
        with MDSWriter(out=str(folder), columns=columns, size_limit=shard) as writer:
            for i in range(len(files)):
                writer.write({"place": i, "image": files.read(i)})

    def open(self, folder: Path) -> Callable[[int], Any]:
        from streaming import LocalDataset

        items = LocalDataset(str(folder))
        return lambda place: items[place]["image"]

    def stream(self, share: Share) -> Iterator[int]:
        from streaming import StreamingDataset

        items = StreamingDataset(
            remote=f"s3://{BUCKET}/{share.kept.name}",
            local=str(share.copy),
            shuffle=True,
            shuffle_seed=share.epoch,
            shuffle_block_size=BUFFER,
            num_canonical_nodes=1,
            batch_size=256,
            predownload=256,  # it knows of no other node, and would read on behind its share
        )
        return (item["place"] for item in items)


FORMATS = {
    "files": Files(),
    "arrow": Arrow(),
    "webdataset": WebDataset(),
    "litdata": LitData(),
    "mds": MDS(),
}


def formats(
    root: str,
    images: int = 10_000,
    workers: int = 4,
    nodes: int = 4,
    shard_mb: int = 4,
    latency_ms: float = 20.0,
) -> str:
    """Measure the format of `simmim pack` beside others that images are kept in.

    The images are JPEGs as `simmim pack` makes them; their bytes are read, and nothing is decoded.

    Args:
        root: Folder of images.
        images: How many are written; a smaller folder is repeated. The disk must hold them thrice.
        workers: Processes that read at once while their memory is measured.
        nodes: Machines that share an epoch. One is measured, which reads its share from a store
            on this machine that gives 90 MB/s to each request.
        shard_mb: Size of a shard in megabytes, small so that few images make many shards.
        latency_ms: Milliseconds to the first byte of a request; S3 takes tens of them, AWS says.

    Returns:
        A table of files on a disk, one of a store, and what is not installed.
    """
    installed = [name for name, kind in FORMATS.items() if find_spec(kind.module)]
    near, far, rest = [], [], []
    with (
        tempfile.TemporaryDirectory(prefix="simmim-formats-") as folder,
        ObjectStore(Path(folder), latency_ms / 1000) as store,
    ):
        source = Path(folder, "source")
        size = _apart(write_source, root, source, images)
        for name in installed:
            kept = Path(folder, BUCKET, name)
            try:
                near.append(_measure_near(name, source, kept, images, workers, shard_mb))
                for way in FORMATS[name].ways:
                    far.append(_measure_far(name, way, kept, store, images, nodes))
            except Exception as error:  # of any kind, from a library of any version
                rest.append(f"{name} failed: {error!r}")
            shutil.rmtree(kept, ignore_errors=True)
    missing = [kind.package for name, kind in FORMATS.items() if name not in installed]
    rest += [f"not installed: {', '.join(missing)}"] if missing else []
    return "\n".join(
        [
            f"{images:,} JPEGs, {size / 1e6:,.1f} MB. Microseconds an image: of the processor from "
            "memory (warm), by the clock from the disk (cold). To open is of the processor too.",
            f"{workers} processes that have read all have memory of their own, and map files:",
            f"{'':<12}{'write':>8}{'size':>12}{'open':>12}{'random, warm':>14}{'cold':>9}"
            f"{'in order, warm':>16}{'cold':>9}{'own':>12}{'mapped':>12}",
            *near,
            "",
            f"One of {nodes} nodes reads {images // nodes:,} images an epoch, {latency_ms:g} ms to "
            f"the first byte of a request. Parts of {PARTS} that meet in a batch of {BATCH}:",
            f"{'':<27}{'first image':>12}{'1st epoch':>11}{'requests':>10}{'':>11}"
            f"{'2nd epoch':>11}{'requests':>10}{'':>11}{'parts':>8}",
            *far,
            "",
            *rest,
        ]
    ).rstrip()


def write_source(root: str, folder: Path, images: int) -> int:
    """Write files as `simmim pack` would keep them, again and again until there are enough.

    Returns:
        Their size in bytes.
    """
    made = Images(read_folder(root), Encoder("jpeg", 256, 90))
    found = (made[i] for i in range(min(images, len(made))))
    once = [item.data for item in found if isinstance(item, Encoded)]
    if not once:
        raise ValueError(f"--root {root} holds no image that can be read")
    for i in range(images):
        path = folder / f"{i // 1000:05d}" / f"{i:08d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(once[i % len(once)])
    return _size(folder)


def write_format(name: str, source: Path, folder: Path, shard: int) -> float:
    """Write them in a format, in shards of so many bytes; seconds that it took."""
    files, kind = read_folder(str(source)), FORMATS[name]
    import_module(kind.module)
    folder.mkdir(parents=True)
    began = time.perf_counter()
    kind.write(files, folder, shard)
    return time.perf_counter() - began


def read_all(name: str, folder: Path, images: int, seed: int | None) -> tuple[float, float, float]:
    """Read each image once, at random or (no seed) in order.

    Returns:
        Seconds of the processor to open; and for each image, by the clock and of the processor.
    """
    kind, order = FORMATS[name], np.random.default_rng(seed).permutation(images).tolist()
    import_module(kind.module)
    began = time.process_time()
    found = kind.scan(folder, images) if seed is None else map(kind.open(folder), order)
    opened, clock = time.process_time(), time.perf_counter()
    count = sum(len(bytes(data)) > 0 for data in found)
    took, work = time.perf_counter() - clock, time.process_time() - opened
    if count != images:
        raise ValueError(f"{count} of {images} images came back")
    return opened - began, took / images, work / images


def hold(name: str, folder: Path, images: int, seed: int | None, barrier: Any) -> None:
    """Read all, and wait while somebody looks at the memory."""
    _prepare()
    try:
        read_all(name, folder, images, seed)
        barrier.wait()
        barrier.wait()
    except BaseException:
        barrier.abort()
        raise


def read_share(name: str, images: int, store: str, share: Share) -> tuple[float, float, list[int]]:
    """Read a node's share; seconds to the first image and to the last, and places of all."""
    os.environ |= {variable: store for variable in ("AWS_ENDPOINT_URL", "S3_ENDPOINT_URL")}
    kind = FORMATS[name]
    import_module(kind.module)
    began = time.perf_counter()
    stream = kind.stream(share)
    places = [next(stream)]
    first = time.perf_counter() - began
    places += islice(stream, images - 1)
    return first, time.perf_counter() - began, places


def _prepare() -> None:
    os.environ |= ENVIRONMENT
    be_quiet()


def _apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process that has touched nothing."""
    with ProcessPoolExecutor(1, worker_context(function), _prepare) as pool:
        return pool.submit(function, *args).result()


def _measure_near(
    name: str, source: Path, kept: Path, images: int, workers: int, shard_mb: int
) -> str:
    wrote = _apart(write_format, name, source, kept, shard_mb * 10**6)
    opened, times = nan, {}
    for seed in (0, None) if FORMATS[name].random else (None,):
        for cold in (True, False):
            if not cold or _forget(kept):
                ready, took, work = _apart(read_all, name, kept, images, seed)
                times[seed, cold] = took if cold else work
                opened = ready if seed == 0 else opened
    random, scan = (
        "".join(f"{1e6 * times.get((seed, cold), nan):>9.1f}" for cold in (False, True))
        for seed in (0, None)
    )
    own, mapped = _measure_memory(name, kept, images, workers)
    return (
        f"{name:<12}{wrote:>6.1f} s{_size(kept) / 1e6:>9.1f} MB{1e3 * opened:>9.1f} ms"
        f"{random:>23}{scan:>25}{own:>9.0f} MB{mapped:>9.0f} MB"
    ).replace("nan", "  -")


def _measure_memory(name: str, kept: Path, images: int, workers: int) -> tuple[float, float]:
    """Megabytes of processes that have read all: their own, and of the files they map."""
    if not ROLLUP.exists():
        return nan, nan
    context = worker_context(hold)
    barrier = context.Barrier(workers + 1, timeout=600)
    seeds = range(workers) if FORMATS[name].random else [None] * workers
    processes = [
        context.Process(target=hold, args=(name, kept, images, seed, barrier), daemon=True)
        for seed in seeds
    ]
    for process in processes:
        process.start()
    barrier.wait()
    found = [memory_of(process.pid) for process in processes]
    barrier.wait()
    mapped = sum(memory.mapped for memory in found)
    return sum(memory.shared_out for memory in found) - mapped, mapped


def _measure_far(
    name: str, way: str, kept: Path, store: ObjectStore, images: int, nodes: int
) -> str:
    row = ""
    with tempfile.TemporaryDirectory(dir=kept.parents[1]) as copy:
        for epoch in (1, 2):
            requests, received = store.requests, store.bytes
            share = Share(way, kept, f"{store.url}/{BUCKET}/{name}", Path(copy), nodes, epoch)
            first, took, places = _apart(read_share, name, images // nodes, store.url, share)
            row += f"{first:>10.2f} s" if epoch == 1 else ""
            row += f"{took:>9.2f} s{store.requests - requests:>10,}"
            row += f"{(store.bytes - received) / 1e6:>8.1f} MB"
    parts = np.array(places) * PARTS // images
    batches = [parts[i : i + BATCH] for i in range(0, max(len(parts) - BATCH, 0) + 1, BATCH)]
    return f"{f'{name}, {way}':<27}{row}{np.mean([len(set(b)) for b in batches]):>8.1f}"


def _forget(folder: Path) -> bool:
    """Have the system forget what it keeps of files in memory; whether it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    print(auto_cli(formats))
