"""Images and their masks, which share the stem of their names."""

import os
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from simmim.data.index import FileIndex, check_folder, find_parts
from simmim.data.index_cache import Kept, digest_of, keep, lies_within
from simmim.data.layout import IMAGES, MASKS, read_folder, split_off


@dataclass(frozen=True)
class Pairs:
    """Some images of an index, and the masks of all.

    Attributes:
        images: The index of images.
        masks: That of masks.
        partners: Place of the mask of each image of the index, int64, (n,).
        places: Which of the images; None: all.
    """

    images: FileIndex
    masks: FileIndex
    partners: Tensor
    places: npt.NDArray[np.int64] | None = None

    def mask_places(self) -> Tensor:
        """Places of the masks of the chosen images."""
        return self.partners if self.places is None else self.partners[self.places]


def read_pairs(
    root: str, val_fraction: float, split_seed: int = 0, group_pattern: str | None = None
) -> dict[str, Pairs]:
    """Find the parts of a folder of images and masks.

    Args:
        root: A folder with train/ (and val/, and test/) that hold images/ and masks/ each, or with
            images/ and masks/, which may be parted themselves.
        val_fraction: Share of the training images that validates where there is no val/; see
            `validation_mask` for this and the rest. It is the split that pretraining makes of the
            folder of images.
        split_seed: Which share.
        group_pattern: What belongs together.

    Returns:
        "train", and "val" and "test" where there are images for them. A test/ without masks is
        left out.

    Raises:
        ValueError: If a folder is missing or empty, or an image has no mask or a mask no image.
    """
    check_folder(root)
    parts = {}
    for part, (images, masks) in _find_folders(root).items():
        if part != "test" or os.path.isdir(masks):
            parts[part] = _pair(images, masks)
    if "val" not in parts and val_fraction:
        whole = parts["train"]
        trains, validates = split_off(whole.images, val_fraction, split_seed, group_pattern)
        parts["train"] = Pairs(whole.images, whole.masks, whole.partners, trains)
        if len(validates):
            parts["val"] = Pairs(whole.images, whole.masks, whole.partners, validates)
    return parts


def has_pairs(root: str) -> bool:
    """Whether a folder has images/ and masks/, or its train/ has."""
    return all(map(os.path.isdir, _find_folders(root)["train"]))


def without_masks(files: FileIndex) -> npt.NDArray[np.int64] | None:
    """Places of the files that are no masks beside images/; None: all."""
    if not any(f"/{IMAGES}/" in f"/{name}" for name in files.all_names()):
        return None
    is_mask = (f"/{MASKS}/" in f"/{name}" for name in files.all_names())
    return np.flatnonzero(~np.fromiter(is_mask, bool, len(files)))


def _find_folders(root: str) -> dict[str, tuple[str, str]]:
    """The folders of images and of masks of each part."""
    if parts := find_parts(root):
        return {
            part: (os.path.join(folder, IMAGES), os.path.join(folder, MASKS))
            for part, folder in parts.items()
        }
    images, masks = os.path.join(root, IMAGES), os.path.join(root, MASKS)
    parts = find_parts(images) if os.path.isdir(images) else {}
    if parts:
        return {
            part: (folder, os.path.join(masks, os.path.basename(folder)))
            for part, folder in parts.items()
        }
    return {"train": (images, masks)}


def _pair(images: str, masks: str) -> Pairs:
    for folder in (images, masks):
        if not os.path.isdir(folder):
            raise ValueError(
                f"{folder!r} is missing: segmentation needs {IMAGES}/ and {MASKS}/ with files of "
                "the same names, below train/ and val/ or right below data.root"
            )
    pictures, labels = read_folder(images), read_folder(masks)
    if jpeg := labels.suffixes & {".jpg", ".jpeg", ".jfif", ".jpe"}:
        raise ValueError(
            f"{masks!r} holds {min(jpeg)} files, and JPEG changes the values of pixels: "
            "masks are PNG"
        )
    n = len(pictures)
    make = partial(_find_partners, pictures, labels)
    key = (digest_of(pictures), digest_of(labels))
    tensors, _ = keep("pairs", n, key, make, lambda kept, _: _are_partners(kept["partners"], n))
    return Pairs(pictures, labels, tensors["partners"])


def _are_partners(partners: Tensor, n: int) -> bool:
    return len(partners) == n and lies_within(partners, n)


def _find_partners(pictures: FileIndex, labels: FileIndex) -> Kept:
    """Find the mask of each image by its stem."""
    own, place = _stems(pictures), _stems(labels)
    if alone := own.keys() - place.keys():
        wanted = os.path.join(labels.root, f"{min(alone)}.png")
        raise ValueError(
            f"{len(alone)} of {len(own)} images have no mask, such as "
            f"{pictures.path(own[min(alone)])!r}: add {wanted!r}, or take the image out"
        )
    if alone := place.keys() - own.keys():
        raise ValueError(
            f"{len(alone)} of {len(place)} masks have no image, such as "
            f"{labels.path(place[min(alone)])!r}: add it, or take the mask out"
        )
    return {"partners": torch.tensor([place[stem] for stem in own])}, {}


def _stems(files: FileIndex) -> dict[str, int]:
    """Place of each file by its path without the ending, in order."""
    found: dict[str, int] = {}
    for place, name in enumerate(files.all_names()):
        stem = os.path.splitext(name)[0]
        if stem in found:
            raise ValueError(
                f"{files.path(found[stem])!r} and {files.path(place)!r} share the stem that pairs "
                "an image with its mask: rename one"
            )
        found[stem] = place
    return found
