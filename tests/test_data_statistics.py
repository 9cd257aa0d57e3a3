"""Pixel statistics: ImageNet's, one's own, or measured and remembered."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simmim.data import ImageFolderData, statistics


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIMMIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path, make_images: Callable[..., Path]) -> Path:
    return make_images(tmp_path / "root", 12, size=16)


def fitted(root: Path, **kwargs: Any) -> ImageFolderData:
    module = ImageFolderData(root=str(root), **{"img_size": 16, **kwargs})
    module.setup("fit")
    return module


def test_imagenets(root: Path) -> None:
    module = fitted(root)
    assert (module.mean, module.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    gray = fitted(root, in_chans=1)
    assert gray.mean == pytest.approx([0.449])
    assert gray.std == pytest.approx([0.226])


def test_ones_own(root: Path) -> None:
    module = fitted(root, in_chans=1, statistics=[[0.2], [0.1]])
    assert (module.mean, module.std) == ((0.2,), (0.1,))


def test_measured_over_the_training_images_alone(root: Path) -> None:
    module = fitted(root, statistics="measured", val_fraction=0.25)
    images = module.sets["training"]
    assert len(images) == 9
    pixels = np.stack([np.asarray(Image.open(images.path(i))) for i in range(9)]) / 255
    assert module.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-9)
    assert module.std == pytest.approx(pixels.std((0, 1, 2)), abs=1e-9)


def test_measured_once(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fitted(root, statistics="measured")
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(statistics, "_measure", None)
    again = fitted(root, statistics="measured")
    assert (again.mean, again.std) == (first.mean, first.std)
    with pytest.raises(TypeError):  # images that are read otherwise are measured anew
        fitted(root, statistics="measured", img_size=8)
    Image.new("RGB", (16, 16)).save(root / "000.png")
    with pytest.raises(TypeError):
        fitted(root, statistics="measured")


def test_a_home_that_cannot_be_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMMIM_CACHE", str(root / "000.png"))
    assert fitted(root, statistics="measured").mean is not None


def test_constant_images_do_not_divide_by_zero(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("L", (16, 16), 51).save(tmp_path / f"{i}.png")
    module = fitted(tmp_path, statistics="measured", in_chans=1)
    assert module.mean == pytest.approx([0.2])
    assert module.std == pytest.approx([1 / 255])


def test_only_training_needs_them(root: Path) -> None:
    module = ImageFolderData(root=str(root), statistics="measured")
    module.setup("validate")
    assert module.mean is None
