"""Formats that images are kept in, behind one face: written, opened, read through, and streamed.

Each does what its own library offers; a format whose library is not installed is not touched.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simmim.data.index import FileIndex
from simmim.data.layout import read_folder
from simmim.data.pack import Encoded, ShardWriter, write_index
from simmim.data.remote import STREAMS, fetch, read_store
from simmim.data.shards import Packed, PackedPart

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


class _Arrow(Files):
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


class _WebDataset(Files):
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


class _LitData(Files):
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


class _MDS(Files):
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
    "arrow": _Arrow(),
    "webdataset": _WebDataset(),
    "litdata": _LitData(),
    "mds": _MDS(),
}
