"""The index of a folder, and what is made of it, kept from one run to the next.

To read a folder of 14 million files takes minutes, on a network disk an hour. What was found is
kept in the user's cache folder, under a key of the folder's path, and used as long as no folder
below it has changed. That costs a look at each folder, but not at each file:

- A file that is added, removed or renamed changes the time of the folder that it lies in.
- A file with new content under its old name changes nothing of the index, which keeps names only.
- A folder that is added, removed or renamed changes the time of the one above it.
- A link is an entry of its folder; what it leads to is looked at as well, even if it was nothing.

Times may be as coarse as two seconds: a folder that changed within two seconds before it was read
might have changed once more without a trace, so what was found then is not kept. Nor are small
folders. File systems without times of folders (some object stores that are mounted) need
SIMMIM_CACHE=off.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple
from hashlib import blake2b
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from simmim.base.files import UNFINISHED
from simmim.data.index import (
    SUFFIXES,
    FileIndex,
    Folder,
    folder_stamp,
    join_folders,
    visit_folders,
    warn_of_refused,
)
from simmim.data.mapped import as_array, cache_folder, open_tensors, write_tensors
from simmim.data.summary import LeftOut

VERSION = 2
WORTH = 10_000  # files; fewer are read, and split, in less than a second
COARSE = 2 * 10**9  # ns; the times of FAT, the coarsest that there are
DAYS = 90  # after which what nobody used is deleted
KINDS = ("index", "split", "labels", "pairs", "values", "boxes")

Places = npt.NDArray[np.int64]
Kept = tuple[dict[str, Tensor], dict[str, str]]


def read_index(root: str) -> FileIndex:
    """Index the images below a folder, from the cache if no folder has changed.

    Raises:
        ValueError: If there is no image.
    """
    cache = cache_folder()
    if cache is None:
        return join_folders(root, visit_folders(root))
    file = index_file(cache, root)
    with suppress(OSError, ValueError, KeyError):  # none, damaged, or out of date
        index = _open(file, root)
        rank_zero_info(
            f"{len(index):,} images below {root!r}, as no folder has changed since they were "
            "listed (SIMMIM_CACHE=off lists them anew)"
        )
        return index
    began = time.time_ns()
    folders = visit_folders(root)
    index = join_folders(root, folders)
    settled = all(folder.stamp[0] < began - COARSE for folder in folders)
    if len(index) >= WORTH and settled and write_index(file, index, folders):
        with suppress(OSError, ValueError, KeyError):
            return _open(file, root)  # so that workers share it from the first run on
    return index


def index_file(cache: Path, root: str) -> Path:
    """Where the index of a folder is kept."""
    return cache / f"index-{_hash(os.path.realpath(root), VERSION, SUFFIXES)}.safetensors"


def write_index(file: Path, index: FileIndex, folders: Sequence[Folder]) -> bool:
    """Keep an index.

    Args:
        file: Where.
        index: What was found.
        folders: All that were visited, with their stamps.

    Returns:
        Whether it could be written.
    """
    notes = {
        "classes": json.dumps(index.classes),
        "suffixes": json.dumps(sorted(index.suffixes)),
        "refused": json.dumps([folder.refused for folder in folders if folder.refused]),
        "digest": digest_of(index),
        "left_out": json.dumps([astuple(one) for one in index.left_out]),
        "hint": json.dumps(index.hint),
    }
    relative = b"\0".join(os.fsencode(folder.relative) for folder in folders)
    tensors = {
        "names": index.names,
        "starts": index.starts,
        "folders": torch.tensor(np.frombuffer(relative, np.uint8)),
        "stamps": torch.tensor([folder.stamp for folder in folders], dtype=torch.int64),
    }
    if index.labels is not None:
        tensors["labels"] = index.labels
    _forget(file.parent)
    return write_tensors(file, tensors, notes)


def keep_split(
    files: FileIndex, options: Sequence[object], split: Callable[[], tuple[Places, Places]]
) -> tuple[Places, Places]:
    """Split an index, or open the split that was made of the same names and classes before.

    Args:
        files: The index.
        options: What else the split depends on.
        split: Gives the places of both sides.
    """

    def make() -> Kept:
        trains, validates = split()
        return {"train": torch.from_numpy(trains), "val": torch.from_numpy(validates)}, {}

    def fits(tensors: dict[str, Tensor], notes: dict[str, str]) -> bool:
        trains, validates = tensors["train"], tensors["val"]
        whole = len(trains) + len(validates) == len(files)
        return whole and all(lies_within(side, len(files)) for side in (trains, validates))

    classes = None if files.labels is None else files.classes
    key = (digest_of(files), classes, *options)
    tensors, _ = keep("split", len(files), key, make, fits)
    return as_array(tensors["train"]), as_array(tensors["val"])


def keep(
    kind: str,
    files: int,
    key: Sequence[object],
    make: Callable[[], Kept],
    fits: Callable[[dict[str, Tensor], dict[str, str]], bool],
    worth: int | None = None,
) -> Kept:
    """Make tensors of an index, or open those that were made of the same before.

    Args:
        kind: What they are, one of KINDS.
        files: How many files they are about.
        key: All that they depend on.
        make: Gives them by name, and notes.
        fits: Whether what was kept is whole: what is read there must not go astray.
        worth: Of fewer files nothing is kept; None: WORTH.
    """
    cache = cache_folder()
    if cache is None or files < (WORTH if worth is None else worth):
        return make()
    file = cache / f"{kind}-{_hash(*key)}.safetensors"

    def open_it() -> Kept:
        tensors, notes = open_tensors(file)
        if not fits(tensors, notes):
            raise ValueError(f"{file} is damaged")
        os.utime(file)  # it is in use
        return tensors, notes

    with suppress(OSError, ValueError, KeyError):
        return open_it()
    tensors, notes = make()
    _forget(cache)
    if write_tensors(file, tensors, notes):
        with suppress(OSError, ValueError, KeyError):
            return open_it()
    return tensors, notes


def file_stamp(path: str) -> tuple[object, ...] | None:
    """Tell a file from what it is after a change; None if it cannot be told, or is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    if status.st_mtime_ns > time.time_ns() - COARSE:
        return None
    return os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def lies_within(numbers: Tensor, n: int, least: int = 0) -> bool:
    """Whether all numbers are at least that, and below n."""
    return not len(numbers) or (int(numbers.min()) >= least and int(numbers.max()) < n)


