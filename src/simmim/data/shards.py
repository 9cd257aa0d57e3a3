"""Packed images: a few big Arrow files in place of a folder of many small ones.

A row is a file as it could lie in the folder: its path and its bytes (JPEG, or a NumPy array of raw
pixels, or what it was). The shards are mapped into memory: any row costs a look at its place, all
workers share the pages, and raw pixels are cropped without a copy. `packed.json` says what there
is, and a table of paths is read first, without touching the shards.
"""

import json
import os
import re
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from hashlib import blake2b, file_digest
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from simmim.base.files import write_whole
from simmim.data.index import FileIndex

FILE = "packed.json"
VERSION = 1


@dataclass
class Shard:
    """A file of images.

    Attributes:
        file: Its name in the packed folder.
        rows: Images in it.
        size: In bytes.
        kept: Scans in it that were left as they are.
        digest: Hash of its bytes; "" where an earlier version wrote none.
    """

    file: str
    rows: int
    size: int
    kept: int
    digest: str = ""


@dataclass
class PackedPart:
    """A part of what was packed.

    Attributes:
        folder: Its folder below the root; "" where the root is not split.
        classes: Names of its classes.
        suffixes: Endings of its files' names.
        files: Number of its files, bad ones among them.
        shards: In order.
        bad: Why files could not be read, by their places in the part.
        taken: Files that are in the shards, or bad.
    """

    folder: str
    classes: list[str]
    suffixes: list[str]
    files: int
    shards: list[Shard] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    taken: int = 0

    @property
    def index_file(self) -> str:
        """Name of the table of its paths and labels."""
        return f"{self.folder or 'images'}.feather"

    def shard_file(self, number: int) -> str:
        """Name of a shard."""
        return f"{self.folder or 'images'}-{number:05d}.arrow"


@dataclass
class Packed:
    """What `packed.json` says.

    Attributes:
        options: How images are stored.
        source: Hash of the names of all files.
        parts: By "train", "val" and "test"; "train" alone where the root is not split.
        complete: Whether all files were packed.
    """

    options: dict[str, Any]
    source: str
    parts: dict[str, PackedPart]
    complete: bool = False

    def save(self, folder: Path) -> None:
        """Write it, beside its place first: it is never half there."""
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=1)
        write_whole(folder / FILE, text)

    @classmethod
    def load(cls, folder: str | Path, file: str = FILE) -> "Packed":
        """Read it.

        Args:
            folder: The packed folder.
            file: Its name there.

        Raises:
            ValueError: If it is damaged, or from a later version.
        """
        path = Path(folder, file)
        return cls.parse(path.read_bytes(), path)

    @classmethod
    def parse(cls, text: bytes, path: str | Path) -> "Packed":
        """Understand it.

        Args:
            text: What the file holds.
            path: Where it lies, for the errors.

        Raises:
            ValueError: If it is damaged, or from a later version.
        """
        try:
            table = json.loads(text)
            version = table.pop("version")
            if version == VERSION:  # others may have other fields
                parts = {name: _part(part) for name, part in table.pop("parts").items()}
                if "train" not in parts:
                    raise ValueError("it has no part that trains")
                return cls(parts=parts, **table)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{path} is damaged, or not of simmim pack: {error}") from error
        raise ValueError(f"{path} is of version {version}, not {VERSION}: pack the images anew")


def _part(table: dict[str, Any]) -> PackedPart:
    shards = [Shard(**shard) for shard in table["shards"]]
    bad = {int(place): reason for place, reason in table["bad"].items()}
    part = PackedPart(**{**table, "shards": shards, "bad": bad})
    for name in (part.index_file, *(shard.file for shard in shards)):
        if re.split(r"[/\\:]", name) != [name]:  # a copy is written where it says
            raise ValueError(f"it names {name!r}, which is not in the folder")
    if not all(isinstance(n, int) and n >= 0 for s in shards for n in (s.rows, s.size)):
        raise ValueError("it has shards of no size")
    if not all(isinstance(word, str) for word in (*part.classes, *part.suffixes)):
        raise ValueError("its classes or endings are no words")
    return part


