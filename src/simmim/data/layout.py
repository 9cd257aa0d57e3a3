"""The parts of a folder: what is trained on, what validates, what tests, and the classes of all."""

import os
import re
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from simmim.data.index import SPLIT_OF, SPLIT_WORDS, FileIndex, check_folder, find_parts, split_of
from simmim.data.index_cache import keep_split, read_index
from simmim.data.scans import check_pydicom
from simmim.data.shards import is_packed, join_packed, read_packed
from simmim.data.split import validation_mask

IMAGES, MASKS = "images", "masks"  # folders beside each other, for segmentation


@dataclass(frozen=True)
class Part:
    """Some images of an index.

    Attributes:
        files: The index.
        places: Which of its files; None: all.
    """

    files: FileIndex
    places: npt.NDArray[np.int64] | None = None


def read_folder(folder: str) -> FileIndex:
    """Index a folder that is to be read: of images, or a packed one.

    Raises:
        ValueError: If it is no folder, holds no image, or DICOM files that nothing can read.
    """
    check_folder(folder)
    return _readable(
        join_packed(folder, read_packed(folder)) if is_packed(folder) else read_index(folder)
    )


def read_split(root: str, masks_apart: bool = True) -> dict[str, FileIndex]:
    """Index the folders train/, val/ and test/, where there is a train/; none otherwise.

    Args:
        root: The folder; they may lie below its images/, where masks/ lies beside that.
        masks_apart: Whether masks/ beside images/ is left out, as it is for all but segmentation.
    """
    check_folder(root)
    if is_packed(root):
        parts = read_packed(root)
        return {part: _readable(files) for part, files in parts.items() if files.root != root}
    if not masks_apart:
        return {part: read_folder(folder) for part, folder in find_parts(root).items()}
    folders = find_parts(image_folder(root))
    if folders and image_folder(root) != root:
        _tell_of_masks(root)
    return {part: _read_images(folder) for part, folder in folders.items()}


def image_folder(folder: str) -> str:
    """The images/ of a folder that has masks/ beside it, as segmentation reads it; else itself."""
    images = os.path.join(folder, IMAGES)
    both = os.path.isdir(images) and os.path.isdir(os.path.join(folder, MASKS))
    return images if both else folder


def _read_images(folder: str) -> FileIndex:
    images = image_folder(folder)
    if images != folder:
        _tell_of_masks(folder)
    return read_folder(images)


def _tell_of_masks(folder: str) -> None:
    rank_zero_info(f"{os.path.join(folder, MASKS)} is left out: it holds masks of {IMAGES}/")


def read_parts(
    root: str,
    val_fraction: float,
    split_seed: int = 0,
    group_pattern: str | None = None,
    masks_apart: bool = True,
) -> dict[str, Part]:
    """Find the parts of a folder, the same for every task.

    There are labels where all images of train/ and val/ lie in class folders; the classes are
    those of both. Images of test/ have labels if theirs are among them.

    Args:
        root: A folder with train/ (and val/, and test/), or of images; packed or not.
        val_fraction: Share of the training images that validates where there is no val/; see
            `validation_mask` for this and the rest.
        split_seed: Which share.
        group_pattern: What belongs together.
        masks_apart: As in `read_split`.

    Returns:
        "train", and "val" and "test" where there are images for them.

    Raises:
        ValueError: If a part is empty, or the pattern does not match.
    """
    files = read_split(root, masks_apart) or {"train": read_unsplit(root, masks_apart)}
    split = [index for part, index in files.items() if part != "test"]
    classes: list[str] = []
    if all(index.classes for index in split):
        classes = sorted({name for index in split for name in index.classes})
    parts = {part: Part(_relabel(index, classes)) for part, index in files.items()}
    if "val" not in parts and val_fraction:
        whole = parts["train"].files
        trains, validates = split_off(whole, val_fraction, split_seed, group_pattern)
        parts["train"] = Part(whole, trains)
        if len(validates):
            parts["val"] = Part(whole, validates)
    return {split: parts[split] for split in SPLIT_WORDS if split in parts}


def read_unsplit(root: str, masks_apart: bool = True) -> FileIndex:
    """Index a folder without a train/, all of which trains or is to be split; see `read_split`.

    Raises:
        ValueError: If it has a val/ and nothing else.
    """
    files = _read_images(root) if masks_apart else read_folder(root)
    _check_names(root, files.classes)
    return files


def _check_names(root: str, classes: list[str]) -> None:
    """Say that val/ is no part without a train/ beside it, but a class like any other folder.

    Raises:
        ValueError: If there is nothing else.
    """
    parts = [name for name in classes if split_of(name)]
    here = " and ".join(f"{name}/" for name in parts)
    if parts and len(parts) == len(classes):
        raise ValueError(
            f"{root!r} has {here}, but no train/ beside it: put the training images into train/, "
            f"or give {os.path.join(root, parts[0])} itself"
        )
    named = [
        {SPLIT_OF[word] for word in re.split(r"[\W\d_]+", name.lower()) if word in SPLIT_OF}
        for name in classes
    ]
    if all(named) and {"train"} < set().union(*named):
        raise ValueError(
            f"the folders {', '.join(f'{name}/' for name in classes[:3])} in {root!r} are no "
            "classes by their names: call them train/, val/ and test/"
        )
    if parts:
        rank_zero_warn(f"{here} in {root} is taken for a class: there is no train/ beside it")


def split_off(
    files: FileIndex, val_fraction: float, split_seed: int, group_pattern: str | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split an index; arguments as in `validation_mask`.

    Returns:
        Places of the images that train, and of those that validate.
    """

    def split() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        labels = np.zeros(len(files), np.int64) if files.labels is None else files.labels.numpy()
        mask = validation_mask(files.all_names(), labels, val_fraction, split_seed, group_pattern)
        return np.flatnonzero(~mask), np.flatnonzero(mask)

    return keep_split(files, (val_fraction, split_seed, group_pattern), split)


def _readable(files: FileIndex) -> FileIndex:
    if ".dcm" in files.suffixes:
        check_pydicom()
    return files


def _relabel(files: FileIndex, classes: list[str]) -> FileIndex:
    """Number the labels of a part by the classes of the whole; where they do not fit, drop them."""
    if files.labels is None or not set(files.classes) <= set(classes):
        return replace(files, labels=None, classes=classes)
    if files.classes == classes:
        return files
    place = {name: label for label, name in enumerate(classes)}
    number = torch.tensor([place[name] for name in files.classes])
    return replace(files, labels=number[files.labels], classes=classes)
