"""Images and their masks, which share the stem of their names."""

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simmim.data.index import FileIndex, check_folder, find_parts
from simmim.data.layout import read_folder, split_off

IMAGES, MASKS = "images", "masks"


@dataclass(frozen=True)
class Pairs:
    """Some images of an index, and the masks of all.

    Attributes:
        images: The index of images.
        masks: That of masks.
        partners: Place of the mask of each image of the index, (n,).
        places: Which of the images; None: all.
    """

    images: FileIndex
    masks: FileIndex
    partners: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64] | None = None

    def mask_paths(self) -> list[str]:
        """Paths of the masks of the chosen images."""
        partners = self.partners if self.places is None else self.partners[self.places]
        return [self.masks.path(int(place)) for place in partners]


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


def without_masks(files: FileIndex) -> npt.NDArray[np.int64] | None:
    """Places of the files that are no masks beside images/; None: all."""
    names = [f"/{name}" for name in files.all_names()]
    if not any(f"/{IMAGES}/" in name for name in names):
        return None
    return np.array([i for i, name in enumerate(names) if f"/{MASKS}/" not in name], np.int64)


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
    if jpeg := labels.suffixes & {".jpg", ".jpeg"}:
        raise ValueError(
            f"{masks!r} holds {min(jpeg)} files, and JPEG changes the values of pixels: "
            "masks are PNG"
        )
    own, place = _stems(pictures), _stems(labels)
    if alone := own.keys() - place.keys():
        wanted = os.path.join(masks, f"{min(alone)}.png")
        raise ValueError(
            f"{len(alone)} of {len(own)} images have no mask, such as "
            f"{pictures.path(own[min(alone)])!r}: add {wanted!r}, or take the image out"
        )
    if alone := place.keys() - own.keys():
        raise ValueError(
            f"{len(alone)} of {len(place)} masks have no image, such as "
            f"{labels.path(place[min(alone)])!r}: add it, or take the mask out"
        )
    return Pairs(pictures, labels, np.array([place[stem] for stem in own], np.int64))


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
