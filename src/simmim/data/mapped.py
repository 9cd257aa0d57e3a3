"""Arrays in a file that is mapped into memory: open at once, and shared by all processes.

Nothing is read before it is used, pages that were read are the system's own cache, and whoever maps
the file, be it a forked worker or a spawned one, sees the same pages. So 14 million names cost the
memory of one copy, however many workers there are. A tensor that lies in such a file is pickled as
its place there.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from simmim.base.files import written_whole

PLACE = "SIMMIM_CACHE"  # where the cache lies; off: there is none


def cache_folder() -> Path | None:
    """Find the user's folder for what can be made anew; None where none is wanted."""
    given = os.environ.get(PLACE)
    if given:
        return None if given == "off" else Path(given).expanduser()
    return user_cache_path("simmim", appauthor=False)


class MappedTensor(Tensor):
    """A tensor in a file of ours. What is computed from it is a plain tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    path: Path
    key: str
    stamp: tuple[int, int]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the place; or the numbers, where another file has taken it since."""
        with suppress(OSError):
            if _stamp(self.path) == self.stamp:
                return _open_one, (self.path, self.key, self.stamp)
        return _same, (self.as_subclass(Tensor),)


class MappedArray(np.ndarray[Any, np.dtype[np.int64]]):
    """A mapped tensor as NumPy sees it, which can be taken for that tensor again."""

    tensor: Tensor


def as_array(tensor: Tensor) -> npt.NDArray[np.int64]:
    """See a mapped tensor as an array."""
    array = tensor.numpy().view(MappedArray)
    array.tensor = tensor
    return array


def as_tensor(array: npt.NDArray[np.int64]) -> Tensor:
    """See an array as a tensor: the mapped one if it came from there."""
    tensor = getattr(array, "tensor", None)
    return torch.from_numpy(array) if tensor is None else tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: dict[str, str]) -> bool:
    """Write a file such that it is whole, or what it was, whoever else writes it.

    Args:
        path: The file; it is used by nothing but `open_tensors`.
        tensors: By name.
        notes: Kept with them.

    Returns:
        Whether it is there: a disk that is full or must not be written to is no error.
    """
    try:
        with written_whole(path) as part:
            save_file(dict(tensors), part, notes)
    except (OSError, SafetensorError):
        return False
    return True


def open_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map a file into memory.

    Returns:
        The tensors by name, and the notes.

    Raises:
        OSError: If there is none.
        ValueError: If it is damaged.
    """
    try:
        before = _stamp(path)
        with safe_open(path, "pt") as file:
            names: list[str] = list(file.keys())
            tensors: dict[str, Tensor] = {
                name: _mapped(file.get_tensor(name), path, name, before) for name in names
            }
            notes = file.metadata() or {}
        if _stamp(path) != before:
            raise ValueError(f"{path} was replaced while it was opened")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return tensors, notes


def _mapped(tensor: Tensor, path: Path, key: str, stamp: tuple[int, int]) -> MappedTensor:
    mapped = tensor.as_subclass(MappedTensor)
    mapped.path, mapped.key, mapped.stamp = path, key, stamp
    return mapped


def _stamp(path: Path) -> tuple[int, int]:
    """Tell a file from one that replaces it: while it is mapped, its number is not used again."""
    status = path.stat()
    return status.st_ino, status.st_size


def _open_one(path: Path, key: str, stamp: tuple[int, int]) -> Tensor:
    tensors, _ = open_tensors(path)
    if _stamp(path) != stamp:
        raise ValueError(
            f"{path} was written anew while a worker began: start the run again, it goes on with "
            "--ckpt_path last"
        )
    return tensors[key]


def _same(tensor: Tensor) -> Tensor:
    return tensor
