"""Damaged copies of valid files, and what reads them in a process that may die of it."""

import base64
import io
import json
import math
import os
import random
import re
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from simmim.base.errors import explain
from simmim.callbacks.vitals import held_memory
from simmim.data import shards
from simmim.data.annotations import read_coco, read_voc
from simmim.data.class_map import WrongMask, read_legend, read_values
from simmim.data.decode import UnreadableImage, read_image
from simmim.data.labels import read_labels
from simmim.data.scans import Intensity
from simmim.runs.folder import find_start
from simmim.weights import load_encoder
from simmim.weights.files import read_checkpoint

SECONDS = 20  # of the processor: a file that takes longer hangs the loader
MEMORY = 2_000  # MB, of the whole process
EDGES = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
VALUES = (b"-1", b"0", b"1e999", b"9" * 400, b"null", b'"x"', b"[]", b"{}", b"true", b"NaN")


# Damage -------------------------------------------------------------------------------------------


def damaged(seed: int, files: dict[str, bytes]) -> tuple[str, bytes]:
    """Damage one of some valid files: its bytes, or what its checksums cover.

    Returns:
        The name of the valid file, and what has become of it.
    """
    draw = random.Random(seed)
    name = draw.choice(sorted(files))
    data = files[name]
    if data[:2] == b"PK" and draw.random() < 0.75:
        return name, _inside_zip(draw, data)
    for _ in range(draw.randint(1, 4)):
        data = _change(draw, data, files)
    if data[:4] == b"\x89PNG" and draw.random() < 0.5:
        data = _with_checksums(data)
    return name, data


def _change(draw: random.Random, data: bytes, files: dict[str, bytes]) -> bytes:
    start, end = sorted((_place(draw, data), _place(draw, data)))
    size = draw.choice((1, 2, 4, 8))
    edge = (draw.choice(EDGES) % 256**size).to_bytes(size, draw.choice(("little", "big")))
    other = files[draw.choice(sorted(files))]
    words = [*re.finditer(rb"-?\d+(\.\d+)?|\"[^\"]*\"|\[|\{", data[:20_000])]
    word = draw.choice(words).span() if words else (start, start)
    return draw.choice(
        [
            data[:start],
            data[:start] + data[end:],  # a part is missing
            data[:end] + data[start:],  # or there twice
            data[:start] + draw.randbytes(1) + data[start + 1 :],
            data[:start] + edge + data[start + size :],
            data[:start] + draw.randbytes(size) + data[start:],
            data[:start] + data[end : end + 64] + data[start : start + 64] + data[end + 64 :],
            data[:start] + other[_place(draw, other) :],
            data[: word[0]] + draw.choice(VALUES) + data[word[1] :],
        ]
    )


def _place(draw: random.Random, data: bytes) -> int:
    """Headers are where the lengths are."""
    return draw.randint(0, min(max(len(data) - 1, 0), draw.choice((128, len(data)))))


def _inside_zip(draw: random.Random, data: bytes) -> bytes:
    """Damage a record of a checkpoint, under checksums that are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        records = {name: source.read(name) for name in source.namelist()}
        pickles = [name for name in records if name.endswith("data.pkl")]
        chosen = draw.choice(pickles * 4 + sorted(records))
        for name, record in records.items():
            target.writestr(name, _change(draw, record, records) if name == chosen else record)
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


# Readers ------------------------------------------------------------------------------------------


def read_image_of(path: Path) -> None:
    """Pixels of the right kind, or UnreadableImage."""
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


def read_mask(path: Path) -> None:
    """Numbers of classes, or an error of ours."""
    with suppress(UnreadableImage, WrongMask):
        assert read_values(str(path)).ndim in (2, 3)


def read_weights(path: Path) -> None:
    """A table, or an encoder, or where a run goes on."""
    for open_it in (read_checkpoint, load_encoder, lambda p: find_start(str(p), p.parent, "x")):
        or_sentence(open_it, path)


def read_boxes(path: Path) -> None:
    """Annotations in COCO's format."""
    for table in or_sentence(read_coco, str(path)):
        assert all(math.isfinite(edge) for row in table.objects for o in row for edge in o.box)


