"""What the doctor says: as text for the terminal, and as a page."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from simmim.commands.doctor.diagnosis import Diagnosis, Spread, Summary
from simmim.commands.doctor.estimate import Cost, Sizes, hours
from simmim.commands.doctor.findings import Finding
from simmim.commands.report import Page, Picture, Table, Text
from simmim.data.bad_files import escape

HEADINGS = {"bad": "BAD", "look": "LOOK AT", "note": "NOTE"}
NOTHING = "nothing to complain of"
LISTED = 20  # files of a finding on the page
EXAMPLES = 3  # files of a finding that are named; doctor.json has all
CLASSES = 12  # that are listed

Row = tuple[str, str]  # what, and what is said of it


def render(diagnosis: Diagnosis) -> str:
    """Write a diagnosis as a table, findings first."""
    lines = ["", "Findings", *(f"  {line}" for line in _findings(diagnosis.findings))]
    for heading, rows in _sections(diagnosis).items():
        lines += ["", heading, *(f"  {name:<16}{text}" for name, text in rows)]
    return "\n".join(lines)


def page(diagnosis: Diagnosis, sheet: Path, move: str) -> Page:
    """Say the same as a page.

    Args:
        diagnosis: What was found.
        sheet: The contact sheet.
        move: How to move the files that are better taken out.
    """
    rows = [_finding_row(finding) for finding in diagnosis.findings]
    findings = Table(["", "what", "files", "what to do"], rows) if rows else Text(NOTHING)
    worst = sum(finding.level == "bad" for finding in diagnosis.findings)
    bad = {0: "nothing is bad", 1: "1 thing is bad"}.get(worst, f"{worst} things are bad")
    images = sum(diagnosis.summary.images.values())
    return Page(
        diagnosis.root,
        f"{images:,} images; {bad}, {len(rows) - worst} worth a look.",
        [
            ("Findings", [findings, *([Text(move, verbatim=True)] if move else [])]),
            ("Contact sheet", [Picture(sheet)]),
            *((name, [Table(["", ""], list(rows))]) for name, rows in _sections(diagnosis).items()),
        ],
    )


def _sections(diagnosis: Diagnosis) -> dict[str, Iterator[Row]]:
    sections = {"Images": _images(diagnosis.summary), "Pixels": _pixels(diagnosis.summary)}
    if diagnosis.sizes is not None:
        sections["Sizes"] = _sizes(diagnosis.sizes, diagnosis.config)
    if diagnosis.cost is not None:
        sections["Cost"] = _cost(diagnosis)
    return sections


def _finding_row(finding: Finding) -> tuple[str, str, str, str]:
    named = [f"{escape(name)}: {escape(why)}" for name, why in finding.files.items()]
    more = f" ... {len(named) - LISTED:,} more in doctor.json" if len(named) > LISTED else ""
    listed = "; ".join(named[:LISTED]) + more
    return HEADINGS[finding.level].lower(), finding.text, listed, finding.remedy


def _findings(findings: list[Finding]) -> Iterator[str]:
    if not findings:
        yield NOTHING
    for finding in findings:
        yield f"{HEADINGS[finding.level]:<8} {finding.text}".replace("\n", f"\n{'':<9}")
        for name, reason in list(finding.files.items())[
            : EXAMPLES if finding.level != "note" else 0
        ]:
            yield f"{'':<8}   {_short(escape(name))}: {escape(reason)}"
        if finding.remedy:
            yield f"{'':<8}   -> {finding.remedy}"


def _images(summary: Summary) -> Iterator[Row]:
    parts = ", ".join(f"{n:,} {part}" for part, n in summary.images.items())
    total = sum(summary.images.values())
    size = f", {summary.megabytes:,.1f} MB"
    is_sample = summary.read < total
    yield ("images", f"{total:,} ({parts}){'' if is_sample else size}")
    if is_sample:
        yield ("looked at", f"{summary.read:,} of them, chosen at random (--sample){size}")
    yield ("can be read", f"{summary.readable:,} of {summary.read:,}")
    yield ("formats", _counts(summary.formats))
    yield ("depth", _counts(summary.kinds))
    for name, spread in (("width", summary.width), ("height", summary.height)):
        if spread is not None:
            yield (name, _spread(spread))
    if not summary.classes:
        yield ("classes", "none: images lie loose, which is enough for pretraining")
        return
    yield ("classes", f"{len(summary.classes):,}")
    ordered = sorted(summary.classes.items(), key=lambda row: -sum(row[1].values()))
    shown = ordered if len(ordered) <= CLASSES else ordered[: CLASSES // 2]
    for name, counts in shown:
        yield _class_row(name, counts)
    if len(ordered) > CLASSES:
        yield ("", f"... {len(ordered) - CLASSES:,} classes between ...")
        for name, counts in ordered[-(CLASSES // 2) :]:
            yield _class_row(name, counts)


def _pixels(summary: Summary) -> Iterator[Row]:
    if not summary.mean:
        yield "", "no image could be read"
        return
    yield ("mean", f"{[round(x, 3) for x in summary.mean]}")
    yield ("std", f"{[round(x, 3) for x in summary.std]}")
    yield ("", "--data.statistics measured takes those of the crops that are trained on, or give")
    given = [[round(x, 3) for x in values] for values in (summary.mean, summary.std)]
    yield ("", f"--data.statistics '{given}'")
    if summary.scan_values:
        least, low, middle, high, greatest = summary.scan_values
        yield (
            "scan values",
            f"{least:g} to {greatest:g}; in the median image {low:g} (0.5 %), "
            f"{middle:g} (50 %), {high:g} (99.5 %)",
        )
        yield ("", "each image's own percentiles become 0 and 1; for one scale for all:")
        yield ("", f"--data.window '[{low:g}, {high:g}]'")


def _sizes(sizes: Sizes, config: str) -> Iterator[Row]:
    if not sizes.legal:
        yield "", f"not known: the model of {config} could not be tried"
        return
    yield (
        "img_size",
        f"{_side(sizes.img_size)} in {config}; legal are multiples of its stride "
        f"{sizes.stride} and of the cell: {', '.join(map(str, sizes.legal))}",
    )
    yield ("", f"fits these images: --model.img_size {sizes.img_size_advice}")
    cells = ", ".join(f"{cell} ({distance:.0f} px)" for cell, distance in sizes.cells.items())
    yield (
        "mask_patch_size",
        f"legal at {_side(sizes.img_size)}, with AvgDist as at 192 px: {cells or 'none'}",
    )
    yield ("", f"fits the paper's 10 to 20 px: --model.mask_patch_size {sizes.cell_advice}")


def _cost(diagnosis: Diagnosis) -> Iterator[Row]:
    cost, summary = diagnosis.cost, diagnosis.summary
    assert cost is not None
    if cost.problem:
        yield ("problem", cost.problem)
    if not cost.images_per_s:
        return
    measured = f"batches of {cost.measured_batch}, {cost.precision}, {cost.device}"
    yield (
        "model",
        f"{cost.images_per_s:,.1f} images/s in {measured}; "
        f"{cost.encoder}, {cost.parameters / 1e6:,.1f} M parameters",
    )
    if summary.images_per_s:
        feeding = cost.images_per_s / summary.images_per_s
        yield (
            "loader",
            f"{summary.images_per_s:,.0f} images/s in one process: the model needs "
            f"{max(round(feeding + 0.5), 1):,} of them",
        )
    images = summary.images.get("train", 0)
    epochs = f"{diagnosis.epochs:g} epochs" if diagnosis.epochs else "an epoch"
    time = _duration(hours(images, diagnosis.epochs or 1, cost.images_per_s))
    device = "on one such device, if the loader keeps up"
    yield ("time", f"about {time} for {epochs} of {images:,} images {device}")
    yield ("memory", _memory(cost))
    yield ("", "an estimate, from a few steps on noise")


def _memory(cost: Cost) -> str:
    states = f"parameters, gradients and optimiser {cost.state_mb:,.0f} MB"
    if cost.memory_mb is None:
        return f"{states}; the rest was not measured"
    said = f"about {cost.memory_mb / 1e3:,.1f} GB with batches of {cost.batch_size}"
    if cost.measured_batch < cost.batch_size:
        said += f" (extended from {(cost.peak_mb or 0) / 1e3:,.1f} GB at {cost.measured_batch})"
    return f"{said}, in it {states}"


def _duration(time: float) -> str:
    if time < 1 / 60:
        return "a minute"
    if time < 2:
        return f"{60 * time:.0f} minutes"
    return f"{time:,.0f} hours" if time < 72 else f"{time / 24:,.0f} days"


def _class_row(name: str, counts: Mapping[str, int]) -> Row:
    listed = ", ".join(f"{n:,} {part}" for part, n in counts.items())
    return "", f"{_short(escape(name)):<24} {listed}"


def _counts(counts: Mapping[str, int], most: int = 6) -> str:
    rows = [f"{n:,} {name}" for name, n in counts.items()]
    more = f" and {len(rows) - most} kinds more" if len(rows) > most else ""
    return ", ".join(rows[:most]) + more


def _spread(spread: Spread) -> str:
    if spread.least == spread.greatest:
        return f"{spread.least:g} px"
    middle = f"median {spread.median:g}, nine in ten {spread.low:g} to {spread.high:g}"
    return f"{spread.least:g} to {spread.greatest:g} px; {middle}"


def _side(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]} x {size[1]}"


def _short(name: str, most: int = 60) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"
