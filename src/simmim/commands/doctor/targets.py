"""Masks and annotations beside the images: what `simmim segment` and `detect` make of them."""

import warnings
from collections.abc import Mapping
from typing import Any

from simmim.commands.doctor.findings import Finding
from simmim.data import DetectionData, ImageFolderData, SegmentationData
from simmim.data.pairs import has_pairs


def target_findings(
    data: ImageFolderData, folders: list[str], left_out: Mapping[str, int]
) -> list[Finding]:
    """Find masks or annotations where the folder is laid out for them, and count them.

    Args:
        data: The images.
        folders: The folders of each part that would be classes, such as images.
        left_out: Files that are no images, counted by kind.
    """
    if has_pairs(data.root):
        return _say_of(SegmentationData, "masks", "simmim segment", data)
    loose = not folders or folders == ["images"]
    if loose and {"*.json", "*.xml"} & left_out.keys():
        return _say_of(DetectionData, "annotations", "simmim detect", data)
    return []


def _say_of(
    kind: type[SegmentationData | DetectionData], found: str, command: str, data: ImageFolderData
) -> list[Finding]:
    """Say what a task says when it starts: what it refuses, or what it counts and warns of."""
    split: dict[str, Any] = {
        name: getattr(data, name) for name in ("val_fraction", "split_seed", "group_pattern")
    }
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            made = kind(data.root, img_size=list(data.img_size), **split)
            made.setup("fit")
    except ValueError as error:
        return [Finding(found, "bad", f"for {command}: {error}")]
    table = "\n".join(made.summary().table().splitlines()[1:])  # below the name of the folder
    return [
        *(Finding(found, "look", f"for {command}: {one.message}") for one in told),
        Finding(found, "note", f"for {command}:\n{table}"),
    ]