def digest_of(files: FileIndex) -> str:
    """Hash all names; a second for 14 million of them where it is not known already."""
    if files.digest:
        return files.digest
    digest = blake2b(files.names.numpy().data, digest_size=16)
    digest.update(files.starts.numpy().data)
    return digest.hexdigest()


def _open(file: Path, root: str) -> FileIndex:
    """Open an index.

    Raises:
        OSError: If there is none.
        ValueError: If it is damaged, or a folder has changed.
        KeyError: If something is missing.
    """
    tensors, notes = open_tensors(file)
    index = FileIndex(
        root,
        tensors["names"],
        tensors["starts"],
        tensors.get("labels"),
        json.loads(notes["classes"]),
        frozenset(json.loads(notes["suffixes"])),
        digest=notes["digest"],
        left_out=[LeftOut(*one) for one in json.loads(notes["left_out"])],
        hint=json.loads(notes["hint"]),
    )
    _check(index)
    relative = tensors["folders"].numpy().tobytes().split(b"\0")
    paths = [os.path.join(root, os.fsdecode(folder)) for folder in relative]
    if not np.array_equal(_stamps(paths), tensors["stamps"].numpy()):
        raise ValueError(f"a folder below {root} has changed")
    warn_of_refused(json.loads(notes["refused"]))
    os.utime(file)  # it is in use
    return index


def _check(index: FileIndex) -> None:
    """Refuse arrays that do not fit together: what is read there must not go astray."""
    starts, labels = index.starts, index.labels
    fits = len(starts) > 1 and int(starts[0]) == 0 and int(starts[-1]) == len(index.names)
    fits = fits and bool((starts[1:] > starts[:-1]).all())
    if labels is not None:
        fits = fits and len(labels) == len(index) and lies_within(labels, len(index.classes))
    if not fits:
        raise ValueError("the index is damaged")


def _stamps(paths: Sequence[str], chunk: int = 256) -> npt.NDArray[np.int64]:
    """Look at folders, several at a time: on a network disk each look waits for an answer."""
    chunks = [paths[i : i + chunk] for i in range(0, len(paths), chunk)]
    with ThreadPoolExecutor(16 if len(chunks) > 1 else 1) as pool:
        stamps = pool.map(lambda some: [folder_stamp(path) for path in some], chunks)
        return np.array(list(chain.from_iterable(stamps)), np.int64)


def _forget(cache: Path) -> None:
    """Delete what nobody used for long, and what was never finished."""
    kept = (file for kind in KINDS for file in cache.glob(f"{kind}-*.safetensors"))
    for file in (*kept, *cache.glob(f".*{UNFINISHED}")):
        with suppress(OSError):  # another process was quicker, or still has it open (Windows)
            days = (time.time() - file.stat().st_mtime) / 86400
            if days > (1 if file.suffix == UNFINISHED else DAYS):
                file.unlink()


def _hash(*key: object) -> str:
    return blake2b(repr(key).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
