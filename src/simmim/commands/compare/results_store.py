"""What a comparison has written: its options, and a row for each run that is complete."""

import csv
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from simmim.base.files import read_config, write_whole
from simmim.command_line.configuration import differences
from simmim.commands.compare.significance import Result
from simmim.runs.folder import CONFIG, new_run

RESULTS, CORRECT = "results.csv", "correct"
COLUMNS = {field.name: field.type for field in fields(Result) if field.name != CORRECT}
NO_MATTER = ("num_workers", "accelerator", "weights")  # where the work is done, where files lie
Key = tuple[str, str, int, int]  # mode, arm, images, seed


def key_of(result: Result) -> Key:
    """What tells runs apart."""
    return result.mode, result.arm, result.images, result.seed


def open_folder(out: str | None, settings: Mapping[str, Any]) -> Path:
    """Make the folder of a comparison, or go on in the one that is there.

    Args:
        out: The folder; None: runs/compare/version_N with a new number.
        settings: By group, the options that runs of one comparison have in common.

    Raises:
        ValueError: If the folder holds something else, or a comparison with other options.
    """
    plain = yaml.safe_load(yaml.safe_dump(dict(settings)))
    folder = new_run(Path("runs"), "compare") if out is None else Path(out).expanduser()
    if folder.is_file():
        raise ValueError(f"out {out} is a file: give a folder")
    kept = read_config(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if folder.is_dir() and any(folder.iterdir()) and not kept:
        raise ValueError(f"out {out} holds something else than a comparison: give a new folder")
    for group in [group for group in plain if group in kept]:
        _check_same(folder, group, plain[group], kept[group])
    (folder / CORRECT).mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFIG, yaml.safe_dump({**kept, **plain}, sort_keys=False))
    return folder


def append_result(folder: Path, result: Result) -> None:
    """Keep a run: the images that it recognises first, so that a row is a run that is complete."""
    np.save(_correct_of(folder, result), result.correct)
    path = folder / RESULTS
    begins = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if begins:
            writer.writeheader()
        writer.writerow({name: getattr(result, name) for name in COLUMNS})


def read_results(folder: Path, images: int) -> dict[Key, Result]:
    """Read the runs that are done.

    Args:
        folder: Of the comparison.
        images: Validation images that there are now.

    Raises:
        ValueError: If there were others when it began.
    """
    path = folder / RESULTS
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if not lines[-1].endswith("\n"):  # a row that a crash cut off
        write_whole(path, "".join(lines[:-1]))
        lines.pop()
    found: dict[Key, Result] = {}
    for row in csv.DictReader(lines):
        values = {name: kind(row[name]) for name, kind in COLUMNS.items()}  # type: ignore[operator]
        result = Result(**values, correct=np.empty(0, dtype=bool))
        correct = np.load(_correct_of(folder, result), allow_pickle=False)
        if len(correct) != images:
            raise ValueError(
                f"{folder} was begun with {len(correct)} validation images, there are {images} "
                "now: give another --out"
            )
        found[key_of(result)] = Result(**values, correct=correct)
    return found


def _correct_of(folder: Path, result: Result) -> Path:
    return folder / CORRECT / f"{'-'.join(map(str, key_of(result)))}.npy"


def _check_same(folder: Path, group: str, asked: dict[str, Any], kept: dict[str, Any]) -> None:
    """Refuse to mix runs that cannot be compared; an arm may be added."""
    if group.endswith("arms"):
        asked, kept = {**kept, **asked}, {**asked, **kept}
    found = differences(group, asked, kept)
    found = {name: pair for name, pair in found.items() if not name.endswith(NO_MATTER)}
    if found:
        name, (now, before) = next(iter(found.items()))
        raise ValueError(
            f"{folder} holds a comparison with {name} {before}, not {now}: go on with the same "
            "options, or give another --out"
        )
