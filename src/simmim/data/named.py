"""Data sets by name: made or downloaded once, into an image folder like any other."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simmim.base.progress import Bar

Item = tuple[Image.Image | Path, int]  # a picture, or a file to be copied as it is; and its label


@dataclass(frozen=True)
class Download:
    """A data set of torchvision: its class, and the options that give each of our parts."""

    name: str
    parts: dict[str, dict[str, Any]]


def _split(**parts: str) -> dict[str, dict[str, Any]]:
    return {part: {"split": split} for part, split in parts.items()}


_TRAIN_OR_NOT: dict[str, dict[str, Any]] = {"train": {"train": True}, "val": {"train": False}}
_THREE = _split(train="train", val="val", test="test")
DOWNLOADS = {
    "cifar10": Download("CIFAR10", _TRAIN_OR_NOT),
    "cifar100": Download("CIFAR100", _TRAIN_OR_NOT),
    "mnist": Download("MNIST", _TRAIN_OR_NOT),
    "fashion_mnist": Download("FashionMNIST", _TRAIN_OR_NOT),
    "dtd": Download("DTD", _THREE),
    "eurosat": Download("EuroSAT", {"train": {}}),  # published without a split: ours applies
    "flowers102": Download("Flowers102", _THREE),
    "food101": Download("Food101", _split(train="train", val="test")),
    "imagenette": Download("Imagenette", _split(train="train", val="val")),
    "oxford_pets": Download("OxfordIIITPet", _split(train="trainval", val="test")),
}
NAMES = ("digits", *DOWNLOADS)


def prepare(name: str, data_dir: str) -> None:
    """Make `data_dir/name`, unless it is there.

    The folder appears under its name when it is complete: neither a second process that starts at
    the same time nor an interrupted one leaves half of it.

    Raises:
        ValueError: If the download fails.
    """
    target = Path(data_dir, name)
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=data_dir) as beside:
        folder = Path(beside, name)
        if name == "digits":
            _write_digits(folder)
        else:
            _download(name, folder, Path(beside, "downloads"))
        try:
            os.rename(folder, target)
        except OSError:
            if not target.exists():  # else another process was quicker
                raise


def _write_digits(folder: Path) -> None:
    """Write scikit-learn's 1,797 handwritten digits as 8-bit PNGs: 1,437 train and 360 validate.

    The scans are 8 x 8 pixels with values of 0 to 16 (doi:10.24432/C50P49); here they have 32 x 32.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    pixels = (scans.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    places = np.arange(len(labels))
    train, val = train_test_split(places, test_size=360, stratify=labels, random_state=0)
    part_of = {**dict.fromkeys(train.tolist(), "train"), **dict.fromkeys(val.tolist(), "val")}
    for i in Bar(range(len(labels)), desc="Writing the digits", unit=" images", leave=False):
        file = folder / part_of[i] / str(labels[i]) / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).resize((32, 32), Image.Resampling.BICUBIC).save(file)


def _download(name: str, folder: Path, downloads: Path) -> None:
    from torchvision import datasets

    make: Callable[..., Any] = getattr(datasets, DOWNLOADS[name].name)
    for part, options in DOWNLOADS[name].parts.items():
        try:
            data = make(root=str(downloads), download=True, **options)
        except (OSError, RuntimeError, EOFError, shutil.Error) as error:
            raise ValueError(
                f"data.dataset {name!r} could not be downloaded ({error}): check the network, or "
                "give data.root, a folder of images"
            ) from error
        _write(data, folder / part)


def _write(data: Any, folder: Path) -> None:
    """Write a data set of torchvision as class folders: its files as they are, or PNGs."""
    names = [_folder_name(name) for name in data.classes]
    for i, (image, label) in enumerate(Bar(_items(data), total=len(data), desc=str(folder.name))):
        place = folder / names[label]
        place.mkdir(parents=True, exist_ok=True)
        if isinstance(image, Image.Image):
            image.save(place / f"{i:05d}.png")
        else:
            shutil.copyfile(image, place / image.name)


def _items(data: Any) -> Iterator[Item]:
    """Go through a data set of torchvision, by its files where it has some."""
    pairs = getattr(data, "samples", None) or getattr(data, "_samples", None)
    files = getattr(data, "_image_files", None) or getattr(data, "_images", None)
    if files:
        pairs = zip(files, data._labels, strict=True)
    if pairs:
        yield from ((Path(file), int(label)) for file, label in pairs)
    else:
        yield from ((image, int(label)) for image, label in (data[i] for i in range(len(data))))


def _folder_name(name: str | tuple[str, ...]) -> str:
    """Turn a class's name (of synonyms the first) into one that every file system takes."""
    first = name if isinstance(name, str) else name[0]
    return "".join(c if c.isalnum() or c in " -_'" else "_" for c in first).strip()
