"""Files that are whole, or what they were: written beside their place, and then put there.

Whatever happens meanwhile (kill -9, a full disk, a power cut), what lies under the final name is
the earlier file or the new one. And what reads a config, as it is.
"""

import errno
import os
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

UNFINISHED = ".unfinished"  # what a name ends with while something is being written


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a name to write to; the file gets its own when it is whole, and safely on the disk.

    Args:
        path: Where it shall be. Its folder is made.

    Raises:
        OSError: If the disk is full; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = beside(path)
    try:
        yield part
        sync(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file such that it is whole, or what it was; text as UTF-8."""
    with written_whole(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def beside(path: Path) -> Path:
    """A name in the same folder that no other process uses, hidden and known as unfinished."""
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}{UNFINISHED}")


def sync(path: Path) -> None:
    """See that a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut (Windows cannot open folders, and need not)."""
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
                raise
        finally:
            os.close(descriptor)


def read_config(path: Path) -> dict[str, Any]:
    """Read a config file as it is.

    Raises:
        ArgumentError: If it is not YAML, or not a mapping of options.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError(None, f"config {path} is not valid YAML: {error}") from error
    if not isinstance(config, dict | None):
        raise ArgumentError(None, f"config {path} holds a {type(config).__name__}, not options")
    return config or {}
