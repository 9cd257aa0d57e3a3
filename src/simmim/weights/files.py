"""Open files of weights without running anything that is in them."""

import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar
from zipfile import ZipFile, is_zipfile

import torch
from safetensors.torch import load_file
from torch import Tensor

from simmim.weights.shards import META, is_sharded, read_sharded
from simmim.weights.storages import holds_storages

# The official files hold their configuration as a pickled CfgNode, a dict with attributes: an
# OrderedDict has both, so that yacs need neither be installed nor trusted. Likewise the arguments
# of a script, which those of MAE and timm keep beside the weights.
SAFE_GLOBALS: list[Any] = [
    (OrderedDict, "yacs.config.CfgNode"),
    (OrderedDict, "argparse.Namespace"),
]
LAST = ("checkpoints/last.ckpt", "last.ckpt")
T = TypeVar("T")


def find_checkpoint(path: str | Path) -> Path:
    """Find the checkpoint that a user means.

    Args:
        path: A file, the folder of a checkpoint in shards, or that of a run, which means its
            `checkpoints/last.ckpt`.

    Returns:
        The file, or the folder of the shards.

    Raises:
        ValueError: If it is a URL (Lightning would fetch it and run the code in it), if it does not
            exist, or if the folder has no checkpoint.
    """
    if is_url(path):
        raise ValueError(f"{path} is a URL: download the file first and give its path")
    found = Path(path).expanduser()
    if found.is_file() or is_sharded(found):
        return found.parent if found.name == META and is_sharded(found.parent) else found
    if not found.exists():
        raise ValueError(f"{path} does not exist: give a checkpoint or the folder of a run")
    for last in LAST:
        if (found / last).exists():
            return found / last
    runs = [*found.glob(f"version_*/{LAST[0]}"), *found.glob(f"*/version_*/{LAST[0]}")]
    newest = max(runs, key=lambda last: last.stat().st_mtime, default=None)
    hint = f": give one of its runs, such as {newest.parents[1]}" if newest else ""
    raise ValueError(f"{path} has no checkpoints/last.ckpt{hint}")


def is_url(path: str | Path) -> bool:
    """Whether it names something on the network (https://..., s3://...)."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", str(path)) is not None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `torch.save`, safetensors or a sharded strategy wrote, only tensors and values.

    Raises:
        ValueError: If the file asks for code to be run, or cannot be read.
    """
    if path.is_dir():
        return read_sharded(path)
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except Exception as error:  # safetensors has a kind of its own
            raise ValueError(f"{path} is damaged, or no safetensors: {error}") from error
    check_archive(path)
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no pickle fails in any way
        raise ValueError(_refusal(path, error)) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a table of weights")
    return content


def load_safely(load: Callable[..., T], source: Any, *args: Any, **kwargs: Any) -> T:
    """Call Lightning's `load_from_checkpoint` such that no code in the file is run.

    By itself it would run that of a file at a URL. A checkpoint in shards is put together first.

    Args:
        load: The method.
        source: A path, of a file or of a folder of shards, a URL, or an open file.
        args: As it takes them.
        kwargs: As it takes them; weights_only=False trusts the file.

    Raises:
        ValueError: If the file asks for code to be run, or is damaged, or no file of torch.
    """
    opened: Any = source
    if isinstance(source, str | Path) and str(source).startswith("http"):
        import fsspec  # torch's own download would take an older file of that name for it

        with fsspec.open(str(source), "rb") as stream:
            opened = BytesIO(stream.read())
    elif isinstance(source, str | Path) and is_sharded(source):
        opened = BytesIO()
        torch.save(read_sharded(Path(source)), opened)
    if isinstance(opened, BytesIO):
        check_archive(source, opened)
        opened.seek(0)
    elif isinstance(opened, str | Path):
        check_archive(opened)
    try:
        return load(opened, *args, **{"weights_only": True, **kwargs})
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(source, error)) from error


def check_archive(path: str | Path, stream: BytesIO | None = None) -> None:
    """Compare a checkpoint with what it says of itself, which torch believes.

    Args:
        path: The file.
        stream: Its content, where it is not on the disk.

    Raises:
        ValueError: If check sums differ, if a record is shorter than the tensors in it (torch 2.9
            reads on behind its end, and the process may end with SIGSEGV; 2.15 refuses it), or if
            it would fill the memory: torch packs nothing, so that no file is larger when open.
    """
    source = stream or Path(path)
    if not is_zipfile(source):  # before torch 1.6 it was none
        return
    try:
        size = len(stream.getbuffer()) if stream else Path(path).stat().st_size
        with ZipFile(source) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
            is_whole = claimed <= size and archive.testzip() is None and holds_storages(archive)
    except Exception as error:  # a damaged table of contents leads anywhere
        raise ValueError(f"{path} is damaged: {error}") from error
    if not is_whole:
        raise ValueError(f"{path} is damaged: copy it again, or use an earlier one")


def _refusal(path: Any, error: Exception) -> str:
    """Say why torch does not open a file."""
    # A text that begins like a pickle names no such thing.
    code = re.search(r"GLOBAL ([A-Za-z_][\w.]*) (?:was|whose)", str(error))
    if code is None or not isinstance(error, pickle.UnpicklingError):
        return f"{path} is not a file of weights that torch can read"
    return (
        f"{path} asks to run {code[1]} while it is opened, which no file of weights needs: "
        "it was not opened"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read the table that lies beside weights.

    Raises:
        ValueError: If it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or no json: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a table of options")
    return content


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a folder that `save_pretrained` or timm wrote, in one file or in shards.

    Raises:
        ValueError: If there are none, or a shard is not in the folder.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return read_checkpoint(folder / stem)
        index = folder / f"{stem}.index.json"
        if index.is_file():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict):
                raise ValueError(
                    f"{index} does not say where the weights are: it has no weight_map"
                )
            shards = sorted({str(shard) for shard in places.values()})
            return {
                name: tensor
                for shard in shards
                for name, tensor in read_checkpoint(_inside(folder, shard)).items()
            }
    raise ValueError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def _inside(folder: Path, name: str) -> Path:
    if Path(name).name != name:
        raise ValueError(f"{folder} names the shard {name!r}, which is not in it")
    return folder / name
