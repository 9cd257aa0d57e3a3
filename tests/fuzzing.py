"""Mutations of valid files, and a process that reads them, so that a crash is seen and named."""

import io
import json
import math
import multiprocessing as mp
import os
import re
import signal
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

SECONDS = 20  # of the processor: a file that takes longer hangs the loader
WAITING = 300  # seconds by the clock, on a machine that has other work
MEMORY = 2_000  # MB, of the whole process
EDGES = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)


# Mutations ---------------------------------------------------------------------------------------


class File:
    """A file that was damaged, and the name of the valid one."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name, self.data = name, data

    def __repr__(self) -> str:  # not a dataclass, of which hypothesis prints every byte
        return f"File({self.name!r}, {len(self.data)} bytes)"


@st.composite
def mutated(draw: st.DrawFn, seeds: dict[str, bytes]) -> File:
    """Draw a valid file and damage it: its bytes, or what its checksums cover."""
    name = draw(st.sampled_from(sorted(seeds)))
    data = seeds[name]
    if data[:2] == b"PK" and draw(st.integers(0, 3)):
        return File(name, _inside_zip(draw, data))
    for _ in range(draw(st.integers(1, 4))):
        data = _damaged(draw, data, seeds)
    if data[:4] == b"\x89PNG" and draw(st.booleans()):
        data = _with_checksums(data)
    return File(name, data)


def _damaged(draw: st.DrawFn, data: bytes, seeds: dict[str, bytes]) -> bytes:
    start, end = _place(draw, data), _place(draw, data)
    how = draw(st.integers(0, 7))
    if how == 0:
        return data[:start]
    if how == 1:
        return data[:start] + data[end:]  # a part is missing, or there twice
    if how == 2:
        bit = draw(st.integers(0, 7))
        return data[:start] + bytes([(data[start] ^ 1 << bit) if data else 0]) + data[start + 1 :]
    if how == 3:
        size = draw(st.sampled_from((1, 2, 4, 8)))
        order: Any = draw(st.sampled_from(("little", "big")))
        number = (draw(st.sampled_from(EDGES)) % 256**size).to_bytes(size, order)
        return data[:start] + number + data[start + size :]
    if how == 4:
        return data[:start] + draw(st.binary(min_size=1, max_size=16)) + data[start:]
    if how == 5:  # two parts change places
        size = draw(st.integers(1, 64))
        first, second = sorted((start, end))
        one, other = data[first : first + size], data[second : second + size]
        return data[:first] + other + data[first + size : second] + one + data[second + size :]
    if how == 6:
        other = seeds[draw(st.sampled_from(sorted(seeds)))]
        return data[:start] + other[_place(draw, other) :]
    # A number in a text, or a text in place of one.
    numbers = [*re.finditer(rb"-?\d+(\.\d+)?|\"[^\"]*\"|\[|\{", data[:20_000])]
    if not numbers:
        return data
    match = draw(st.sampled_from(numbers))
    values = (b"-1", b"0", b"1e999", b"9" * 400, b"null", b'"x"', b"[]", b"{}", b"true", b"NaN")
    return data[: match.start()] + draw(st.sampled_from(values)) + data[match.end() :]


def _place(draw: st.DrawFn, data: bytes) -> int:
    """Headers are where the lengths are."""
    end = max(len(data) - 1, 0)
    near = st.integers(0, min(end, 128))
    return draw(st.one_of(near, st.integers(0, end)))


def _inside_zip(draw: st.DrawFn, data: bytes) -> bytes:
    """Damage a record of a checkpoint, under checksums that are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        records = {name: source.read(name) for name in source.namelist()}
        pickles = [name for name in records if name.endswith("data.pkl")]
        chosen = draw(st.sampled_from(pickles * 4 + sorted(records)))
        for name, record in records.items():
            target.writestr(name, _damaged(draw, record, records) if name == chosen else record)
    return out.getvalue()


def _with_checksums(png: bytes) -> bytes:
    """Put right the checksum of each chunk, so that what it holds is looked at."""
    out, at = bytearray(png[:8]), 8
    while at + 12 <= len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        body = png[at + 4 : at + 8 + length]
        out += png[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out) + png[at:]


# Readers -----------------------------------------------------------------------------------------


def read_as_image(path: Path) -> None:
    """An image: pixels of the right kind, or UnreadableImage."""
    import torch

    from simmim.data.decode import UnreadableImage, read_image
    from simmim.data.scans import Intensity

    for in_chans in (3, 1):
        try:
            image = read_image(str(path), in_chans, Intensity())
        except UnreadableImage as error:
            if "\n" in str(error):
                raise RuntimeError(f"more than a sentence: {error}") from error
            continue
        assert image.ndim == 3
        assert image.shape[0] == in_chans
        assert min(image.shape) > 0
        assert image.dtype in (torch.uint8, torch.float32)
        if image.dtype == torch.float32:
            assert 0 <= float(image.min()) <= float(image.max()) <= 1, "not in 0..1"


def read_as_mask(path: Path) -> None:
    """A mask of classes: numbers, or an error of ours."""
    from simmim.data.decode import UnreadableImage
    from simmim.data.legend import WrongMask, read_values

    with suppress(UnreadableImage, WrongMask):
        assert read_values(str(path)).ndim in (2, 3)


def read_as_weights(path: Path) -> None:
    """Weights: a table, or an encoder, or one sentence."""
    from simmim.run import find_start
    from simmim.weights import load_encoder
    from simmim.weights.files import read_checkpoint

    for open_it in (read_checkpoint, load_encoder, lambda p: find_start(str(p), p.parent, "x")):
        _or_sentence(open_it, path)


