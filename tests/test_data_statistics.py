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


def scans(root: Path) -> Path:
    """Dim and bright scans of 16 bits, and a photograph."""
    (root / "a").mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(12):
        values = random.integers(0, 500 + 500 * (i % 4), (24, 24), dtype=np.uint16)
        Image.fromarray(values).save(root / "a" / f"{i:02d}.png")
    Image.new("L", (24, 24), 200).save(root / "a" / "photo.png")
    (root / "a" / "bad.png").write_bytes(b"")
    return root


def test_percentiles_of_the_data_set(tmp_path: Path, cache: Path) -> None:
    root = scans(tmp_path / "scans")
    options = {"in_chans": 1, "percentiles": (1, 99), "val_fraction": 0.0, "statistics": "measured"}
    module = fitted(root, percentiles_of="dataset", **options)
    files = sorted((root / "a").glob("[0-9]*"))
    values = np.concatenate([np.asarray(Image.open(f)).ravel() for f in files])
    window = module.intensity.window
    assert window == pytest.approx(np.percentile(values, (1, 99)), abs=10)
    images = [module.sets["training"].read(i) for i in range(12)]
    low, high = window
    for file, image in zip(files, images, strict=True):
        wanted = ((np.asarray(Image.open(file)) - low) / (high - low)).clip(0, 1)
        np.testing.assert_allclose(image[0], wanted, atol=1e-6)
    assert images[0].max() < 0.3 < 0.9 < images[3].max()  # the dim ones stay dim
    assert module.mean is not None
    assert fitted(root, **options).sets["training"].read(0).max() == 1  # of each image: not

    again = fitted(root, percentiles_of="dataset", num_workers=2, **options)  # out of the cache
    assert again.intensity.window == window
    for file in cache.rglob("*.json"):
        file.unlink()
    anew = fitted(root, percentiles_of="dataset", num_workers=2, **options)
    assert anew.intensity.window == window


def test_the_window_is_in_the_checkpoint(tmp_path: Path, cache: Path) -> None:
    options = {"in_chans": 1, "val_fraction": 0.0, "percentiles_of": "dataset"}
    saved = fitted(scans(tmp_path / "scans"), **options).state_dict()
    other = ImageFolderData(str(scans(tmp_path / "others")), img_size=8, **options)
    other.setup("predict")
    other.load_state_dict(saved)
    assert other.sets["predict"].intensity.window == saved["window"] == other.intensity.window
    given = ImageFolderData(str(tmp_path / "others"), img_size=8, in_chans=1)
    given.load_state_dict(saved)
    assert given.intensity.window is None  # each image for itself, as it was asked for


def test_percentiles_of_large_and_empty_scans(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    large = np.arange(4100 * 4100, dtype=np.float32).reshape(4100, 4100)  # beyond 2**24
    for name, values in {
        "large": large / large.max(),
        "nothing": np.full((16, 16), np.nan, np.float32),
        "infinite": np.full((16, 16), np.inf, np.float32),
        "pixel": np.full((1, 1), 0.5, np.float32),
    }.items():
        np.save(folder / f"{name}.npy", values)
    options = {"in_chans": 1, "val_fraction": 0.0, "percentiles_of": "dataset"}
    module = fitted(tmp_path, percentiles=(10, 90), statistics="measured", **options)
    wanted = np.percentile([*np.linspace(0, 1, 4096), *[0.5] * 4096], (10, 90))
    assert module.intensity.window == pytest.approx(wanted, abs=1e-3)
    assert np.isfinite([*module.mean, *module.std]).all()


@pytest.mark.parametrize(("value", "window"), [(np.nan, None), (7, (7, 7))])
def test_scans_without_contrast(tmp_path: Path, value: float, window: tuple[int, int]) -> None:
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", np.full((16, 16), value, np.float32))
    options = {"in_chans": 1, "val_fraction": 0.0, "statistics": "measured"}
    module = fitted(tmp_path, percentiles_of="dataset", **options)
    assert module.intensity.window == window
    assert (module.mean, module.std) == ((0,), (pytest.approx(1 / 255),))


def test_photographs_have_no_window(root: Path) -> None:
    assert fitted(root, percentiles_of="dataset").intensity.window is None
