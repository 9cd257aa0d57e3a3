"""Open files of weights without running anything that is in them."""

import json
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from simmim.weights.shards import META, is_sharded, read_sharded

# The official files hold their configuration as a pickled CfgNode, a dict with attributes: an
# OrderedDict has both, so that yacs need neither be installed nor trusted.
SAFE_GLOBALS: list[Any] = [(OrderedDict, "yacs.config.CfgNode")]
LAST = ("checkpoints/last.ckpt", "last.ckpt")


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
    versions = sorted(found.glob("version_*/checkpoints/last.ckpt"))
    hint = f": give one of its runs, such as {versions[-1].parents[1]}" if versions else ""
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
        return dict(load_file(path))
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # A text that begins like a pickle names no such thing.
        code = re.search(r"GLOBAL ([A-Za-z_][\w.]*) (?:was|whose)", str(error))
        if code is None:
            raise ValueError(f"{path} is not a file of weights that torch can read") from error
        raise ValueError(
            f"{path} asks to run {code[1]} while it is opened, which no file of weights needs: "
            "it was not opened"
        ) from error
    except Exception as error:  # what is no pickle fails in any way
        raise ValueError(f"{path} is not a file of weights that torch can read") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a table of weights")
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
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
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