def read_classes(path: Path) -> None:
    """Names and colours of the classes of masks."""
    for legend in or_sentence(read_legend, str(path)):
        assert len(legend._table) > max(legend.values)


def read_packed_file(path: Path) -> None:
    """A packed folder, which is one file here: each of its images."""
    folder = path.with_suffix(".folder")
    _unpack(path.read_bytes(), folder)
    shards._open.cache_clear()
    for parts in or_sentence(shards.read_packed, str(folder)):
        index = shards.join_packed(str(folder), parts)
        assert index.names.numel() >= 0
        for place in range(min(len(index), 50)):
            index.name(place)
            for data in or_sentence(index.read, place):
                bytes(data)


def or_sentence(open_it: Callable[[Any], Any], given: Any) -> list[Any]:
    """What is read, or nothing where it is refused in one sentence."""
    try:
        return [open_it(given)]
    except (ValueError, OSError) as error:
        if explain(error) is None:
            raise RuntimeError(f"a traceback: {type(error).__name__}: {error}") from error
        return []


READERS: dict[str, Callable[[Path], Any]] = {
    "image": read_image_of,
    "mask": read_mask,
    "weights": read_weights,
    "coco": read_boxes,
    "voc": lambda path: or_sentence(partial(read_voc, "x"), {"a.jpg": str(path)}),
    "labels": lambda path: [
        or_sentence(partial(read_labels, several=several), str(path)) for several in (True, False)
    ],
    "classes": read_classes,
    "packed": read_packed_file,
}


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
    with suppress(Exception):  # a size that does not fit would be found before the file is read
        table = json.loads((folder / PACKED[0]).read_bytes())
        for part in table["parts"].values():
            part["shards"][0]["size"] = (folder / PACKED[2]).stat().st_size
        (folder / PACKED[0]).write_text(json.dumps(table))


def fail(path: Path) -> None:
    """Do what the file says: to see that it is seen."""
    data, limit = path.read_bytes(), time.process_time() + 3 * SECONDS
    if data == b"raise":
        raise RuntimeError("as asked")
    if data == b"crash":
        os._exit(3)
    if data == b"fill":
        bytes(b"x" * (MEMORY * 2**20))
    while data == b"hang" and time.process_time() < limit:
        pass


# The process that reads, which may die of it: the end of its log says of which file ---------------


def read_damaged(kind: str, files: dict[str, bytes], first: int, n: int, minutes: float) -> None:
    """Damage files by the numbers from the first on, so many or so long, and read each."""
    end = time.monotonic() + 60 * minutes
    for seed in count(first):
        if time.monotonic() > end if minutes else seed >= first + n:
            return
        print(f"seed {seed}", flush=True)
        name, data = damaged(seed, files)
        read_files([(kind, name, data)])


def read_files(files: list[tuple[str, str, bytes]]) -> None:
    """Read files, each (kind, name, content); what goes wrong ends the process."""
    warnings.simplefilter("ignore")
    for kind, name, data in files:
        print(kind, name, flush=True)
        if sys.platform != "win32":
            import resource

            _, most = resource.getrlimit(resource.RLIMIT_CPU)
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + SECONDS, most))
        path = Path(name).with_stem("x")
        path.write_bytes(data)
        try:
            READERS.get(kind, fail)(path)
        except BaseException as error:
            text = base64.b64encode(data).decode()
            sys.exit(f"{text[:2500]}\n{type(error).__name__}: {error}")
        used = (held_memory(torch.device("cpu")) or 0) // 2**20  # not known on Windows
        if used > MEMORY:
            sys.exit(f"it took {used} MB")
