"""How many processes read images, and which signals they leave to the one that trains."""

import os
import signal
from typing import Any

from simmim.data.dataset import ImageData

SMALL = 32 * 2**20  # bytes of images, which one process reads in a second or two
MAX_WORKERS = 16


def default_workers(data: ImageData, processes: int = 1) -> int:
    """Choose a number of workers: none for a small folder, otherwise the cores less one.

    Args:
        data: What they are to read.
        processes: Processes on this machine that share its cores.
    """
    if _estimate_bytes(data) < SMALL:
        return 0
    return min(max(cpu_count() // processes - 1, 1), MAX_WORKERS)


def outlive_the_first_signal(worker: int) -> None:
    """Let a worker read on when a scheduler, or Ctrl+C, tells all processes to stop.

    The process that trains ends its step first, and its workers afterwards; a worker that died
    before would end the run in the middle of a step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # they end with the process that asked them
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _once)


def _once(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_DFL)


def _estimate_bytes(data: ImageData) -> int:
    """Estimate the size of all files from 64 of them."""
    sizes = [data.size(index) for index in range(0, len(data), -(-len(data) // 64))]
    return sum(sizes) * len(data) // len(sizes)


def cpu_count() -> int:
    """Count the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
