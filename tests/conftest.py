"""What all tests share: one thread a process, no network, images made on the spot."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # about what LightningCLI calls
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist already uses every core

import pytest
import torch

from support import folders  # and nothing of simmim: its shapes are checked from its import on

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's cache folder out of it, in subprocesses as well."""
    monkeypatch.setenv("SIMMIM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    """End what a test has started, and forget the processes that it was one of."""
    yield
    if "support.processes" in sys.modules:
        sys.modules["support.processes"].kill_all()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK"):
        os.environ.pop(name, None)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, without a board."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # another test's
    return tmp_path


@pytest.fixture
def tiny_run(tmp_path_factory: pytest.TempPathFactory, workdir: Path) -> Callable[[str], Path]:
    """Copy data and a finished run of a task into the working folder: `tiny_run("classify")`."""

    def copy(task: str) -> Path:
        from support.runs import make_run

        base = tmp_path_factory.getbasetemp()
        base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        shutil.copytree(make_run(task, base), workdir, dirs_exist_ok=True)
        return Path("runs", task, "version_0")

    return copy


@pytest.fixture(scope="session")
def make_images() -> Callable[..., Path]:
    """Write small smooth pictures: `make_images(folder, n, size=32)` -> the folder."""
    return folders.make_images