def read_as_coco(path: Path) -> None:
    """Annotations in COCO's format."""
    from simmim.data.annotations import read_coco

    for table in _or_sentence(lambda p: read_coco(str(p)), path):
        assert all(math.isfinite(edge) for row in table.objects for o in row for edge in o.box)


def read_as_voc(path: Path) -> None:
    """Annotations in Pascal VOC's format."""
    from simmim.data.annotations import read_voc

    _or_sentence(lambda p: read_voc("x", {"a.jpg": str(p)}), path)


def read_as_labels(path: Path) -> None:
    """A table of labels."""
    from simmim.data.labels import read_labels

    for several in (True, False):
        _or_sentence(lambda p, several=several: read_labels(str(p), several=several), path)


def read_as_classes(path: Path) -> None:
    """Names and colours of the classes of masks."""
    from simmim.data.legend import read_legend

    for legend in _or_sentence(lambda p: read_legend(str(p)), path):
        assert len(legend._table) > max(legend.values)


def read_as_packed(path: Path) -> None:
    """A packed folder, which is a zip file here: each image, or one sentence."""
    from simmim.data.shards import _open, join_packed, read_packed

    folder = path.with_suffix(".folder")
    _unpack(path.read_bytes(), folder)
    _open.cache_clear()
    for parts in _or_sentence(lambda p: read_packed(str(p)), folder):
        index = join_packed(str(folder), parts)
        assert index.names.numel() >= 0
        for place in range(min(len(index), 50)):
            index.name(place)
            for data in _or_sentence(index.read, place):
                bytes(data)


def _or_sentence(open_it: Callable[[Any], Any], given: Any) -> list[Any]:
    """What is read, or nothing where it is refused in one sentence."""
    try:
        return [open_it(given)]
    except (ValueError, OSError) as error:
        from simmim.mistakes import explain

        if explain(error) is None:
            raise RuntimeError(f"a traceback: {type(error).__name__}: {error}") from error
        return []


PACKED = ("packed.json", "images.feather", "images-00000.arrow")


def pack_up(folder: Path) -> bytes:
    """The files of a packed folder behind each other, each after its length."""
    parts = [(folder / name).read_bytes() for name in PACKED]
    return b"".join(struct.pack("<Q", len(part)) + part for part in parts)


def _unpack(data: bytes, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in PACKED:
        length = min(int.from_bytes(data[:8], "little"), len(data))
        (folder / name).write_bytes(data[8 : 8 + length])
        data = data[8 + length :]
    try:  # a size that does not fit is found at once: let it be found by what reads the file
        table = json.loads((folder / PACKED[0]).read_bytes())
        for part in table["parts"].values():
            part["shards"][0]["size"] = (folder / PACKED[2]).stat().st_size
        (folder / PACKED[0]).write_text(json.dumps(table))
    except Exception:
        return


READERS = {
    name.removeprefix("read_as_"): reader
    for name, reader in list(globals().items())
    if name.startswith("read_as_")
}


def _crash(path: Path) -> None:
    data = path.read_bytes()
    if data == b"raise":
        raise RuntimeError("as asked")
    if not data:
        os._exit(3)


def _hang(path: Path) -> None:
    limit = time.process_time() + 3 * SECONDS
    while time.process_time() < limit:
        pass


def _fill(path: Path) -> None:
    bytes(b"x" * (MEMORY * 2**20))


FAULTS = {"crash": _crash, "hang": _hang, "memory": _fill}  # to see that they are seen


# The process that reads --------------------------------------------------------------------------


class Process:
    """Reads files in a process of its own, which may die."""

    def __init__(self) -> None:
        self._context = mp.get_context("spawn")
        self._process: Any = None

    def read(self, reader: str, suffix: str, data: bytes) -> str:
        """Read a file; "" if that went as it should, or what went wrong."""
        said = self._read(reader, suffix, data)
        if "took" in said:  # a machine that stood still, or files before this one: once more, alone
            said = self._read(reader, suffix, data)
        return said

    def _read(self, reader: str, suffix: str, data: bytes) -> str:
        if self._process is None:
            self._pipe, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            assert self._pipe.poll(WAITING), "the process does not begin"
            self._pipe.recv()
        self._pipe.send((reader, suffix, data))
        if not self._pipe.poll(WAITING):
            self.stop()
            return f"it took more than {WAITING} s"
        try:
            said = str(self._pipe.recv())
        except EOFError:
            self._process.join(10)
            code, self._process = self._process.exitcode, None
            if code == -getattr(signal, "SIGXCPU", 0):
                return f"it took more than {SECONDS} s of the processor"
            return f"the process ended with {code}"
        if "MB" in said:
            self.stop()
        return said

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join(10)
            self._process = None


def _serve(pipe: Connection) -> None:
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with tempfile.TemporaryDirectory() as folder:
        pipe.send("ready")
        while True:
            reader, suffix, data = pipe.recv()
            path = Path(folder) / f"x{suffix}"
            path.write_bytes(data)
            _limit_time()
            try:
                (READERS | FAULTS)[reader](path)
                said = ""
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            used = _peak_memory()
            pipe.send(said if used < MEMORY else f"it took {used} MB")


def _limit_time() -> None:
    """Let this process end where the next file takes too long."""
    if sys.platform != "win32":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + SECONDS, most))


def _peak_memory() -> int:
    """The most that this process has had, in MB."""
    import torch

    from simmim.callbacks.vitals import held_memory

    return (held_memory(torch.device("cpu")) or 0) // 2**20  # not known on Windows
