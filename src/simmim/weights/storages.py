"""Whether the numbers are there that the tensors of a checkpoint ask for."""

import pickle
from io import BytesIO
from typing import Any
from zipfile import ZipFile

BYTES = {  # of a number, by torch's name of the storage that holds it
    **dict.fromkeys(("Byte", "Char", "Bool", "QInt8", "QUInt8"), 1),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    "ComplexDouble": 16,
}


def holds_storages(archive: ZipFile) -> bool:
    """Whether each record of an open checkpoint is as long as the storage that is read from it.

    Raises:
        Exception: Of many kinds, where it is damaged.
    """
    names = [name.lower() for name in archive.namelist()]
    if len({*names}) != len(names):  # torch, which ignores case, might read the other one
        return False
    folder = archive.namelist()[0].partition("/")[0]
    table = f"{folder}/data.pkl"
    if table.lower() not in names:  # not of torch.save: torch says so
        return True
    reader = _Storages(BytesIO(archive.read(table)))
    reader.load()
    return all(
        archive.getinfo(f"{folder}/data/{key}").file_size >= size
        for key, size in reader.sizes.items()
    )


class _Inert:
    """Stands for whatever a pickle names: takes what is done to it, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Take an item of a list."""

    add = extend = append


class _Storages(pickle._Unpickler):  # the one in Python, whose memory no number in a file fills
    """Reads a pickle without making anything of it, and notes the storages that it names.

    Attributes:
        sizes: Bytes of each, by its key.
    """

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Give what takes its place; nothing is imported."""
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        """Note a storage: ("storage", its class, key, device, how many numbers)."""
        _, kind, key, _, count = pid
        size = count * BYTES.get(kind.__name__.removesuffix("Storage"), 1)
        self.sizes[key] = max(self.sizes.get(key, 0), size)
        return _Inert()
