"""A packed folder in an object store -> a copy of it on this machine, made once.

Order and crops of the samples are exact, over the whole data set: every node meets every shard
within the first batches, so that a store would be asked for each image by itself. Shards are few
and big, and copied at the speed of the network instead.
"""

import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback
from fsspec.core import url_to_fs
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from simmim.base.files import UNFINISHED, write_whole, written_whole
from simmim.base.progress import Bar
from simmim.data.shards import FILE, Packed, digest_of_file

STREAMS = 8  # files that are copied at a time
BEGUN = "fetching.json"  # packed.json, until everything that it names is there


def is_url(root: str) -> bool:
    """Whether this is the address of a store, such as s3://bucket/photos."""
    return "://" in root


def local_copy(url: str, data_dir: str) -> str:
    """Name the folder in `data_dir` that the copy lies in."""
    name = shown(url).rstrip("/").rpartition("/")[2]
    return os.path.join(
        data_dir, f"{name}-{blake2b(shown(url).encode(), digest_size=4).hexdigest()}"
    )


def fetch(url: str, folder: str) -> str:
    """Copy a packed folder, unless it is there; what was copied before an interruption is kept.

    Several processes may ask for it at once: one copies, the others wait. Where the store cannot be
    reached, the newest whole copy is used as it is. Where the store holds something else than what
    was copied, this is copied beside it: another run may still read the earlier copy, so that it is
    never removed.

    Args:
        url: Address, of any store that fsspec knows: s3://, gs://, https://, file:// ...
        folder: The copy.

    Returns:
        The copy of what the store holds: the folder, or one whose name continues its name.

    Raises:
        ValueError: If it cannot be read, is no packed folder, or the disk is too small.
    """
    copy = Path(folder)
    try:
        store, path, text = read_store(url)
    except ValueError as error:
        newest = newest_copy(folder)
        if newest is None:
            raise
        rank_zero_warn(f"{error}; the copy in {newest} is used as it is")
        return newest
    if not _is_whole(_version(copy, text), text):
        copy.mkdir(parents=True, exist_ok=True)
        with _alone(url, copy):
            target = _version(copy, text)
            if not _is_whole(target, text):
                if target != copy:
                    rank_zero_info(
                        f"{shown(url)} has changed: it is copied anew, beside {copy}, which can be "
                        "removed when no run reads it any more"
                    )
                target.mkdir(exist_ok=True)
                _copy_all(url, store, path, text, target)
    return str(_version(copy, text))


def newest_copy(folder: str) -> str | None:
    """Find the latest whole copy that `fetch` made for a folder; None where there is none."""
    copy = Path(folder)
    files = [copy / FILE, *copy.parent.glob(f"{glob.escape(copy.name)}-{'[0-9a-f]' * 8}/{FILE}")]
    whole = [file for file in files if file.exists()]
    return str(max(whole, key=lambda file: file.stat().st_mtime_ns).parent) if whole else None


def _version(copy: Path, text: bytes) -> Path:
    """The folder for what a packed.json names: the first in the folder itself, others beside it."""
    if not (copy / FILE).exists() or _is_whole(copy, text):
        return copy
    return copy.with_name(f"{copy.name}-{blake2b(text, digest_size=4).hexdigest()}")


def read_store(url: str) -> tuple[Any, str, bytes]:
    """Look a packed folder up.

    Returns:
        The store, the path of the folder in it, and its packed.json.

    Raises:
        ValueError: If it cannot be read, or is no packed folder.
    """
    store, path = ask_store(url, lambda: url_to_fs(url))
    return store, path, ask_store(url, lambda: store.cat_file(f"{path}/{FILE}"))


def _is_whole(copy: Path, text: bytes) -> bool:
    return (copy / FILE).exists() and (copy / FILE).read_bytes() == text


@contextmanager
def _alone(url: str, copy: Path) -> Iterator[None]:
    """Wait until no other process copies; one that ends, or is killed, lets go."""
    from filelock import FileLock, Timeout

    lock = FileLock(copy.with_name(f".{copy.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        rank_zero_info(f"another process copies {shown(url)}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _copy_all(url: str, store: Any, path: str, text: bytes, copy: Path) -> None:
    """Copy what is not there yet.

    Args:
        url: What was asked for.
        store: The store.
        path: The packed folder in it.
        text: Its packed.json.
        copy: The copy.
    """
    _forget_others(copy, text)
    write_whole(copy / BEGUN, text)
    packed = Packed.load(copy, BEGUN)
    if not packed.complete:
        raise ValueError(
            f"{shown(url)} is packed in part only: finish simmim pack, and copy it anew"
        )
    shards = {shard.file: shard for part in packed.parts.values() for shard in part.shards}
    wanted = {n: shard.digest for n, shard in shards.items() if _size(copy / n) != shard.size}
    missing = sum(shards[name].size for name in wanted)
    if missing > (free := shutil.disk_usage(copy).free):
        raise ValueError(
            f"{copy} has {free / 1e9:,.3g} GB free, {missing / 1e9:,.3g} GB are needed for "
            f"{shown(url)}: use another data.data_dir"
        )
    wanted |= {part.index_file: "" for part in packed.parts.values()}
    with (
        Bar(total=missing, desc="Copying", unit="B", unit_scale=True) as bar,
        ThreadPoolExecutor(STREAMS) as pool,
    ):
        jobs = [
            pool.submit(_copy, store, f"{path}/{name}", copy / name, digest, _Bar(bar))
            for name, digest in wanted.items()
        ]
        try:
            for job in jobs:
                ask_store(url, job.result)
        finally:
            pool.shutdown(cancel_futures=True)  # what has not begun, where something went wrong
    (copy / BEGUN).replace(copy / FILE)


def shown(url: str) -> str:
    """An address without what is nobody's business: a password in front, a signature behind."""
    scheme, _, rest = url.partition("://")
    place = rest.partition("?")[0]
    host, slash, path = place.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def ask_store(url: str, what: Callable[[], Any]) -> Any:
    """Ask a store.

    Args:
        url: Its address.
        what: Does it.

    Raises:
        ValueError: Whatever goes wrong there, in one sentence without passwords.
    """
    try:
        return what()
    except FileNotFoundError as error:
        raise ValueError(
            f"{shown(url)} holds no {FILE}, or less than it says: give the address of a folder "
            "that simmim pack has written"
        ) from error
    except Exception as error:  # of the store's own kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        reason = re.sub(r"\w+://[^\s'\"]+", lambda found: shown(found[0]), reason)
        raise ValueError(f"{shown(url)} cannot be read: {reason}") from error


class _Bar(Callback):
    """Tells a progress bar how many bytes were copied."""

    def __init__(self, bar: Any) -> None:
        super().__init__()
        self.bar = bar

    def relative_update(self, inc: int = 1) -> None:
        self.bar.update(inc)


def _copy(store: Any, path: str, target: Path, digest: str, callback: Callback) -> None:
    with written_whole(target) as part:
        store.get_file(path, str(part), callback=callback)
        if digest and digest_of_file(part) != digest:
            raise ValueError(f"{target.name} is not what {FILE} says, or was damaged on its way")


def _forget_others(copy: Path, text: bytes) -> None:
    """Remove what was half copied, and all that was copied of what the store held before.

    No run reads a folder that is not whole yet.
    """
    for leftover in copy.glob(f".*{UNFINISHED}"):
        leftover.unlink()
    begun = copy / BEGUN
    if begun.exists() and begun.read_bytes() != text:
        for file in (begun, *copy.glob("*.arrow")):
            file.unlink()


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.exists() else None
