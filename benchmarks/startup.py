"""From the command to the first batch: how time and memory grow with the number of files.

    python benchmarks/startup.py

Nobody has 14 million files at hand: the folders are there, empty, and the index is written into the
cache as a scan of ImageNet-22k's names would have written it. All that follows is real: the folders
are looked at, the index is opened and split, an epoch is put in order, and workers look names up.
One folder of real files, empty ones, says what a scan costs.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR, getLogger
from multiprocessing import get_context
from pathlib import Path
from typing import Literal
from warnings import filterwarnings

import numpy as np
import torch
from jsonargparse import auto_cli
from torch import Tensor

from simmim.data.dataset import ImageData, Loader, collate
from simmim.data.index import FileIndex, Folder, folder_stamp, scan
from simmim.data.index_cache import index_file, read_index, write_index
from simmim.data.labels import label_files
from simmim.data.layout import split_off
from simmim.data.mapped import PLACE
from simmim.data.sampler import EpochSampler
from simmim.data.transforms import CenterCrop

IN_A_FOLDER = 1000  # files, about as in ImageNet-22k
SPLIT = (0.1, 0, None)
BATCH = 256
ROLLUP = Path("/proc/self/smaps_rollup")


@dataclass(frozen=True)
class Times:
    """Seconds of the steps to the first batch."""

    open: float
    split: float
    split_again: float
    order: float


@dataclass(frozen=True)
class Memory:
    """Memory in MB: resident; with shared pages divided among those that share them (PSS).

    Of the latter, `mapped` are pages of files.
    """

    resident: float
    shared_out: float
    mapped: float


def startup(
    files: list[int] | None = None,
    workers: list[int] | None = None,
    real: int = 200_000,
    labels: int = 1_000_000,
    batches: int = 400,
    start: Literal["forkserver", "fork", "spawn"] = "forkserver",
) -> str:
    """Measure what happens before the first batch, and the memory of workers, by number of files.

    Args:
        files: Numbers of files to simulate. 10 thousand to 14 million (ImageNet-22k).
        workers: Numbers of workers whose memory is measured, with the most files. 0, 4 and 8.
        real: Real files, empty ones, that are scanned for comparison.
        labels: Rows of a table of labels (`--data.labels`) that is read, and read again.
        batches: Batches of 256 that are read before the memory is measured; they touch most pages
            of the index.
        start: How workers begin: forkserver (as `simmim` has it on Linux), fork, or spawn (Windows
            and macOS).

    Returns:
        The duration of `simmim --help`, and two tables.
    """
    files = sorted(files or [10_000, 100_000, 1_000_000, 10_000_000, 14_000_000])
    workers = [0, 4, 8] if workers is None else workers
    with _own_cache() as folder:
        times, memory = {}, {}
        with _new_process() as pool:
            for n in files:
                simulate(folder / str(n), n)
                times[n] = pool.submit(measure_times, str(folder / str(n))).result()
            scanned = pool.submit(measure_scan, folder / "real", real).result()
            simulate(folder / "labels", labels)
            named = pool.submit(measure_labels, folder / "labels").result()
        for count in workers if ROLLUP.exists() else ():
            for n in {files[0], files[-1]}:
                with _new_process() as pool:  # whose memory nothing else has touched
                    work = pool.submit(measure_memory, str(folder / str(n)), count, batches, start)
                    memory[count, n] = work.result()
    lines = [
        f"simmim --help: {measure_help():.2f} s",
        "",
        *_time_table(times, real, scanned),
        f"{labels:,} labels in a table: {named[0]:.2f} s to read, {named[1]:.3f} s from the cache",
        "",
        *_memory_table(memory, workers, files, start),
    ]
    return "\n".join(lines)


def measure_help(rounds: int = 5) -> float:
    """Run `simmim --help`: seconds of the best round, the start of the interpreter among them."""
    durations = []
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "simmim", "--help"], capture_output=True, check=True)
        durations.append(time.perf_counter() - began)
    return min(durations)


def measure_times(root: str) -> Times:
    """Open a folder from the cache, split it, and put it in order."""
    marks = [time.perf_counter()]
    index = read_index(root)
    marks.append(time.perf_counter())
    for _ in range(2):
        trains, _ = split_off(index, *SPLIT)
        marks.append(time.perf_counter())
    data = Names(index, CenterCrop((1, 1)), trains)
    next(iter(_sampler(data)))
    marks.append(time.perf_counter())
    return Times(*np.diff(marks).tolist())


def measure_memory(root: str, workers: int, batches: int, start: str) -> list[Memory]:
    """Read batches of names; the memory of this process, of each worker, and of their server."""
    index = read_index(root)
    trains, _ = split_off(index, *SPLIT)
    data = Names(index, CenterCrop((1, 1)), trains)
    data.unreadable.share_memory_()
    loader: Loader[dict[str, Tensor]] = Loader(
        data,
        batch_size=min(BATCH, len(data)),
        sampler=_sampler(data),
        num_workers=workers,
        collate_fn=collate,
        **({} if start == "forkserver" or not workers else {"multiprocessing_context": start}),
    )
    found = []
    for i, _ in enumerate(loader, start=1):
        if i == min(batches, len(loader)):
            found = [memory_of(process) for process in _family(os.getpid())]
            break
    return found


def measure_scan(root: Path, n: int) -> tuple[float, float]:
    """Make files, empty ones; seconds to scan them, and to open them from the cache."""
    for first in range(0, n, IN_A_FOLDER):
        folder = root / f"n{first // IN_A_FOLDER:08d}"
        folder.mkdir(parents=True)
        for place in range(min(IN_A_FOLDER, n - first)):
            (folder / f"{folder.name}_{place:08d}.JPEG").touch()
    for folder in (root, *root.iterdir()):
        os.utime(folder, (time.time() - 3600,) * 2)
    began = time.perf_counter()
    scan(str(root))
    scanned = time.perf_counter() - began
    read_index(str(root))  # into the cache
    began = time.perf_counter()
    read_index(str(root))
    return scanned, time.perf_counter() - began


def measure_labels(root: Path) -> tuple[float, float]:
    """Write a table of all files, with a thousand classes; seconds to read it, and once more."""
    index = read_index(str(root))
    table = root / "labels.csv"
    rows = (f"{name},class {i % 1000}\n" for i, name in enumerate(index.all_names()))
    with table.open("w", encoding="utf-8") as file:
        file.write("path,label\n")
        file.writelines(rows)
    os.utime(table, (time.time() - 3600,) * 2)
    marks = [time.perf_counter()]
    for _ in range(2):
        label_files(str(table), [index], str(root), several=False)
        marks.append(time.perf_counter())
    return marks[1] - marks[0], marks[2] - marks[1]


class Names(ImageData):
    """Images whose pixels are of no interest: what is measured is how their files are found."""

    def read(self, index: int) -> Tensor:
        """Make an image of one pixel of a file's name."""
        return torch.full((3, 1, 1), len(self.path(index)) % 256, dtype=torch.uint8)


