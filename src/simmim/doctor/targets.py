"""Masks and annotations beside the images: whether `simmim segment` and `detect` find them."""

from collections.abc import Mapping
from typing import Any

from simmim.data import DetectionData, ImageFolderData
from simmim.data.pairs import read_pairs
from simmim.doctor.findings import Finding, Level


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
    return _annotations(data)


def _annotations(data: ImageFolderData) -> list[Finding]:
    """Say of annotations what `simmim detect` says when it starts."""
    split: dict[str, Any] = {
        name: getattr(data, name) for name in ("val_fraction", "split_seed", "group_pattern")
    }
    try:
        summary = DetectionData(data.root, img_size=list(data.img_size), **split).summary()
    except ValueError as error:
        return [Finding("annotations", "look", f"for simmim detect: {error}")]
    refusal = summary.refusal()
    told = [(f"for simmim detect: {s}") for s in ([refusal] if refusal else summary.warnings())]
    level: Level = "bad" if refusal else "look"
    table = "\n".join(summary.table().splitlines()[1:])  # below the name of the folder
    findings = [Finding("annotations", level, sentence) for sentence in told]
    return [*findings, Finding("annotations", "note", f"for simmim detect:\n{table}")]


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {part}" for part, n in counts.items())
