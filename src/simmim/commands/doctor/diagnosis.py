"""All that the doctor has to say of a folder, as plain data; how it is shown is another matter."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from simmim.commands.doctor.estimate import Cost, Sizes
from simmim.commands.doctor.file_stats import Content, Counts, File, Header, Record
from simmim.commands.doctor.findings import Finding
from simmim.data.index import FileIndex
from simmim.data.summary import DataSummary, SplitSummary

MODES = {  # Pillow's words
    "1": "black-and-white",
    "L": "gray",
    "LA": "gray with transparency",
    "P": "palette",
    **dict.fromkeys(("I", "I;16", "I;16B", "I;16L"), "gray"),
    "F": "float gray",
}


@dataclass(frozen=True)
class Spread:
    """Least, middle and greatest of a number, and its 5th and 95th percentile."""

    least: float
    low: float
    median: float
    high: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise numbers."""
        return cls(*np.percentile(values, (0, 5, 50, 95, 100)).round(4).tolist())


@dataclass(frozen=True)
class Summary:
    """What was counted and measured.

    Attributes:
        images: By part, those that there are.
        read: How many were looked at.
        readable: How many of them can be read.
        megabytes: Of those that were looked at.
        classes: Images of each class, by part.
        formats: How many there are of each format.
        kinds: Of each mode and depth.
        width: Of the images as they are seen, in px.
        height: Likewise.
        mean: Of each channel, in 0..1, of the training images; each counts the same.
        std: Likewise.
        scan_values: Of scans: the least of their minima and so on, in their own numbers
            (percentiles 0, 0.5, 50, 99.5 and 100: least, medians, greatest).
        images_per_s: That one process reads, decodes and crops.
    """

    images: dict[str, int]
    read: int
    readable: int
    megabytes: float
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    width: Spread | None = None
    height: Spread | None = None
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    scan_values: list[float] = field(default_factory=list)
    images_per_s: float = 0.0


@dataclass(frozen=True)
class Diagnosis:
    """Everything.

    Attributes:
        root: The folder.
        config: The pretraining config that sizes and costs are for.
        options: How the folder was read, by the names of the data's options.
        summary: Counts.
        findings: What was found, worst first.
        sizes: Legal sizes; None: they were not asked for.
        cost: Time and memory; None likewise.
        epochs: Of the config.
        table: What each split holds, as every task prints it.
    """

    root: str
    config: str
    options: dict[str, Any]
    summary: Summary
    findings: list[Finding]
    sizes: Sizes | None = None
    cost: Cost | None = None
    epochs: float = 0.0
    table: str = ""

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)

    def quarantine(self) -> dict[str, str]:
        """Files that are better taken out, and why, in the order of their paths."""
        listed: dict[str, list[str]] = {}
        for finding in self.findings:
            for name, reason in finding.files.items() if finding.quarantine else ():
                listed.setdefault(name, []).append(reason)
        return {name: "; ".join(listed[name]) for name in sorted(listed)}


def count_splits(
    root: str, counts: Counts, classes: Sequence[str], indices: Mapping[str, FileIndex]
) -> DataSummary:
    """Count what each split holds, and what is left out, as the tasks do."""
    train = indices["train"]
    splits = {
        name: SplitSummary(
            labelled.total(),
            {},
            [labelled[label] for label in range(len(classes))],
            indices[name].left_out if name == "train" or indices[name] is not train else (),
        )
        for name, labelled in counts.items()
    }
    hints = dict.fromkeys(index.hint for index in indices.values() if index.hint)
    return DataSummary(root, splits, classes=classes, notes=list(hints))


def summarise(
    counts: Counts, read: Sequence[tuple[File, Record]], classes: Sequence[str]
) -> Summary:
    """Count and measure."""
    good = [(file, record, record.content) for file, record in read if record.content]
    mean, std = _statistics(c for file, _, c in good if file.part == "train")
    seconds = sum(record.seconds for _, record, _ in good)
    return Summary(
        images={part: labelled.total() for part, labelled in counts.items()},
        read=len(read),
        readable=len(good),
        megabytes=round(sum(record.size for _, record in read) / 1e6, 3),
        classes=_classes(counts, classes),
        formats=_counts(record.header.format for _, record in read),
        kinds=_counts(_kind(r.header) for _, r, _ in good),
        width=Spread.of([c.width for _, _, c in good]) if good else None,
        height=Spread.of([c.height for _, _, c in good]) if good else None,
        mean=mean,
        std=std,
        scan_values=_scan_values([c.range for _, _, c in good if c.deep and c.range]),
        images_per_s=round(len(good) / seconds, 1) if seconds else 0.0,
    )


def _kind(header: Header) -> str:
    return f"{MODES.get(header.mode, header.mode)} {header.bits}-bit"


def _classes(counts: Counts, classes: Sequence[str]) -> dict[str, dict[str, int]]:
    parts = sorted(part for part, labelled in counts.items() if labelled)
    return {
        name: {part: counts[part][label] for part in parts} for label, name in enumerate(classes)
    }


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _statistics(contents: Iterable[Content]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, from those of the images."""
    moments = [(c.mean, c.square) for c in contents]
    if not moments:
        return [], []
    mean, square = np.mean(moments, axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return mean.round(4).tolist(), std.round(4).tolist()


def _scan_values(ranges: Sequence[tuple[float, ...]]) -> list[float]:
    if not ranges:
        return []
    table = np.array(ranges)
    middle = np.median(table[:, 1:4], axis=0).tolist()
    return [float(table[:, 0].min()), *middle, float(table[:, 4].max())]
