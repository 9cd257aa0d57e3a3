"""`simmim doctor`: what is looked at, in which order, and where it is written."""

import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from simmim.base.files import read_config
from simmim.base.progress import Bar, status
from simmim.command_line.configuration import find_config
from simmim.commands.doctor.contact_sheet import contact_rows
from simmim.commands.doctor.diagnosis import Diagnosis, count_splits, summarise
from simmim.commands.doctor.estimate import estimate as estimate_cost
from simmim.commands.doctor.file_stats import Counts, File, Inspector, Record, below
from simmim.commands.doctor.findings import Finding, Read, count_left_out, find_all, in_order
from simmim.commands.doctor.pictures import draw_sheet
from simmim.commands.doctor.report import page, render
from simmim.commands.doctor.targets import target_findings
from simmim.commands.doctor.workers import run_all
from simmim.commands.report import REPORT, write_page
from simmim.data import ImageFolderData
from simmim.data.bad_files import escape
from simmim.data.index import SUFFIXES, FileIndex
from simmim.data.labels import NamedTable, read_labels
from simmim.data.layout import Part, read_parts
from simmim.data.sampler import choose
from simmim.data.shards import is_packed
from simmim.data.transforms import RandomCrop
from simmim.data.workers import cpu_count
from simmim.runs.folder import leave_run, new_run

JSON, SHEET, QUARANTINE = "doctor.json", "contact_sheet.png", "quarantine.txt"


def doctor(
    root: str,
    config: str = "image_folder",
    out: str | None = None,
    workers: int | None = None,
    sample: int | None = None,
    img_size: int | list[int] | None = None,
    in_chans: int | None = None,
    val_fraction: float | None = None,
    split_seed: int | None = None,
    group_pattern: str | None = None,
    labels: str | None = None,
    percentiles: tuple[float, float] | None = None,
    window: tuple[float, float] | None = None,
    estimate: bool = True,
    estimate_seconds: float = 30.0,
) -> str:
    """Look a folder of images over, as training would read it, and say what to expect.

    Unreadable and suspicious files, copies, images of one patient on both sides of the split,
    classes, sizes, pixel statistics; which sizes the config's encoder takes; and from a few real
    steps what the run will cost here. Nothing in the folder is changed.

    Args:
        root: Folder of images, as --data.root takes it, packed ones too.
        config: Config of `simmim pretrain` that the folder is meant for, by name or file (-c); its
            options hold here where they are not given.
        out: New or empty folder for doctor.json, contact_sheet.png and quarantine.txt;
            runs/doctor/version_N by default.
        workers: Processes that read; by default one for each CPU core.
        sample: Look at so many images of each part, chosen at random; by default at all.
        img_size: Height and width in pixels, as --model.img_size; by default the config's.
        in_chans: Channels, as --model.in_chans; by default the config's.
        val_fraction: Share of the images that validates where there is no val/.
        split_seed: Which share.
        group_pattern: Regular expression, searched in each path; its first group names the patient
            or scene, whose images must be on one side of the split.
        labels: CSV file that gives the labels instead of folders, as data.labels of `classify`.
        percentiles: Deeper scans: the percentiles of each image that become 0 and 1.
        window: Deeper scans: the values that become 0 and 1, instead of percentiles.
        estimate: Whether sizes are tried, and time and memory estimated, with the config's model.
        estimate_seconds: For its steps; the first ones take as long as they take.

    Returns:
        What was found, as a table.

    Raises:
        ValueError: If the folder holds no image, or an option is wrong.
    """
    for name, number in (("workers", workers), ("sample", sample)):
        if number is not None and number < 1:
            raise ValueError(f"--{name} {number} is too small: use 1 or more")
    groups = read_groups(config)
    for name, value in (("img_size", img_size), ("in_chans", in_chans)):
        if value is not None:
            groups["model"][name] = value
    given = {
        "val_fraction": val_fraction,
        "split_seed": split_seed,
        "group_pattern": group_pattern,
        "percentiles": percentiles,
        "window": window,
    }
    data = open_data(root, groups, {k: v for k, v in given.items() if v is not None})
    table = None if labels is None else read_labels(labels, several=False)
    inspector, files, classes, counts = find_files(data, sample, table)
    folders = inspector.indices["train"].classes
    folder = make_folder(out)
    failed = True
    try:
        read = inspect(inspector, files, workers or cpu_count())
        packed = is_packed(data.root)
        left_out = {} if packed else count_left_out(data.root, SUFFIXES)
        with status("Comparing the images"):
            found = find_all(read, classes, counts, data.group_pattern, left_out)
        found += [] if packed else target_findings(data, folders, left_out)
        splits = count_splits(data.root, counts, classes, inspector.indices)
        if table is None:
            found += [Finding("data", "look", text) for text in splits.warnings()]
        summary = summarise(counts, read, classes)
        diagnosis = Diagnosis(
            root=data.root,
            config=config,
            options=_options(data),
            summary=summary,
            findings=in_order(found),
            epochs=float(groups["trainer"].get("max_epochs") or 0),
            table=splits.table(),
        )
        if estimate and summary.readable:
            diagnosis = with_estimate(diagnosis, read, groups, data.batch_size, estimate_seconds)
        write(diagnosis, folder)
        rows = contact_rows(diagnosis, read, classes, inspector, workers or cpu_count())
        draw_sheet(rows).save(folder / SHEET)
        write_page(
            page(diagnosis, folder / SHEET, _how_to_move(diagnosis, folder)), folder / REPORT
        )
        failed = False
    finally:
        if out is None:
            leave_run(folder, failed)
    return f"{diagnosis.table}\n\n{render(diagnosis)}\n\n{_where(diagnosis, folder)}"


