"""An image folder -> packed shards: smaller images, in few big files.

What is done is in `packed.json` after each shard, so that a run that was cut off goes on there; and
as images are taken in order, the files are the same for any number of workers.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from simmim.base.files import UNFINISHED, beside, sync, write_whole
from simmim.base.progress import Bar
from simmim.data.bad_files import escape
from simmim.data.dataset import Loader
from simmim.data.decode import UnreadableImage, decode_pixels, is_dicom, reason_of
from simmim.data.index import FileIndex, check_folder
from simmim.data.layout import IMAGES, read_split, read_unsplit
from simmim.data.scans import Intensity
from simmim.data.shards import (
    Packed,
    PackedPart,
    Shard,
    check_pyarrow,
    digest_of_file,
    is_packed,
)
from simmim.data.workers import cpu_count

BATCH_BYTES = 16 * 2**20  # of a record batch: what other tools read at once
SAMPLE = 32  # images that the size of all is estimated from
BAD_FILES = "bad_files.txt"
LOCK = "packing.lock"


def pack(
    root: str,
    out: str,
    format: Literal["jpeg", "raw", "original"] = "jpeg",
    short_side: int | None = 256,
    quality: int = 90,
    shard_mb: int = 512,
    workers: int | None = None,
    bad_files: Literal["skip", "raise"] = "skip",
    max_bad_share: float = 0.5,
) -> str:
    """Pack a folder of images into shards, which are read several times as fast.

    The packed folder is given to --data.root as the folder itself would be: parts, classes, names,
    split and order are the same. (Where there is a train/, only train/, val/ and test/ are packed.)
    A packing that was cut off goes on when it is started again.

    Args:
        root: Folder of images, as --data.root takes it.
        out: Folder that becomes the packed one: new, empty, or begun before.
        format: jpeg (small), raw (uint8 pixels, nothing to decode: fastest, ten times the size) or
            original (each file as it is). Scans that are deeper than 8 bits keep their depth: jpeg
            leaves their files as they are, raw stores their own numbers; DICOM and NumPy files are
            always left as they are.
        short_side: Images whose shorter side is longer are reduced to it; no image is enlarged.
            256 is for crops of up to 224. null: none is reduced. A JPEG that needs no reducing is
            left as it is by jpeg.
        quality: Of JPEG, 1 to 100. Transparent parts become white.
        shard_mb: Size of a shard in megabytes.
        workers: Processes that read and encode; by default one for each CPU core.
        bad_files: What a file that cannot be read does: skip (left out, listed in bad_files.txt) or
            raise (packing stops and names it).
        max_bad_share: Share of unreadable files above which skip stops all the same.

    Returns:
        What was done.

    Raises:
        ValueError: If an option is out of its range, the folder holds no image, `out` holds
            something else, or its disk is too small.
        KeyboardInterrupt: On Ctrl+C; it says how far it came.
    """
    for name, value, low, high in (
        ("short_side", short_side or 1, 1, 65_535),
        ("quality", quality, 1, 100),
        ("shard_mb", shard_mb, 1, 1000),  # the bytes of a batch stay below Arrow's 2 GiB
        ("workers", workers or 0, 0, 1024),
        ("max_bad_share", max_bad_share, 0, 1),
    ):
        if not low <= value <= high:
            raise ValueError(f"--{name} {value} is out of range: use {low} to {high}")
    check_pyarrow()
    out, folder = os.path.expanduser(out), Path(os.path.expanduser(out))
    encode = Encoder(format, short_side, quality)
    root = os.path.expanduser(root)
    check_folder(root, "--root")
    files, parts = _plan(root)
    options = {**asdict(encode), "shard_mb": shard_mb}
    _check_out(folder)
    with _alone(folder):
        packed = _begin(folder, files, parts, options)
        if packed.complete:
            return f"{out} is packed already: to pack it anew, remove it or use another --out"
        _check_disk(folder, files, packed, encode)
        workers = cpu_count() if workers is None else workers
        limit = max_bad_share if bad_files == "skip" else None
        try:
            _write(folder, files, packed, encode, workers, limit)
        except KeyboardInterrupt:
            done, total = (sum(getattr(p, n) for p in parts.values()) for n in ("taken", "files"))
            raise KeyboardInterrupt(
                f"{done:,} of {total:,} images are in {out}: the same command goes on"
            ) from None
    return _report(out, packed)


@dataclass(frozen=True)
class Encoder:
    """How an image is stored.

    Attributes:
        format: "jpeg", "raw" or "original".
        short_side: Length that the shorter side is reduced to; None: not at all.
        quality: Of JPEG.
    """

    format: str
    short_side: int | None
    quality: int

    def __call__(self, data: bytes, name: str) -> "Encoded":
        """Turn a file's bytes into those that are stored, themselves an image file.

        Raises:
            Exception: Of many kinds, where the file is no image, or a damaged one.
        """
        pixels = decode_pixels(data, 3, _AsIs(), name)
        deep = pixels.dtype != np.uint8
        if data[:6] == b"\x93NUMPY" or is_dicom(data, name):
            return Encoded(data, kept=True)
        if self.format == "original" or (deep and not np.isfinite(pixels).all()):
            return Encoded(data, kept=deep)  # what was not measured would spread when reduced
        small = _reduce(pixels, self.short_side)
        if self.format == "raw":
            return Encoded(_as_npy(small), kept=False)
        if deep or pixels.shape[2] not in (1, 3):
            return Encoded(data, kept=True)
        if small is pixels and data[:3] == b"\xff\xd8\xff":
            return Encoded(data, kept=False)
        return Encoded(_as_jpeg(small, self.quality), kept=False)


class Encoded(NamedTuple):
    """An image as it is stored, and whether it is a scan whose file was left as it is."""

    data: bytes
    kept: bool


class _AsIs(Intensity):
    """Leaves a scan its own numbers."""

    def __call__(self, values: npt.NDArray[Any], inverted: bool = False) -> npt.NDArray[Any]:
        return values


def _reduce(pixels: npt.NDArray[Any], short_side: int | None) -> npt.NDArray[Any]:
    """Reduce (H, W, C), bicubic and with antialiasing, in the precision of its numbers."""
    height, width = pixels.shape[:2]
    if short_side is None or min(height, width) <= short_side:
        return pixels
    scale = short_side / min(height, width)
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    kind = pixels.dtype
    if kind != np.uint8:
        pixels = pixels.astype(np.float32 if kind.itemsize <= 2 else np.float64)
    images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]  # HWC -> NCHW
    small = F.interpolate(images, size, mode="bicubic", antialias=True)[0]
    reduced: npt.NDArray[Any] = small.permute(1, 2, 0).contiguous().numpy()
    if kind.kind in "iu" and kind != np.uint8:  # the cubic overshoots at edges
        reduced = reduced.round().clip(np.iinfo(kind).min, np.iinfo(kind).max)
    return reduced.astype(kind, copy=False)


def _as_npy(pixels: npt.NDArray[Any]) -> bytes:
    stream = BytesIO()
    # Gray has two axes: (3, W, 1) could be three channels of one column.
    np.save(stream, np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
    return stream.getvalue()


def _as_jpeg(pixels: npt.NDArray[Any], quality: int) -> bytes:
    gray = pixels.shape[2] == 1
    return bytes(
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels),
            quality,
            "GRAY" if gray else "RGB",
            "Gray" if gray else "420",
        )
    )


def _plan(root: str) -> tuple[dict[str, FileIndex], dict[str, PackedPart]]:
    """Index what is to be packed, by its parts."""
    split = read_split(root)
    files = split or {"train": read_unsplit(root)}
    parts = {
        name: PackedPart(
            # train of train/images and of images/train, where there are masks
            os.path.basename(index.root.removesuffix(f"{os.sep}{IMAGES}")) if split else "",
            index.classes,
            sorted(index.suffixes),
            len(index),
        )
        for name, index in files.items()
    }
    return files, parts


def _check_out(folder: Path) -> None:
    """Make the folder.

    Raises:
        ValueError: If it holds something else.
    """
    if not is_packed(str(folder)) and (
        folder.is_file() or (folder.is_dir() and {p.name for p in folder.iterdir()} - {LOCK})
    ):
        raise ValueError(f"--out {folder} holds something else: give a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second packing out of the folder; a process that ends, or is killed, lets go of it.

    Raises:
        ValueError: If another process packs into it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"another simmim pack writes into {folder}: wait for it, or use another --out"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps what is open
            (folder / LOCK).unlink()
        lock.release()


def _begin(
    folder: Path,
    files: dict[str, FileIndex],
    parts: dict[str, PackedPart],
    options: dict[str, Any],
) -> Packed:
    """Begin, or find what was packed into the folder before.

    Raises:
        ValueError: If it was begun otherwise.
    """
    source = _hash(files)
    if is_packed(str(folder)):
        packed = Packed.load(folder)
        for name, value in options.items():
            if packed.options.get(name) != value:
                raise ValueError(
                    f"{folder} was packed with --{name} {packed.options.get(name)}, not {value}: "
                    "give the same, or another --out"
                )
        if packed.source != source:
            raise ValueError(f"{folder} was packed from other files: use another --out")
        for leftover in folder.glob(f".*{UNFINISHED}"):
            leftover.unlink(missing_ok=True)
        return packed
    packed = Packed(options, source, parts)
    packed.save(folder)
    return packed


def _hash(files: dict[str, FileIndex]) -> str:
    digest = blake2b(digest_size=16)
    for name, index in files.items():
        digest.update(f"{name} {len(index)} ".encode())
        digest.update(index.starts.numpy().data)
        digest.update(index.names.numpy().data)
    return digest.hexdigest()


def _check_disk(folder: Path, files: dict[str, FileIndex], packed: Packed, encode: Encoder) -> None:
    """Estimate from some images what is still to be written.

    Raises:
        ValueError: If the disk has less space.
    """
    free, needed = shutil.disk_usage(folder).free, 0.0
    for name, index in files.items():
        places = range(packed.parts[name].taken, len(index))
        images = Images(index, encode)
        sample = [images[place] for place in places[:: len(places) // SAMPLE + 1]]
        sizes = [len(item.data) for item in sample if isinstance(item, Encoded)]
        needed += len(places) * sum(sizes) / max(len(sizes), 1)
    if needed > free:
        raise ValueError(
            f"{folder} has {free / 1e9:,.3g} GB free, about {needed / 1e9:,.3g} GB are needed: "
            "use another disk, a smaller --short_side, or --format jpeg"
        )


class Images(Dataset["Encoded | str"]):
    """The images of a folder as they are stored; where one cannot be read, the reason.

    Args:
        files: The folder's index.
        encode: How they are stored.
    """

    def __init__(self, files: FileIndex, encode: Encoder) -> None:
        self.files, self.encode = files, encode

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> "Encoded | str":
        data = b""
        try:
            data = bytes(self.files.read(place))
            return self.encode(data, self.files.name(place))
        except Exception as error:  # decoders raise whatever they like
            return reason_of(error, data)


def _write(
    folder: Path,
    files: dict[str, FileIndex],
    packed: Packed,
    encode: Encoder,
    workers: int,
    max_bad_share: float | None,
) -> None:
    """Write what is not there yet; no `max_bad_share`: the first unreadable file stops it."""
    parts = packed.parts.values()
    total, done = sum(part.files for part in parts), sum(part.taken for part in parts)
    with Bar(total=total, initial=done, desc="Packing", unit=" images") as bar:
        for name, index in files.items():
            part = packed.parts[name]
            with ShardWriter(folder, part, encode.format) as writer:
                for place, item in _encoded(Images(index, encode), part.taken, workers):
                    bar.update()
                    if isinstance(item, str):
                        part.bad[place] = item
                        _check_bad(index, place, item, packed, max_bad_share, total)
                    else:
                        writer.add(index, place, item)
                    if writer.size >= packed.options["shard_mb"] * 1e6 or place + 1 == len(index):
                        writer.finish()
                        part.taken = place + 1
                        packed.save(folder)
            write_index(folder, part, index)
    lines = [
        f"{escape(index.path(place))}\t{escape(reason)}\n"
        for name, index in files.items()
        for place, reason in packed.parts[name].bad.items()
    ]
    if lines:
        write_whole(folder / BAD_FILES, "".join(lines))
    packed.complete = True
    packed.save(folder)


def _encoded(images: Images, start: int, workers: int) -> Iterator[tuple[int, "Encoded | str"]]:
    """Read and encode in parallel, in order."""
    loader: Loader[Any] = Loader(
        images,
        batch_size=8,
        sampler=range(start, len(images)),
        num_workers=workers,
        collate_fn=list,
    )
    for batch in loader:
        for item in batch:
            yield start, item
            start += 1


def _check_bad(
    files: FileIndex,
    place: int,
    reason: str,
    packed: Packed,
    max_bad_share: float | None,
    total: int,
) -> None:
    if max_bad_share is None:
        raise UnreadableImage(f"{files.path(place)!r} cannot be read: {reason}")
    count = sum(len(part.bad) for part in packed.parts.values())
    if count > max_bad_share * total:
        raise UnreadableImage(
            f"{count} of {total} images cannot be read, which is more than --max_bad_share "
            f"{max_bad_share:g} allows; one is {files.path(place)!r}: {reason}"
        )


class ShardWriter:
    """Writes one shard after the other: each beside its place, and renamed when it is whole.

    What is not whole when the context ends is removed.

    Args:
        folder: The packed folder.
        part: Gets the shards.
        format: How the images are stored.

    Attributes:
        size: Bytes of the images in the shard that is being written.
    """

    def __init__(self, folder: Path, part: PackedPart, format: str) -> None:
        import pyarrow as pa

        self.folder, self.part = folder, part
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        fields = [("image", image), *([("label", pa.int64())] if part.classes else [])]
        self.schema = pa.schema(fields).with_metadata(_describe(part.classes, format))
        self._reset()

    def add(self, files: FileIndex, place: int, item: Encoded) -> None:
        """Add an image."""
        self._names.append(os.fsencode(files.name(place)))
        self._data.append(item.data)
        if files.labels is not None:
            self._labels.append(int(files.labels[place]))
        self.size += len(item.data)
        self._waiting += len(item.data)
        self._kept += item.kept
        if self._waiting >= BATCH_BYTES:
            self._flush()

    def finish(self) -> None:
        """Finish the shard, unless it is empty, and enter it in the part."""
        self._flush()
        if self._file is not None:
            self._arrow.close()
            size = self._file.tell()
            self._file.close()
            sync(self._beside)
            name, digest = self.part.shard_file(len(self.part.shards)), digest_of_file(self._beside)
            self._beside.replace(self.folder / name)
            self.part.shards.append(Shard(name, self._rows, size, self._kept, digest))
        self._reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
            self._beside.unlink(missing_ok=True)  # Ctrl+C may come when it has its name already

    def _reset(self) -> None:
        self._file: BinaryIO | None = None
        self._names: list[bytes] = []
        self._data: list[bytes] = []
        self._labels: list[int] = []
        self.size = self._waiting = self._rows = self._kept = 0

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._data:
            return
        if self._file is None:
            name = self.part.shard_file(len(self.part.shards))
            self._beside = beside(self.folder / name)
            self._file = self._beside.open("wb")
            self._arrow = pa.ipc.new_file(self._file, self.schema)
        # A name may be no text on Linux; other tools get the bytes that there are.
        names = pa.array(self._names, pa.binary()).view(pa.string())
        image = pa.StructArray.from_arrays(
            [pa.array(self._data, pa.binary()), names], ["bytes", "path"]
        )
        columns = [image, *([pa.array(self._labels, pa.int64())] if self.part.classes else [])]
        self._arrow.write(pa.record_batch(columns, schema=self.schema))
        self._rows += len(self._data)
        self._names, self._data, self._labels, self._waiting = [], [], [], 0


def _describe(classes: list[str], format: str) -> dict[str, str]:
    """Tell Hugging Face's datasets what the columns are; raw pixels are no image file to it."""
    label = {"label": {"_type": "ClassLabel", "names": classes}} if classes else {}
    if format == "raw":
        return {}
    return {
        "huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, **label}}})
    }