def digest_of_file(path: Path) -> str:
    """Hash the bytes of a file."""
    with path.open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


def check_pyarrow() -> None:
    """Refuse packed images where nothing can read or write them.

    Raises:
        ValueError: If pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise ValueError("packed images need pyarrow: pip install 'simmim[pack]'")


def is_packed(folder: str) -> bool:
    """Whether a folder was written by `simmim pack`."""
    return os.path.isfile(os.path.join(folder, FILE))


@dataclass(frozen=True)
class PackedIndex(FileIndex):
    """The images of a packed folder, or of a part of it, as if they lay in folders.

    Attributes:
        shards: Paths of the files that hold them.
        firsts: Place of the first image of each, and how many there are.
        bytes_each: Their mean size.
        stamp: Tells the folder from one that is packed later in its place.
    """

    shards: list[str]
    firsts: list[int]
    bytes_each: int
    stamp: int

    def container(self, place: int) -> str:
        """Path of the shard that holds an image."""
        return self.shards[self._shard(place)]

    def size(self, place: int) -> int:
        """Mean size of the images in bytes."""
        return self.bytes_each

    def read(self, place: int) -> memoryview:
        """Find the bytes of an image; they are not copied, and must not be written to.

        Raises:
            ValueError: If the shard is damaged.
        """
        number = self._shard(place)
        shard = _open(self.shards[number], self.stamp)
        return shard.read(place - self.firsts[number])

    def find(self, name: str) -> int | None:
        """Find an image by its path below the root; None where there is none."""
        for match in re.finditer(re.escape(os.fsencode(name)), self.names.numpy().data):
            place = int(torch.searchsorted(self.starts, match.start()))
            if self.starts[place : place + 2].tolist() == list(match.span()):
                return place
        return None

    def _shard(self, place: int) -> int:
        return bisect_right(self.firsts, place) - 1


def read_packed(root: str) -> dict[str, PackedIndex]:
    """Index a packed folder by its parts.

    Raises:
        ValueError: If it is not complete, or damaged.
    """
    check_pyarrow()
    packed = Packed.load(root)
    if not packed.complete:
        raise ValueError(f"{root!r} is packed in part only: run simmim pack again, and it goes on")
    return {name: _read_part(root, part) for name, part in packed.parts.items()}


def join_packed(root: str, parts: dict[str, PackedIndex]) -> PackedIndex:
    """Index all images of a packed folder by their paths below the root."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if len(parts) == 1 and next(iter(parts.values())).root == root:
        return next(iter(parts.values()))
    ordered = sorted(parts.values(), key=lambda part: part.root)
    folders = [os.path.basename(part.root) for part in ordered]
    names = [
        pc.binary_join_element_wise(
            pa.scalar(folder, pa.large_string()),
            pa.LargeStringArray.from_buffers(
                len(part), pa.py_buffer(part.starts.numpy()), pa.py_buffer(part.names.numpy())
            ),
            pa.scalar("/", pa.large_string()),
        )
        for folder, part in zip(folders, ordered, strict=True)
    ]
    starts, text = _buffers(pa.concat_arrays(names))
    sizes = torch.tensor([len(part) for part in ordered])
    return PackedIndex(
        root,
        text,
        starts,
        torch.arange(len(ordered)).repeat_interleave(sizes),
        folders,
        frozenset().union(*(part.suffixes for part in ordered)),
        [shard for part in ordered for shard in part.shards],
        [0, *accumulate(b - a for part in ordered for a, b in pairwise(part.firsts))],
        sum(part.bytes_each * len(part) for part in ordered) // int(sizes.sum()),
        ordered[0].stamp,
    )


