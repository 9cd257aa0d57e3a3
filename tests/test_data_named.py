"""Data sets by name: made once and whole, or refused in one sentence."""

import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from simmim.data import ImageFolderData, named


def test_digits_are_an_image_folder(tmp_path: Path) -> None:
    module = ImageFolderData(dataset="digits", data_dir=str(tmp_path), img_size=32, batch_size=64)
    module.setup("fit")
    assert module.root == str(tmp_path / "digits")
    assert (module.num_train, len(module.sets["validation"])) == (1437, 360)
    assert module.classes == list("0123456789")
    assert min(module.class_counts) > 135
    images = {p.stem: p for p in (tmp_path / "digits").rglob("*.png")}
    assert sorted(map(int, images)) == list(range(1797))
    digits = load_digits()
    for i in (0, 500, 1796):
        image = Image.open(images[f"{i:04d}"])
        assert (image.size, image.mode) == ((32, 32), "L")
        assert images[f"{i:04d}"].parent.name == str(digits.target[i])
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX)) / 255 * 16
        assert np.corrcoef(small.ravel(), digits.images[i].ravel())[0, 1] > 0.97
    marker = tmp_path / "digits" / "train" / "0" / "mine.png"
    marker.touch()
    named.prepare("digits", str(tmp_path))
    assert marker.exists()  # it is made once
    module = ImageFolderData(root=str(tmp_path), dataset="digits")  # one's own goes first
    assert (module.root, module.dataset) == (str(tmp_path), None)


def test_two_that_start_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path) -> None:
        for i in range(50):
            (folder / "train" / "0").mkdir(parents=True, exist_ok=True)
            (folder / "train" / "0" / f"{i}.png").write_bytes(b"x")

    monkeypatch.setattr(named, "_write_digits", write)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: named.prepare("digits", str(tmp_path)), range(8)))
    assert len(list((tmp_path / "digits").rglob("*.png"))) == 50
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]  # nothing is left lying about


def test_an_interrupted_one_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(named, "_write_digits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        named.prepare("digits", str(tmp_path))
    assert not list(tmp_path.iterdir())


class Arrays:
    """As CIFAR10 is: pictures in memory."""

    classes = ("air/plane", "frog")

    def __init__(self, root: str, train: bool, download: bool) -> None:
        self.n = 6 if train else 2

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (4, 4), (i, 0, 0)), i % 2


class Files:
    """As Flowers102 is: files, and labels beside them."""

    classes = (("tulip", "tulipa"), ("rose",))

    def __init__(self, root: str, split: str, download: bool) -> None:
        folder = Path(root, split)
        folder.mkdir(parents=True)
        self._image_files = [folder / f"{i}.jpg" for i in range(4)]
        self._labels = [0, 0, 1, 1]
        for file in self._image_files:
            file.write_bytes(b"the file as it is")

    def __len__(self) -> int:
        return 4


def test_downloads_become_image_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Arrays)
    monkeypatch.setattr(torchvision.datasets, "Flowers102", Files)
    named.prepare("cifar10", str(tmp_path))
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png"))
    assert found[0] == "cifar10/train/air_plane/00000.png"
    assert len(found) == 8
    named.prepare("flowers102", str(tmp_path))
    tulip = tmp_path / "flowers102" / "test" / "tulip" / "0.jpg"
    assert tulip.read_bytes() == b"the file as it is"
    assert len(list(tmp_path.rglob("*.jpg"))) == 12


@pytest.mark.parametrize("name", list(named.DOWNLOADS))
def test_torchvision_has_what_is_promised(name: str) -> None:
    download = named.DOWNLOADS[name]
    options = inspect.signature(getattr(torchvision.datasets, download.name)).parameters
    assert {"root", "download"} <= options.keys()
    for kwargs in download.parts.values():
        assert kwargs.keys() <= options.keys()
    assert name in (ImageFolderData.__doc__ or "")


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**kwargs: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", unreachable)
    sentence = r"'cifar100' could not be downloaded \(.*no route to host.*\): check the network"
    with pytest.raises(ValueError, match=sentence):
        named.prepare("cifar100", str(tmp_path))
    assert not list(tmp_path.iterdir())