# Before -------------------------------------------------------------------------------------------


def read_groups(config: str) -> dict[str, dict[str, Any]]:
    """Read the groups model, data and trainer of a pretraining config."""
    whole = read_config(find_config(config, "pretrain"))
    return {group: dict(whole.get(group) or {}) for group in ("model", "data", "trainer")}


def open_data(
    root: str, groups: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]
) -> ImageFolderData:
    """Make the data module that pretraining would make: its options are checked by itself."""
    options = {k: v for k, v in groups["data"].items() if k not in ("root", "dataset", "data_dir")}
    sizes = {k: groups["model"][k] for k in ("img_size", "in_chans") if k in groups["model"]}
    return ImageFolderData(root, **{**options, **sizes, **given})


def find_files(
    data: ImageFolderData, sample: int | None, table: NamedTable | None = None
) -> tuple[Inspector, list[File], list[str], Counts]:
    """List the images of each part.

    Returns:
        What looks at them, the files to look at, the names of the classes, and how many images
        there are.
    """
    parts = read_parts(data.root, data.val_fraction, data.split_seed, data.group_pattern)
    files: list[File] = []
    counts: dict[str, Counter[int]] = {}
    classes = parts["train"].files.classes if table is None else table.table.classes
    for name, part in parts.items():
        places = _places(part)
        labels = _labels(part.files, data.root, table)
        counts[name] = _count(len(places), None if labels is None else labels[places])
        for place in places[choose(len(places), sample)].tolist():
            label = -1 if labels is None else int(labels[place])
            files.append(File(name, place, below(data.root, part.files, place), label))
    if classes == ["images"]:  # of detection: it is no class
        counts = {name: Counter({-1: labelled.total()}) for name, labelled in counts.items()}
        files, classes = [replace(file, label=-1) for file in files], []
    crop = data.train_transform
    assert isinstance(crop, RandomCrop)
    indices = {name: part.files for name, part in parts.items()}
    return Inspector(indices, data.in_chans, data.intensity, crop), files, classes, counts


def _count(images: int, labels: Tensor | None) -> Counter[int]:
    """Count a part's images by label; -1 is none."""
    if labels is None:
        return Counter({-1: images})
    numbers, counts = labels.unique(return_counts=True)
    return Counter(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))