def _read_part(root: str, part: PackedPart) -> PackedIndex:
    for shard in part.shards:
        path = os.path.join(root, shard.file)
        size = os.path.getsize(path) if os.path.exists(path) else None
        if size != shard.size:
            fault = "is missing" if size is None else f"has {size:,} bytes, not {shard.size:,}"
            raise ValueError(f"{path} {fault}: copy it again, or pack the images anew")
    schema = {"path": "large_string", **({"label": "int64"} if part.classes else {})}
    table = _read_table(os.path.join(root, part.index_file), schema)
    _check_places(table.column("path"), root)
    starts, names = _buffers(table.column("path").combine_chunks())
    firsts = [0, *accumulate(shard.rows for shard in part.shards)]
    if firsts[-1] != len(starts) - 1:
        raise ValueError(f"{root!r} has shards of another pack: pack the images anew")
    labels = table.column("label").to_numpy() if part.classes else None
    if labels is not None and not ((labels >= 0) & (labels < len(part.classes))).all():
        raise ValueError(f"{root!r} has labels of no class: copy it again, or pack the images anew")
    return PackedIndex(
        os.path.join(root, part.folder) if part.folder else root,
        names,
        starts,
        None if labels is None else torch.from_numpy(labels.copy()),
        part.classes,
        frozenset(part.suffixes),
        [os.path.join(root, shard.file) for shard in part.shards],
        firsts,
        sum(shard.size for shard in part.shards) // max(len(starts) - 1, 1),
        os.stat(os.path.join(root, FILE)).st_mtime_ns,
    )


@dataclass(frozen=True)
class _OpenShard:
    """Record batches of a shard: first row, place of each image, and the bytes of all, of each."""

    firsts: list[int]
    starts: list[npt.NDArray[np.int32]]
    data: list[memoryview]

    def read(self, row: int) -> memoryview:
        batch = bisect_right(self.firsts, row) - 1
        start, end = self.starts[batch][row - self.firsts[batch] :][:2].tolist()
        return self.data[batch][start:end]


@lru_cache(maxsize=1024)  # in each process; an open shard takes address space, but no memory
def _open(path: str, stamp: int) -> _OpenShard:
    shard = _OpenShard([], [], [])
    row = 0
    for chunk in _read_table(path, {"image": "struct<bytes: binary"}).column("image").chunks:
        _, starts, data = chunk.field("bytes").buffers()
        shard.firsts.append(row)
        shard.starts.append(np.frombuffer(starts, np.int32))
        if data is None:
            raise ValueError(f"{path} is damaged: it holds no images")
        shard.data.append(_tensor("uint8", data.size, data).numpy().data)
        row += len(chunk)
    return shard


def _read_table(path: str, schema: dict[str, str]) -> Any:
    """Map an Arrow file into memory; the file itself is closed, so that there may be thousands.

    Args:
        path: The file.
        schema: Columns that it must have, and how Arrow's names of their types begin.
    """
    import pyarrow as pa

    try:
        with pa.memory_map(path) as file:
            table = pa.ipc.open_file(file).read_all()
        table.validate()  # sizes: Arrow itself follows whatever a file says
        types = {column.name: str(column.type) for column in table.schema}
        wrong = [name for name, kind in schema.items() if not types.get(name, "").startswith(kind)]
        if wrong:
            raise ValueError(f"it has no {wrong[0]!r} of {schema[wrong[0]]}")
        return table
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is damaged ({reason}): copy it again, or pack the images anew"
        ) from error


def _check_places(paths: Any, root: str) -> None:
    """Refuse paths that do not lie behind each other in the file, before they are looked up."""
    import pyarrow as pa

    try:
        for chunk in paths.chunks:  # as bytes: a name need not be UTF-8
            chunk.view(pa.large_binary()).validate(full=True)
    except pa.ArrowException as error:
        raise ValueError(f"{root!r} has a damaged table of paths: copy it again") from error


def _buffers(strings: Any) -> tuple[Tensor, Tensor]:
    """The buffers of an array of large strings as tensors: where each begins, and the text."""
    _, starts, text = strings.buffers()
    return _tensor("int64", len(strings) + 1, starts), _tensor("uint8", text.size, text)


def _tensor(kind: str, count: int, buffer: Any) -> Tensor:
    """See a buffer of Arrow as a tensor; if it came from NumPy, torch would warn of its flag."""
    import pyarrow as pa

    array = pa.Array.from_buffers(pa.type_for_alias(kind), count, [None, buffer])
    return from_dlpack(array)
