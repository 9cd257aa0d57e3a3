"""Pixel statistics: ImageNet's, one's own, or measured and remembered."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simmim.data import ImageFolderData, pack, statistics
from support.folders import make_images, save


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIMMIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_images(tmp_path / "root", 12, size=16)


def fitted(root: Path, **kwargs: Any) -> ImageFolderData:
    module = ImageFolderData(root=str(root), **{"img_size": 16, **kwargs})
    module.setup("fit")
    return module


def test_imagenets_or_ones_own(root: Path) -> None:
    module = fitted(root, percentiles_of="dataset")
    assert (module.mean, module.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert module.intensity.window is None  # photographs have none
    gray = fitted(root, in_chans=1)
    assert (gray.mean, gray.std) == (pytest.approx([0.449]), pytest.approx([0.226]))
    own = fitted(root, in_chans=1, statistics=[[0.2], [0.1]])
    assert (own.mean, own.std) == ((0.2,), (0.1,))


def test_measured_over_the_training_images_alone(root: Path) -> None:
    module = fitted(root, statistics="measured", val_fraction=0.25)
    images = module.sets["training"]
    assert len(images) == 9
    pixels = np.stack([np.asarray(Image.open(images.path(i))) for i in range(9)]) / 255
    assert module.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-9)
    assert module.std == pytest.approx(pixels.std((0, 1, 2)), abs=1e-9)
    module = ImageFolderData(root=str(root), statistics="measured")
    module.setup("validate")
    assert module.mean is None  # only training needs them


def test_measured_once(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fitted(root, statistics="measured")
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setenv("SIMMIM_CACHE", str(root / "000.png"))  # a home that cannot be written
    assert fitted(root, statistics="measured").mean == first.mean
    monkeypatch.setenv("SIMMIM_CACHE", str(cache))
    monkeypatch.setattr(statistics, "_measure", None)
    again = fitted(root, statistics="measured")
    assert (again.mean, again.std) == (first.mean, first.std)
    with pytest.raises(TypeError):  # images that are read otherwise are measured anew
        fitted(root, statistics="measured", img_size=8)
    Image.new("RGB", (16, 16)).save(root / "000.png")
    with pytest.raises(TypeError):
        fitted(root, statistics="measured")


def scans(root: Path, bands: int) -> list[Path]:
    """Dim and bright scans, small and large, of bands of unlike ranges; and a photograph."""
    root.mkdir(parents=True)
    files, random = [root / f"{i:02d}.npy" for i in range(12)], np.random.default_rng(0)
    for i, file in enumerate(files):
        size = 24 + 60 * (i % 3)  # 24 x 24 are fewer values than are taken of a scan, others more
        values = random.random((size, size, bands)) ** 2 * (500 + 500 * (i % 4))
        values[..., -1] *= 3
        np.save(file, values.astype(np.uint16))
    save(root / "photo.png", np.full((24, 24, 3), 200))
    (root / "bad.png").write_bytes(b"")
    return files


@pytest.mark.slow
@pytest.mark.parametrize("bands", [1, 3])
def test_percentiles_of_the_data_set(tmp_path: Path, cache: Path, bands: int) -> None:
    root, packed = tmp_path / "scans", tmp_path / "packed"
    files = scans(root, bands)
    options = {"in_chans": bands, "percentiles": (1, 99), "val_fraction": 0.0}
    options |= {"statistics": "measured"}
    module = fitted(root, percentiles_of="dataset", **options)
    window, images = module.intensity.window, module.sets["training"]
    assert window is not None
    low, high = window
    levels = np.linspace(0, 100, 10_001)  # each image counts the same, however large it is
    values = [np.percentile(np.load(file), levels) for file in files]
    assert window == pytest.approx(np.percentile(values, (1, 99)), rel=0.02, abs=1)
    for i, file in enumerate(files):
        wanted = ((np.load(file) - low) / (high - low)).clip(0, 1)
        np.testing.assert_allclose(images.read(i), np.moveaxis(wanted, 2, 0), atol=1e-6)
    assert images.read(0).max() < 0.4 < 0.9 < images.read(3).max()  # the dim ones stay dim
    assert fitted(root, **options).sets["training"].read(0).max() == 1  # of each image: not
    # Out of the cache, measured by workers, and of the same files packed.
    assert fitted(root, percentiles_of="dataset", **options).intensity.window == window
    for file in cache.rglob("*.json"):
        file.unlink()
    again = fitted(root, percentiles_of="dataset", num_workers=2, **options)
    assert (again.intensity.window, again.mean, again.std) == (window, module.mean, module.std)
    (root / "bad.png").unlink()  # in whose place another image counts twice
    pack.pack(str(root), str(packed), workers=0)
    two = [fitted(folder, percentiles_of="dataset", **options) for folder in (root, packed)]
    assert two[0].intensity.window == two[1].intensity.window == window
    assert two[0].mean == pytest.approx(two[1].mean, abs=1e-3)


def test_the_window_is_in_the_checkpoint(tmp_path: Path) -> None:
    scans(tmp_path / "scans", 1)
    scans(tmp_path / "others", 1)
    options = {"in_chans": 1, "val_fraction": 0.0, "percentiles_of": "dataset"}
    saved = fitted(tmp_path / "scans", **options).state_dict()
    other = ImageFolderData(str(tmp_path / "others"), img_size=8, **options)
    other.setup("predict")
    other.load_state_dict(saved)
    assert other.sets["predict"].intensity.window == saved["window"] == other.intensity.window
    given = ImageFolderData(str(tmp_path / "others"), img_size=8, in_chans=1)
    given.load_state_dict(saved)
    assert given.intensity.window is None  # each image for itself, as it was asked for


@pytest.mark.slow
def test_percentiles_of_large_and_empty_scans(tmp_path: Path) -> None:
    large = np.arange(4100 * 4100, dtype=np.float32).reshape(4100, 4100)  # beyond 2**24
    for name, values in {
        "large": large / large.max(),
        "nothing": np.full((16, 16), np.nan, np.float32),
        "infinite": np.full((16, 16), np.inf, np.float32),
        "pixel": np.full((1, 1), 0.5, np.float32),
    }.items():
        np.save(tmp_path / f"{name}.npy", values)
    options = {"in_chans": 1, "val_fraction": 0.0, "percentiles_of": "dataset"}
    module = fitted(tmp_path, percentiles=(10, 90), statistics="measured", **options)
    wanted = np.percentile([*np.linspace(0, 1, 4096), *[0.5] * 4096], (10, 90))
    assert module.intensity.window == pytest.approx(wanted, abs=1e-3)
    assert module.mean is not None
    assert module.std is not None
    assert np.isfinite([*module.mean, *module.std]).all()


@pytest.mark.parametrize(
    ("value", "window", "mean"), [(np.nan, None, 0), (np.float32(7), (7, 7), 0), (51, None, 0.2)]
)
def test_images_without_contrast_do_not_divide_by_zero(
    tmp_path: Path, value: Any, window: tuple[int, int], mean: float
) -> None:
    kind = np.uint8 if value == 51 else np.float32
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", np.full((16, 16), value, kind))
    options = {"in_chans": 1, "val_fraction": 0.0, "statistics": "measured"}
    module = fitted(tmp_path, percentiles_of="dataset", **options)
    assert module.intensity.window == window
    assert (module.mean, module.std) == ((pytest.approx(mean),), (pytest.approx(1 / 255),))