def memory_of(process: int | None) -> Memory:
    """Read the memory of a process (Linux)."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    table = {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e6 for line in lines}
    return Memory(table["Rss"], table["Pss"], table["Pss_File"])


def _family(process: int) -> list[int]:
    """A process, those that it has started, and theirs (Linux)."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(pid for child in children for pid in _family(int(child)))]


def _sampler(data: ImageData) -> EpochSampler:
    size = min(BATCH, len(data))
    return EpochSampler(data, size, len(data) // size)


@contextmanager
def _own_cache() -> Iterator[Path]:
    """A folder for the files, and a cache of its own."""
    before = os.environ.get(PLACE)
    folder = Path(tempfile.mkdtemp(prefix="simmim-startup-"))
    os.environ[PLACE] = str(folder / "cache")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if before is None:
            del os.environ[PLACE]
        else:
            os.environ[PLACE] = before


def _new_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), be_quiet)


def be_quiet() -> None:
    """Keep a new process from warning of what is meant."""
    filterwarnings("ignore", "This DataLoader will create")  # more workers than cores are meant
    getLogger("lightning.pytorch").setLevel(ERROR)


def simulate(root: Path, n: int) -> None:
    """Make empty folders, and keep an index as if files lay in them."""
    name = "n00000000/n00000000_00000000.JPEG"
    places = np.arange(n)
    digits = np.tile(np.frombuffer(name.encode(), np.uint8), (n, 1))
    for numbers, ends in ((places // IN_A_FOLDER, (9, 19)), (places % IN_A_FOLDER, (28,))):
        for end in ends:
            for i in range(8):
                digits[:, end - 1 - i] += (numbers // 10**i % 10).astype(np.uint8)
    folders = [f"n{i:08d}" for i in range(-(-n // IN_A_FOLDER))]
    for folder in folders:
        (root / folder).mkdir(parents=True)
    index = FileIndex(
        str(root),
        torch.from_numpy(digits.reshape(-1)),
        torch.arange(n + 1) * len(name),
        torch.from_numpy(places // IN_A_FOLDER),
        folders,
        frozenset({".jpeg"}),
    )
    visited = [Folder(name, stamp=folder_stamp(str(root / name))) for name in ("", *folders)]
    file = index_file(Path(os.environ[PLACE]), str(root))
    if not write_index(file, index, visited):
        raise ValueError(f"{file.parent} cannot be written: set TMPDIR to a disk with some GB")


def _time_table(times: dict[int, Times], real: int, scanned: tuple[float, float]) -> list[str]:
    head = f"{'files':>10}  {'open':>7}  {'split, first':>12}  {'split, kept':>11}  {'order':>7}"
    rows = [
        f"{n:>10,}  {t.open:>5.2f} s  {t.split:>10.2f} s  {t.split_again:>9.2f} s  "
        f"{t.order:>5.2f} s"
        for n, t in times.items()
    ]
    scan_time, open_time = scanned
    return [
        head,
        *rows,
        "",
        f"{real:,} real files, empty: {scan_time:.2f} s to scan, {open_time:.3f} s from the cache",
    ]


def _memory_table(
    memory: dict[tuple[int, int], list[Memory]], workers: list[int], files: list[int], start: str
) -> list[str]:
    if not memory:
        return ["memory: measured on Linux alone"]
    head = (
        f"{'workers':>7}  {'main RSS':>9}  {'worker RSS':>10}  {'worker PSS':>10}  "
        f"{'all, PSS':>9}  {f'with {files[0]:,} files':>20}  {'difference':>10}"
    )
    rows = []
    for count in workers:
        main, *others = memory[count, files[-1]]
        resident = max((one.resident for one in others), default=0.0)
        shared_out = max((one.shared_out for one in others), default=0.0)
        total, least = (
            sum(one.shared_out for one in memory[count, n]) for n in (files[-1], files[0])
        )
        rows.append(
            f"{count:>7}  {main.resident:>6.0f} MB  {resident:>7.0f} MB  {shared_out:>7.0f} MB  "
            f"{total:>6.0f} MB  {least:>17.0f} MB  {total - least:>7.0f} MB"
        )
    title = f"memory with {files[-1]:,} files; workers by {start}, the largest of them:"
    return [title, head, *rows]


if __name__ == "__main__":
    print(auto_cli(startup))
