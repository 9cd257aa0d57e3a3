"""Masks and annotations beside the images: whether `simmim segment` and `detect` find them."""

from collections.abc import Mapping

from simmim.data import ImageFolderData
from simmim.data.annotated import read_annotated_parts
from simmim.data.pairs import read_pairs
from simmim.doctor.findings import Finding


def target_findings(
    data: ImageFolderData, folders: list[str], left_out: Mapping[str, int]
) -> list[Finding]:
    """Find masks or annotations where the folder is laid out for them, and count them.

    Args:
        data: The images.
        folders: The folders of each part that would be classes: images, masks.
        left_out: Files that are no images, counted by kind.
    """
    split = data.val_fraction, data.split_seed, data.group_pattern
    if {"images", "masks"} <= set(folders):
        try:
            pairs = read_pairs(data.root, *split)
        except ValueError as error:
            return [Finding("masks", "bad", f"for simmim segment: {error}")]
        each = {n: len(p.images if p.places is None else p.places) for n, p in pairs.items()}
        return [Finding("masks", "note", f"images with a mask, for simmim segment: {_list(each)}")]
    loose = not folders or folders == ["images"]
    if not loose or not {"*.json", "*.xml"} & left_out.keys():
        return []
    try:
        parts, classes = read_annotated_parts(data.root, None, *split)
    except ValueError as error:
        return [Finding("annotations", "look", f"for simmim detect: {error}")]
    each = {name: len(part.places) for name, part in parts.items()}
    text = f"images with annotations, for simmim detect: {_list(each)}; {', '.join(classes.names)}"
    return [Finding("annotations", "note", text)]


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {part}" for part, n in counts.items())
