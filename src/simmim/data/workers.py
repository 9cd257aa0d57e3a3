"""Processes that read images: how many, how they are started, which signals they ignore.

Where Python would fork (Linux), they are forked from a server instead, as Python 3.14 does: a
process that has threads must not be forked, as a lock that another thread holds at that moment is
held in the child for ever. The server has one thread, and imports once what all workers need. What
they read is sent to them: arrays as a place in a file or in shared memory, see mapped.py.
"""

import os
import pickle
import signal
import sys
from io import BytesIO
from multiprocessing import context, forkserver, get_context
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from simmim.data.dataset import ImageData

SMALL = 32 * 2**20  # bytes of images, which one process reads in a second or two
MAX_WORKERS = 16
MAIN = {"__main__", "__mp_main__"}  # the script, and what it is called in a process it started


def default_workers(data: "ImageData", processes: int = 1) -> int:
    """Choose a number of workers: none for a small folder, otherwise the cores less one.

    Args:
        data: What they are to read.
        processes: Processes on this machine that share its cores.
    """
    if _estimate_bytes(data) < SMALL:
        return 0
    return min(max(cpu_count() // processes - 1, 1), MAX_WORKERS)


def worker_context(*sent: Any) -> Any:
    """Choose how processes are started that get these objects.

    They do not run the user's script once more, so that it needs no `if __name__ == "__main__"`.
    Objects that are defined in it, or cannot be pickled, leave the choice to Python: before 3.14
    that is a fork on Linux.
    """
    default = get_context()
    modules = _modules_of(sent)
    if default.get_start_method() not in ("fork", "forkserver") or MAIN & modules:
        return default
    server = _ServerContext()
    own = sorted(name for name in modules if name.startswith("simmim."))
    server.set_forkserver_preload(["simmim.data.server", *own])
    return server


if sys.platform != "win32":

    class _ServerProcess(context.ForkServerProcess):
        @staticmethod
        def _Popen(process: Any) -> Any:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = ModuleType("__main__")  # of no file: nothing is to be run
            try:
                return context.ForkServerProcess._Popen(process)
            finally:
                sys.modules["__main__"] = main

    class _ServerContext(context.ForkServerContext):
        Process = _ServerProcess

    # A process that was forked (ddp_notebook) cannot ask its parent's server: it starts its own.
    os.register_at_fork(after_in_child=forkserver._forkserver.__init__)  # type: ignore[misc]


def _modules_of(sent: Any) -> set[str]:
    """The modules that are needed to unpickle this; the script where it cannot be pickled."""
    pickler = _Modules(BytesIO())
    try:
        pickler.dump(sent)
    except Exception:  # of any kind, from any class
        return set(MAIN)
    return pickler.modules


class _Modules(pickle.Pickler):
    """Collects the modules of what it pickles, and leaves out tensors: they may be large."""

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file)
        self.modules: set[str] = set()

    def persistent_id(self, value: Any) -> str | None:
        return "tensor" if isinstance(value, Tensor) else None

    def reducer_override(self, value: Any) -> Any:
        named = value if hasattr(value, "__qualname__") else type(value)
        self.modules.add(str(named.__module__))
        return NotImplemented


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


def _estimate_bytes(data: "ImageData") -> int:
    """Estimate the size of all files from 64 of them."""
    sizes = [data.size(index) for index in range(0, len(data), -(-len(data) // 64))]
    return sum(sizes) * len(data) // len(sizes)


def cpu_count() -> int:
    """Count the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
