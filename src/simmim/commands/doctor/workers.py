"""Work that a bad file may kill, in processes: the file is named, and the others go on.

A pool of `concurrent.futures` breaks as a whole and does not say on what. Here each process has a
pipe of its own: what it was given and has not answered is what it died of.
"""

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from simmim.data.workers import worker_context

T = TypeVar("T")
R = TypeVar("R")

CHUNK = 16  # items that are sent at once
PATIENCE = 120.0  # seconds for one item: whatever takes longer hangs


def run_all(
    work: Callable[[T], R],
    items: Sequence[T],
    workers: int,
    killed: Callable[[T, str], R],
    patience: float = PATIENCE,
) -> Iterator[tuple[int, R]]:
    """Do something with each item, in other processes.

    Args:
        work: What is done. It and the items are sent to the processes.
        items: With what.
        workers: Number of processes.
        killed: What stands for the result of an item that has ended its process, or taken longer
            than `patience`; it is given the reason.
        patience: Seconds.

    Yields:
        The place of each item and its result, in the order in which they are done.
    """
    waiting = deque(range(len(items)))
    crew = [_Worker(work) for _ in range(min(workers, -(-len(items) // CHUNK)))]
    try:
        while waiting or any(worker.todo for worker in crew):
            for worker in crew:
                if not worker.todo and waiting:
                    places = [waiting.popleft() for _ in range(min(CHUNK, len(waiting)))]
                    worker.give(places, items)
            busy = [worker for worker in crew if worker.todo]
            ready = wait([handle for w in busy for handle in w.handles], timeout=1.0)
            for worker in busy:
                if any(handle in ready for handle in worker.handles):
                    yield from worker.take()
                reason = worker.fault(patience)
                if reason:
                    place, *rest = worker.todo
                    yield place, killed(items[place], reason)
                    crew[crew.index(worker)] = fresh = _Worker(work)
                    worker.end()
                    fresh.give(rest, items)
    finally:
        for worker in crew:
            worker.end()


class _Worker:
    """A process, and what it has been given and not answered yet."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        context = worker_context(work, _serve)
        self.pipe, theirs = context.Pipe()
        self.process: Any = context.Process(target=_serve, args=(work, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.todo: list[int] = []
        self.since, self.ready, self.gone = time.monotonic(), False, False

    @property
    def handles(self) -> tuple[Any, Any]:
        """What becomes ready when it has answered, or is dead."""
        return self.pipe, self.process.sentinel

    def give(self, places: list[int], items: Sequence[Any]) -> None:
        """Send items to it."""
        self.todo, self.since = list(places), time.monotonic()
        with suppress(OSError):  # it is dead already: `fault` says so
            if places:
                self.pipe.send([items[place] for place in places])

    def take(self) -> Iterator[tuple[int, Any]]:
        """Receive what it has answered."""
        try:
            while self.todo and self.pipe.poll():
                answer = self.pipe.recv()
                if isinstance(answer, _Failure):
                    raise answer.error
                if self.ready:
                    yield self.todo.pop(0), answer
                self.ready, self.since = True, time.monotonic()
        except (EOFError, OSError):  # the pipe has no other end
            self.gone = True
            self.process.join(5)

    def fault(self, patience: float) -> str:
        """Say why it will not answer any more; empty where it will."""
        if not self.todo:
            return ""
        if self.gone or not (self.process.is_alive() or self.pipe.poll()):
            return f"it ends the process that reads it ({_signal(self.process.exitcode or 0)})"
        if self.ready and time.monotonic() - self.since > patience:
            return f"to read it takes more than {patience:g} seconds"
        return ""

    def end(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.kill()
        self.process.join()


class _Failure:
    """An error of our own: `work` says by its result what is wrong with an item."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    """Answer item by item, until the other end is closed or its process is gone."""
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None
    with suppress(EOFError, OSError, KeyboardInterrupt):
        pipe.send(None)  # what it has imported until here is not counted
        while pipe in wait([pipe, parent.sentinel]):
            for item in pipe.recv():
                try:
                    answer = work(item)
                except Exception as error:
                    answer = _Failure(error)
                pipe.send(answer)


def _signal(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit status {code}"
