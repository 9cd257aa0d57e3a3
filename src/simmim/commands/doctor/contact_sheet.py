"""Which images are shown on the contact sheet, and what stands below them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from simmim.commands.doctor.diagnosis import Diagnosis
from simmim.commands.doctor.file_stats import File, Inspector
from simmim.commands.doctor.findings import Read
from simmim.commands.doctor.pictures import COLUMNS, SIDE, Row, Tile
from simmim.commands.doctor.workers import run_all
from simmim.data.bad_files import escape
from simmim.data.sampler import choose

SHOWN = 12  # classes


def contact_rows(
    diagnosis: Diagnosis,
    read: Read,
    classes: Sequence[str],
    inspector: Inspector,
    workers: int,
) -> list[Row]:
    """Choose the pictures of the contact sheet, and read them again, small."""
    chosen = _samples(read, classes)
    by_name = {file.name: file for file, _ in read}
    for finding in diagnosis.findings:
        some = list(finding.files.items())[:COLUMNS]
        if some:
            listed = [(by_name[name], f"{file_name(name)}\n{why}") for name, why in some]
            if finding.beside:  # copies, with what each is like to its right
                pairs = [((f, c), by_name[finding.beside[f.name]]) for f, c in listed]
                listed = [
                    tile for one, other in pairs for tile in (one, (other, file_name(other.name)))
                ]
                listed = listed[:COLUMNS]
            chosen.append((f"{finding.text}", listed))
    bad = {file.name for file, record in read if record.error}
    wanted = list({f.name: f for _, row in chosen for f, _ in row if f.name not in bad}.values())
    tiles: dict[str, Any] = {}
    for place, pixels in run_all(_Reducer(inspector), wanted, workers, lambda file, why: None):
        tiles[wanted[place].name] = pixels
    return [
        Row(heading, [Tile(tiles.get(file.name), caption) for file, caption in row])
        for heading, row in chosen
    ]


class _Reducer:
    """Makes pictures of files; picklable, as it is sent to the workers."""

    def __init__(self, inspector: Inspector) -> None:
        self.inspector = inspector

    def __call__(self, file: File) -> Any:
        return self.inspector.tile(file, SIDE)


def _samples(read: Read, classes: Sequence[str]) -> list[tuple[str, list[tuple[File, str]]]]:
    """Some images of each part, or of each class of training, evenly spread."""
    rows: dict[str, list[tuple[File, str]]] = {}
    for file, record in read:
        if record.content is None:
            continue
        key = f"{file.part}: {classes[file.label]}" if file.label >= 0 else file.part
        size = f"{record.content.width} x {record.content.height}"
        rows.setdefault(key, []).append((file, f"{file_name(file.name)}\n{size}"))
    if len(rows) > SHOWN:
        rows = {k: v for k, v in rows.items() if k.startswith("train")}
    kept = [list(rows)[i] for i in np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).astype(int)]
    return [
        (f"{key} ({len(rows[key]):,})", [rows[key][i] for i in choose(len(rows[key]), COLUMNS)])
        for key in kept
    ]


def file_name(name: str) -> str:
    """The last part of a path, on one line."""
    return escape(name.rsplit("/", 1)[-1])
