"""What all tests share: one thread a process, no network, images made on the spot."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist already uses every core

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's cache folder out of it, in subprocesses as well."""
    monkeypatch.setenv("SIMMIM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def for_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """What processes that a test starts inherit: no board, one thread, no seed of another test."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(scope="session")
def make_images() -> Callable[..., Path]:
    """Write small smooth pictures: `make_images(folder, n, size=32)` -> the folder."""

    def make(folder: Path, n: int, size: int | tuple[int, int] = 32, suffix: str = ".png") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        width, height = (size, size) if isinstance(size, int) else size
        for i in range(n):
            y, x = np.mgrid[:height, :width] / max(width, height)
            waves = [np.sin(6 * (x * np.cos(a) + y * np.sin(a)) + a) for a in (i, i + 1, i + 2)]
            pixels = (127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:03d}{suffix}")
        return folder

    return make
