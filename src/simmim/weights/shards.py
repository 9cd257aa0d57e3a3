"""A checkpoint that is a folder of shards, as torch.distributed.checkpoint writes them."""

import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

META = "meta.pt"  # where Lightning keeps what is neither weights nor the optimiser's
INDEX = ".metadata"  # torch's, a pickle
SAFE = {  # what such an index is made of, beside torch's types of numbers
    "builtins": {"dict", "list", "set", "tuple"},
    "collections": {"OrderedDict"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


def is_sharded(path: str | Path) -> bool:
    """Whether this is the folder of a checkpoint in shards."""
    return Path(path, META).is_file()


def read_sharded(folder: Path) -> dict[str, Any]:
    """Put a checkpoint in shards together, as it would have been in one file.

    Args:
        folder: What a sharded strategy of Lightning wrote, from any number of processes.

    Raises:
        ValueError: If a part is missing or damaged, or asks for code to be run.
    """
    content: dict[str, Any] = {}
    safe_metadata(folder)
    try:
        _load_state_dict(
            content,
            storage_reader=_SafeReader(folder),
            planner=_EmptyStateDictLoadPlanner(),
            no_dist=True,
        )
        meta = torch.load(folder / META, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch makes of a file that is missing or cut off
        raise ValueError(
            f"{folder} is no whole checkpoint in shards: copy it again, with every file in it"
        ) from error
    weights = content.pop("state_dict")
    states = [content[f"optimizer_{i}"] for i in range(len(content))]
    return {**meta, "state_dict": weights, "optimizer_states": [by_position(s) for s in states]}


def by_position(state: dict[str, Any]) -> dict[str, Any]:
    """Number the parameters of an optimiser's state in the order of its groups, as torch does.

    Args:
        state: `state` by the names of parameters, and `param_groups` that list names.
    """
    groups = list(state["param_groups"])
    names = [name for group in groups for name in group["params"]]
    places = {name: i for i, name in enumerate(names)}
    return {
        "state": {places[name]: values for name, values in state["state"].items()},
        "param_groups": [{**g, "params": [places[name] for name in g["params"]]} for g in groups],
    }


def safe_metadata(folder: Path) -> Metadata:
    """Read torch's index of a folder of shards, without running anything that is in it.

    Raises:
        ValueError: If it is missing or damaged, or asks for code to be run.
    """
    try:
        with (folder / INDEX).open("rb") as file:
            index = _SafeUnpickler(file).load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{folder / INDEX} is not opened: {error}") from error
    except Exception as error:  # what is no pickle fails in any way
        raise ValueError(
            f"{folder} is no whole checkpoint in shards: {INDEX} is missing or damaged"
        ) from error
    if not isinstance(index, Metadata):
        raise ValueError(f"{folder / INDEX} is no index of shards")
    return index


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in SAFE.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith("pathlib") and name.endswith("Path"):  # where it was written
            return PurePosixPath
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}")


class _SafeReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return safe_metadata(Path(self.path))