def write_index(folder: Path, part: PackedPart, files: FileIndex) -> None:
    """Write the table of the paths and labels of all images of a part."""
    import pyarrow as pa

    good = np.ones(len(files), dtype=bool)
    good[list(part.bad)] = False
    if not good.any():
        raise ValueError(f"{files.root!r} holds no image that can be read")
    names = [files.starts.numpy(), files.names.numpy()]
    paths = pa.LargeStringArray.from_buffers(len(files), *map(pa.py_buffer, names))
    columns = {"path": paths.filter(pa.array(good))}
    if files.labels is not None:
        columns["label"] = pa.array(files.labels.numpy()[good])
    table, stream = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
    write_whole(folder / part.index_file, stream.getvalue())


def _report(out: str, packed: Packed) -> str:
    parts = packed.parts.values()
    shards = [shard for part in parts for shard in part.shards]
    count, kept = sum(shard.rows for shard in shards), sum(shard.kept for shard in shards)
    size = sum(shard.size for shard in shards)
    files = "1 shard" if len(shards) == 1 else f"{len(shards):,} shards"
    text = f"packed {count:,} images into {out}: {files}, {size / 1e6:,.1f} MB"
    if kept and packed.options["format"] != "original":
        text += f"; {kept:,} scans are in it as they were, which keeps their depth"
    if bad := sum(len(part.bad) for part in parts):
        text += f"; {bad:,} of {count + bad:,} could not be read and were left out: see "
        text += os.path.join(out, BAD_FILES)
    return text
