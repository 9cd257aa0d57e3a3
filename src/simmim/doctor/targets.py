"""Masks and annotations beside the images: whether `simmim segment` and `detect` find them."""

import warnings
from collections.abc import Mapping

from simmim.data import ImageFolderData
from simmim.data.annotated import read_annotated_parts
from simmim.data.pairs import has_pairs
from simmim.data.segmentation import SegmentationData
from simmim.doctor.findings import Finding


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
        return mask_findings(data)
    loose = not folders or folders == ["images"]
    if not loose or not {"*.json", "*.xml"} & left_out.keys():
        return []
    split = data.val_fraction, data.split_seed, data.group_pattern
    try:
        parts, classes = read_annotated_parts(data.root, None, *split)
    except ValueError as error:
        return [Finding("annotations", "look", f"for simmim detect: {error}")]
    each = {name: len(part.places) for name, part in parts.items()}
    text = f"images with annotations, for simmim detect: {_list(each)}; {', '.join(classes.names)}"
    return [Finding("annotations", "note", text)]


def mask_findings(data: ImageFolderData) -> list[Finding]:
    """Say what `simmim segment` would train and score on, and warn of."""
    split = {name: getattr(data, name) for name in ("val_fraction", "split_seed", "group_pattern")}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            masks = SegmentationData(data.root, **split)
            masks.setup("fit")
        except ValueError as error:
            return [Finding("masks", "bad", f"for simmim segment: {error}")]
    each = {name: one.images for name, one in masks.summary().splits.items()}
    text = f"images with a mask, for simmim segment: {_list(each)}; {', '.join(masks.classes)}"
    looks = [Finding("mask classes", "look", f"for simmim segment: {w.message}") for w in told]
    return [Finding("masks", "note", text), *looks]


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {part}" for part, n in counts.items())
