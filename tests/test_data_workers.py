"""Processes that read images: what they need of the script that starts them."""

import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from simmim.data.transforms import CenterCrop
from simmim.data.workers import worker_context

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="others spawn, as Python does")

SCRIPT = """
import os
import sys
import threading
import warnings
from simmim.data.dataset import ImageData, Loader, collate
from simmim.data.index import scan
from own import Crop

def read(workers):
    data = ImageData(scan("images"), Crop((8, 8)))
    loader = Loader(data, batch_size=4, collate_fn=collate, num_workers=workers)
    print([batch["index"].tolist() for batch in loader], data.unreadable.tolist(), flush=True)

read(0)
threading.Thread(target=threading.Event().wait, daemon=True).start()
read(2)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    process = os.fork()
if process == 0:
    read(2)
    sys.exit()
os.waitpid(process, 0)
"""
OWN = """
from simmim.data.transforms import CenterCrop

class Crop(CenterCrop):
    pass
"""


@pytest.fixture
def place(tmp_path: Path, make_images: Callable[..., Path]) -> Path:
    """A working folder with images, one of them bad, and a module with a transform."""
    make_images(tmp_path / "images", 8)
    (tmp_path / "images" / "005.png").write_bytes(b"text")
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


@LINUX
@pytest.mark.parametrize("by", ["file", pytest.param("stdin", marks=pytest.mark.slow)])
def test_a_script_is_run_once_and_its_own_modules_are_found(place: Path, by: str) -> None:
    """It has a thread, as Python warns of where it forks; then it forks itself, as notebooks do."""
    (place / "script.py").write_text(SCRIPT)
    named = ["script.py"] if by == "file" else ["-"]
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:multiprocessing", *named],
        input=SCRIPT,
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    alone, *others = done.stdout.splitlines()
    assert alone.endswith("[0, 0, 0, 0, 0, 1, 0, 0]")
    assert others == [alone, alone]
    assert not done.stderr


def test_what_the_script_defines_is_read_as_python_would() -> None:
    """A class of a notebook's cell, or a lambda: by default a fork on Linux before 3.14."""
    default = multiprocessing.get_context().get_start_method()
    transform = type("Own", (CenterCrop,), {"__module__": "__main__"})((8, 8))
    sys.modules["__main__"].Own = type(transform)  # type: ignore[attr-defined]
    try:
        for sent in (transform, lambda image: image):
            assert worker_context(sent).get_start_method() == default
    finally:
        del sys.modules["__main__"].Own  # type: ignore[attr-defined]


@LINUX
def test_others_are_not_forked_from_this_process() -> None:
    assert worker_context(CenterCrop((8, 8))).get_start_method() == "forkserver"