def _labels(files: FileIndex, root: str, table: NamedTable | None) -> Tensor | None:
    """The class of each file of an index; -1 where a table does not name it."""
    if table is None:
        return files.labels
    rows = table.find(files, root)
    return table.table.numbers[rows.clamp(min=0)].where(rows >= 0, -1)


def _places(part: Part) -> "np.ndarray[Any, np.dtype[np.int64]]":
    return np.arange(len(part.files)) if part.places is None else part.places


def make_folder(out: str | None) -> Path:
    """Make the folder that is written to.

    Raises:
        ValueError: If it holds something.
    """
    if out is None:
        return new_run(Path("runs"), "doctor")
    folder = Path(out).expanduser()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"--out {out} holds something: give a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# Looking ------------------------------------------------------------------------------------------


def inspect(inspector: Inspector, files: Sequence[File], workers: int) -> Read:
    """Look at files in other processes, and give their records in the order of the files."""
    records: list[Record] = [Record()] * len(files)

    def killed(file: File, reason: str) -> Record:
        return Record(inspector.indices[file.part].size(file.place), error=reason)

    with Bar(total=len(files), desc="Looking", unit=" images", leave=False) as bar:
        for place, record in run_all(inspector, files, workers, killed):
            records[place] = record
            bar.update()
    return list(zip(files, records, strict=True))


def with_estimate(
    diagnosis: Diagnosis,
    read: Read,
    groups: Mapping[str, Mapping[str, Any]],
    batch_size: int,
    seconds: float,
) -> Diagnosis:
    """Add sizes and costs, and what they mean for the images."""
    shorter = [min(r.content.height, r.content.width) for _, r in read if r.content]
    middle = float(np.median(shorter))
    cost, sizes = estimate_cost(groups["model"], batch_size, groups["trainer"], middle, seconds)
    side = min(sizes.img_size)
    findings = list(diagnosis.findings)
    if side > 1.5 * middle:
        text = f"img_size {side} enlarges the images, whose shorter side has {middle:g} px"
        remedy = f"--model.img_size {sizes.img_size_advice}, or -c small_images"
        findings = in_order([Finding("enlarged", "look", text, remedy), *findings])
    return replace(diagnosis, cost=cost, sizes=sizes, findings=findings)


# Afterwards ---------------------------------------------------------------------------------------


def write(diagnosis: Diagnosis, folder: Path) -> None:
    """Write all of it as JSON, and the list of files to take out."""
    text = json.dumps(diagnosis.as_dict(), indent=1, default=str)
    (folder / JSON).write_text(text.encode("utf-8", "backslashreplace").decode() + "\n", "utf-8")
    lines = [f"{escape(name)}\t{escape(why)}\n" for name, why in diagnosis.quarantine().items()]
    (folder / QUARANTINE).write_text("".join(lines), "utf-8")


def _options(data: ImageFolderData) -> dict[str, Any]:
    names = ("img_size", "in_chans", "val_fraction", "split_seed", "group_pattern")
    scans = {"percentiles": data.intensity.percentiles, "window": data.intensity.window}
    return {**{name: getattr(data, name) for name in names}, **scans}


def _where(diagnosis: Diagnosis, folder: Path) -> str:
    text = f"{folder}: {REPORT}, {JSON}, {SHEET}, {QUARANTINE}"
    return "\n".join(filter(None, [text, _how_to_move(diagnosis, folder)]))


def _how_to_move(diagnosis: Diagnosis, folder: Path) -> str:
    n = len(diagnosis.quarantine())
    if not n:
        return ""
    text = f"{QUARANTINE} lists {n:,} files that are better taken out; none was touched. "
    if is_packed(diagnosis.root):
        return f"{text}Take them out of what was packed, and pack it anew."
    list_, root = (
        shlex.quote(os.path.abspath(path)) for path in (folder / QUARANTINE, diagnosis.root)
    )
    move = 'mkdir -p "$AWAY/$(dirname -- "$f")" && mv -- "$f" "$AWAY/$f"'
    loop = f"cut -f1 {list_} | while IFS= read -r f; do {move}; done"
    return f"{text}To move them:\n  cd {root} && AWAY=../quarantine && {loop}"
