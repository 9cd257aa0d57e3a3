"""Progress of what a person waits for: drawn in place on a terminal, elsewhere a line a minute.

A log file or a scheduler's output gets whole lines, few enough to read.
"""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

EVERY = 60.0  # seconds between two lines of the same bar
CONTROLS = re.compile(r"\r|\n|\x1b\[[0-9;]*[A-Za-z]")  # how a terminal is made to draw in place

_written: dict[str, float] = {}  # when each kind of line was, by time.monotonic


class Bar(Tqdm):
    """tqdm's bar on stderr, or as lines where that is no terminal.

    Args:
        args: As tqdm takes them.
        kwargs: Likewise.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        stream = kwargs.get("file") or sys.stderr
        if not can_redraw(stream):
            kwargs["file"] = Lines(stream, ends=kwargs.get("leave", True))
        super().__init__(*args, **kwargs)


@contextmanager
def status(text: str) -> Iterator[None]:
    """Say what is being done, while nothing can be counted."""
    with Bar(desc=text, bar_format="{desc} ...", leave=False):
        yield


def can_redraw(stream: TextIO) -> bool:
    """Whether a stream shows a line that is written over: a terminal or a notebook."""
    notebook = type(stream).__module__.startswith("ipykernel")
    return notebook or (hasattr(stream, "isatty") and stream.isatty())


class Lines:
    """A stream that takes what a bar draws, and writes it as whole lines, one in a minute.

    Args:
        stream: Where they go.
        ends: Whether a bar's end is written, too, however soon it comes.
    """

    def __init__(self, stream: TextIO, *, ends: bool = False) -> None:
        self.stream, self.ends = stream, ends
        self._ended = ""

    @property
    def encoding(self) -> str:
        """That of the stream: tqdm draws with # where it cannot hold blocks."""
        return getattr(self.stream, "encoding", None) or "ascii"

    def write(self, text: str) -> None:
        """Write a line, unless there was one of its kind just now."""
        line = CONTROLS.sub("", text).strip()
        if " 0/?" in line or line.startswith("Training  "):  # Lightning's, before an epoch begins
            return
        kind = re.split(r"[\d|]", line)[0].strip()  # "Epoch 3/95   0%|" -> "Epoch"
        before, ends, _ = line.partition(" 100%")
        ends = ends if self.ends and before != self._ended else ""
        now = time.monotonic()
        # A bar that leaves nothing behind has no line unless it takes longer than a minute.
        since = _written.setdefault(kind, -EVERY if self.ends else now)
        if line and (ends or abs(now - since) >= EVERY):
            _written[kind] = now
            self._ended = before if " 100%" in line else ""
            self.stream.write(f"{line}\n")
            self.stream.flush()

    def flush(self) -> None:
        """Nothing is held back."""
