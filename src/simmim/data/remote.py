"""A packed folder in an object store -> a copy of it on this machine, made once.

Order and crops of the samples are exact, over the whole data set: every node meets every shard
within the first batches, so that a store would be asked for each image by itself. Shards are few
and big, and copied at the speed of the network instead.
"""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback
from fsspec.core import url_to_fs
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from simmim.data.shards import FILE, Packed
from simmim.durable import write_whole, written_whole

STREAMS = 8  # files that are copied at a time
BEGUN = "fetching.json"  # packed.json, until everything that it names is there


def is_url(root: str) -> bool:
    """Whether this is the address of a store, such as s3://bucket/photos."""
    return "://" in root


def local_copy(url: str, data_dir: str) -> str:
    """Name the folder in `data_dir` that the copy lies in."""
    name = url.rstrip("/").rpartition("/")[2]
    return os.path.join(data_dir, f"{name}-{blake2b(url.encode(), digest_size=4).hexdigest()}")


def fetch(url: str, folder: str) -> None:
    """Copy a packed folder, unless it is there; what was copied before an interruption is kept.

    Args:
        url: Address, of any store that fsspec knows: s3://, gs://, https://, file:// ...
        folder: The copy.

    Raises:
        ValueError: If it cannot be read, is no packed folder, or the disk is too small.
    """
    store, path = _ask(url, lambda: url_to_fs(url))
    text = _ask(url, lambda: store.cat_file(f"{path}/{FILE}"))
    copy = Path(folder)
    if (copy / FILE).exists() and (copy / FILE).read_bytes() == text:
        return
    copy.mkdir(parents=True, exist_ok=True)
    _forget_others(copy, text)
    write_whole(copy / BEGUN, text)
    packed = Packed.load(copy, BEGUN)
    if not packed.complete:
        raise ValueError(f"{url} is packed in part only: finish simmim pack, and copy it anew")
    sizes = {s.file: s.size for part in packed.parts.values() for s in part.shards}
    wanted = [name for name, size in sizes.items() if _size(copy / name) != size]
    missing = sum(sizes[name] for name in wanted)
    if missing > (free := shutil.disk_usage(copy).free):
        raise ValueError(
            f"{copy} has {free / 1e9:,.1f} GB free, {missing / 1e9:,.1f} GB are needed for {url}: "
            "use another data.data_dir"
        )
    wanted += [part.index_file for part in packed.parts.values()]
    with (
        Tqdm(total=missing, desc="Copying", unit="B", unit_scale=True) as bar,
        ThreadPoolExecutor(STREAMS) as pool,
    ):
        jobs = [pool.submit(_copy, store, f"{path}/{n}", copy / n, _Bar(bar)) for n in wanted]
        for job in jobs:
            _ask(url, job.result)
    (copy / BEGUN).replace(copy / FILE)


class _Bar(Callback):
    """Tells a progress bar how many bytes were copied."""

    def __init__(self, bar: Any) -> None:
        super().__init__()
        self.bar = bar

    def relative_update(self, inc: int = 1) -> None:
        self.bar.update(inc)


def _copy(store: Any, path: str, target: Path, callback: Callback) -> None:
    with written_whole(target) as part:
        store.get_file(path, str(part), callback=callback)


def _forget_others(copy: Path, text: bytes) -> None:
    """Remove what was copied when the store held something else."""
    known = [copy / name for name in (FILE, BEGUN) if (copy / name).exists()]
    if known and all(file.read_bytes() != text for file in known):
        for file in (*known, *copy.glob("*.arrow")):
            file.unlink()


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.exists() else None


def _ask(url: str, what: Callable[[], Any]) -> Any:
    """Ask the store; whatever goes wrong there is one sentence."""
    try:
        return what()
    except FileNotFoundError as error:
        raise ValueError(
            f"{url} holds no {FILE}, or less than it says: give the address of a folder that "
            "simmim pack has written"
        ) from error
    except Exception as error:  # of the store's own kinds
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{url} cannot be read: {reason or type(error).__name__}") from error
