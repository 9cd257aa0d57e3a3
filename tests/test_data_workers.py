"""Processes that read images: what they need of the script that starts them."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from simmim.data.transforms import CenterCrop
from simmim.data.workers import worker_context
from support.folders import make_images

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
"""
FORKED = """
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    process = os.fork()
if process == 0:
    read(2)
    sys.exit()
os.waitpid(process, 0)
"""
OWN = "from simmim.data.transforms import CenterCrop\nclass Crop(CenterCrop):\n    pass\n"


@LINUX
@pytest.mark.exhaustive
@pytest.mark.parametrize(("by", "script"), [("script.py", SCRIPT), ("-", SCRIPT + FORKED)])
def test_a_script_is_run_once_and_its_own_modules_are_found(
    tmp_path: Path, by: str, script: str
) -> None:
    """It has a thread, as Python warns of where it forks; it may fork itself, as notebooks do."""
    make_images(tmp_path / "images", 8)
    (tmp_path / "images" / "005.png").write_bytes(b"text")
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:multiprocessing", by],
        input=script,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    alone, *others = done.stdout.splitlines()
    assert alone.endswith("[0, 0, 0, 0, 0, 1, 0, 0]")
    assert others == [alone] * (2 if by == "-" else 1)
    assert not done.stderr


@LINUX
def test_what_the_script_defines_is_read_as_python_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of a notebook's cell, or a lambda: by default a fork on Linux before 3.14."""
    default = multiprocessing.get_context().get_start_method()
    own = type("Own", (CenterCrop,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Own", own, raising=False)
    for sent in (own((8, 8)), lambda image: image):
        assert worker_context(sent).get_start_method() == default
    assert worker_context(CenterCrop((8, 8))).get_start_method() == "forkserver"  # others
