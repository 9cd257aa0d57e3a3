"""What is found in a folder: plain data, made of the records of its files."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from statistics import median
from typing import Literal

from simmim.commands.doctor.file_stats import Content, Counts, File, Header, Record
from simmim.commands.doctor.near_duplicates import clusters
from simmim.data.split import group_of

Level = Literal["bad", "look", "note"]
Read = Sequence[tuple[File, Record]]

SUFFIXES = {  # endings of each format; others are named wrongly
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe", ".jif"),
    "MPO": (".mpo", ".jpg", ".jpeg"),
    "PNG": (".png", ".apng"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx"),
    "DICOM": (".dcm",),
    "NPY": (".npy",),
}
FLAT = 0.01  # standard deviation of pixels in 0..1 below which there is next to nothing to see
ENORMOUS = 24e6  # pixels: decoding takes a quarter of a second, and 72 MB
TINY = 8  # px of the shorter side; or an eighth of the folder's median
NARROW = 4.0  # longer over shorter side; a crop takes ratios up to 4/3
RARE = 0.1  # share of the files below which a kind is an outlier
IMBALANCE = 10  # largest over smallest class
FEW = 5  # images of a class


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    Attributes:
        kind: A word for it, such as "unreadable".
        level: bad (it spoils a run or a number), look (a person should look), note.
        text: A sentence.
        remedy: What can be done; empty where nothing need be.
        files: What is said of each file that it is about, by path.
        quarantine: Whether these files are better taken out.
        beside: Of copies, the file that each is like.
    """

    kind: str
    level: Level
    text: str
    remedy: str = ""
    files: dict[str, str] = field(default_factory=dict)
    quarantine: bool = False
    beside: dict[str, str] = field(default_factory=dict)


def find_all(
    read: Read,
    classes: Sequence[str],
    counts: Counts,
    group_pattern: str | None,
    left_out: Mapping[str, int],
) -> list[Finding]:
    """Find what there is to say.

    Args:
        read: The files and their records.
        classes: Names of the classes.
        counts: How many images there are, read or not.
        group_pattern: Names the patient or scene of a file, by its first group.
        left_out: Files below the root that training does not see, counted by kind.
    """
    good = [(file, record, record.content) for file, record in read if record.content]
    return [
        *unreadable(read),
        *duplicates(read, classes),
        *look_alikes(read, classes),
        *shared_groups([file for file, _ in read], group_pattern),
        *suspicious(good),
        *unlike_the_others(good),
        *peculiar(good),
        *class_findings(counts, classes),
        *unseen(left_out),
    ]


def in_order(found: Iterable[Finding]) -> list[Finding]:
    """Put the worst first."""
    return sorted(found, key=lambda finding: ("bad", "look", "note").index(finding.level))


# Files that cannot be read ------------------------------------------------------------------------


def unreadable(read: Read) -> list[Finding]:
    """Files that training would replace by others."""
    files = {file.name: record.error for file, record in read if record.error}
    if not files:
        return []
    channels = [reason for reason in files.values() if "data.in_chans is" in reason]
    remedy = "training skips them, and stops where they are more than data.max_bad_share"
    if 2 * len(channels) > len(files):
        remedy = f"{max(set(channels), key=channels.count)}: give --in_chans as the files have"
    text = f"cannot be read: {_count(files, 'file')}"
    return [Finding("unreadable", "bad", text, remedy, files, quarantine=True)]


# The same image twice -----------------------------------------------------------------------------


def duplicates(read: Read, classes: Sequence[str]) -> list[Finding]:
    """Files with the same bytes, across the parts and within them."""
    groups: dict[bytes, list[File]] = defaultdict(list)
    for file, record in read:
        if record.digest:
            groups[record.digest].append(file)
    sets = [files for files in groups.values() if len(files) > 1]
    return _twins(
        sets,
        classes,
        ("label_conflict", "bad", "with different labels, byte for byte the same"),
        ("leak", "bad", "in {parts} at once, byte for byte"),
        ("duplicate", "look", "copies of others, byte for byte"),
        "the same file as",
        quarantine=True,
    )


def look_alikes(read: Read, classes: Sequence[str]) -> list[Finding]:
    """Files that show the same, though their bytes differ, across the parts and within them."""
    first: dict[bytes, tuple[File, Content]] = {}
    for file, record in read:
        if record.content and record.content.spread >= FLAT:
            first.setdefault(record.digest, (file, record.content))
    # A copy across parts is said as such already; its first file stands for all.
    shown = list(first.values())
    sets = [[shown[i][0] for i in group] for group in clusters([c for _, c in shown])]
    return _twins(
        sets,
        classes,
        ("near_label_conflict", "look", "with different labels, alike by their looks"),
        ("near_leak", "look", "in {parts} at once, by their looks"),
        ("near_duplicate", "note", "copies of others, by their looks"),
        "looks like",
        quarantine=False,
    )


def _twins(
    sets: Sequence[Sequence[File]],
    classes: Sequence[str],
    conflict: tuple[str, Level, str],
    across: tuple[str, Level, str],
    within: tuple[str, Level, str],
    words: str,
    quarantine: bool,
) -> list[Finding]:
    """Tell those across parts, of which training's are named, from those within a part.

    Where labels differ it is not known which is right: all are named, and none is to be taken out.
    """
    conflicts: dict[str, str] = {}  # and another label's file
    labels = {file.name: file.label for group in sets for file in group}
    leaks: dict[str, str] = {}  # and what each is like
    copies: dict[str, str] = {}
    parts: set[str] = set()
    for group in sets:
        # Those of test and val stay where they are, so that scores can be compared.
        kept, *others = sorted(group, key=lambda file: (_rank(file.part), file.name))
        if len({file.label for file in group if file.label >= 0}) > 1:
            for file in group:
                other = next((f for f in group if f.label not in (file.label, -1)), kept)
                conflicts[file.name] = other.name
            continue
        for file in others:
            crosses = file.part != kept.part
            (leaks if crosses else copies)[file.name] = kept.name
            parts |= {file.part, kept.part} if crosses else set()
    look = "look at them: if it is one scene or patient, a --group_pattern tells which"
    spoilt = "scores of val are too good: take them out of training"
    remedies = (spoilt, "") if quarantine else (look, look)
    both = " and ".join(sorted(parts, key=_rank, reverse=True))
    found = []
    if conflicts:
        kind, level, said = conflict
        text = f"{said}: {_count(conflicts, 'image')}"
        files = {
            name: " but ".join(
                [f"labelled {classes[labels[name]]}"] * (labels[name] >= 0)
                + [f"{words} {other}, labelled {classes[labels[other]]}"]
            )
            for name, other in conflicts.items()
        }
        remedy = "look at them, and correct the labels"
        found.append(Finding(kind, level, text, remedy, files, False, conflicts))
    rows = zip((across, within), (leaks, copies), remedies, strict=True)
    for (kind, level, said), beside, remedy in rows:
        if beside:
            text = f"{said.format(parts=both)}: {_count(beside, 'image')}"
            files = {name: f"{words} {other}" for name, other in beside.items()}
            found.append(Finding(kind, level, text, remedy, files, quarantine, beside))
    return found


def shared_groups(files: Iterable[File], group_pattern: str | None) -> list[Finding]:
    """Patients or scenes with images in more than one part."""
    if group_pattern is None:
        return []
    members: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        members[group_of(file.name, group_pattern)][file.part].append(file.name)
    crossing = {group: parts for group, parts in members.items() if len(parts) > 1}
    if not crossing:
        groups = f"{len(members):,} groups of --group_pattern, none of them in two parts"
        return [Finding("groups", "note", groups)]
    text = f"{len(crossing):,} of {len(members):,} groups are in more than one part"
    reasons = {
        name: f"{group} is in {' and '.join(sorted(parts, key=_rank, reverse=True))}"
        for group, parts in crossing.items()
        for part in parts
        for name in parts[part]
    }
    remedy = "move each to one side, or take val/ away: then they are split by group"
    return [Finding("group_leak", "bad", text, remedy, reasons)]


def _rank(part: str) -> int:
    return ("test", "val", "train").index(part)


# Images that something is wrong with, or may be ---------------------------------------------------

Good = Sequence[tuple[File, Record, Content]]


def suspicious(good: Good) -> list[Finding]:
    """Images that can be read, but are hardly what somebody meant."""
    if not good:
        return []
    middle = median(min(c.height, c.width) for _, _, c in good)
    tiny = min(TINY, middle) if middle < 8 * TINY else middle / 8

    def flat(c: Content) -> str:
        if c.spread == 0:
            return "one single colour"
        return f"almost one colour: its pixels differ by {255 * c.spread:.1f} of 255"

    rules: list[tuple[str, Callable[[Content], bool], Callable[[Content], str], str]] = [
        ("constant", lambda c: c.spread < FLAT, flat, "nothing to see"),
        ("tiny", lambda c: min(c.height, c.width) < tiny, _size, "tiny beside the others"),
        ("enormous", lambda c: c.height * c.width > ENORMOUS, _size, "enormous"),
        (
            "narrow",
            lambda c: max(c.height, c.width) > NARROW * min(c.height, c.width),
            _size,
            "long and narrow, a crop sees a small part",
        ),
    ]
    remedies = {"enormous": "simmim pack --short_side 256 makes them quick to read"}
    found = []
    for kind, holds, reason, text in rules:
        files = {file.name: reason(c) for file, _, c in good if holds(c)}
        if files:
            sentence = f"{text}: {_count(files, 'image')}"
            remove = kind in ("constant", "tiny")
            found.append(Finding(kind, "look", sentence, remedies.get(kind, ""), files, remove))
    return found


def unlike_the_others(good: Good) -> list[Finding]:
    """Where most files are of one kind, the few that are not; a mixture otherwise."""
    found = []
    aspects: dict[str, Callable[[Record, Content], str]] = {
        "channels": lambda r, c: _colour(r.header, c),
        "depth": lambda r, c: f"{r.header.bits} bits a channel",
    }
    for kind, aspect in aspects.items():
        values = [aspect(record, content) for _, record, content in good]
        counts = Counter(values)
        if len(counts) < 2:
            continue
        most = counts.most_common(1)[0][0]
        files = {f.name: v for (f, _, _), v in zip(good, values, strict=True) if v != most}
        if len(files) <= RARE * len(good):
            text = f"unlike the others, which have {most}: {_count(files, 'image')}"
            found.append(Finding(f"other_{kind}", "look", text, "", files))
        else:
            mixture = ", ".join(f"{n:,} with {value}" for value, n in counts.most_common())
            found.append(Finding(f"mixed_{kind}", "note", f"a mixture: {mixture}"))
    return found


def _colour(header: Header, content: Content) -> str:
    if header.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        return "transparency"
    return "gray" if content.gray or len(content.mean) == 1 else "colour"


def peculiar(good: Good) -> list[Finding]:
    """What a person may want to know of some files, though training copes with it."""
    rules: list[tuple[str, Level, Callable[[Record, Content], bool], str, str]] = [
        (
            "depth_lost",
            "look",
            lambda r, c: r.header.bits > 8 and not c.deep,
            "more than 8 bits a channel, read as 8",
            "store scans as gray TIFF, or as NumPy arrays, to keep their depth",
        ),
        (
            "frames",
            "look",
            lambda r, c: r.header.frames,
            "several pictures in a file, the first is read",
            "",
        ),
        (
            "cmyk",
            "note",
            lambda r, c: r.header.mode == "CMYK",
            "for print (CMYK), read as RGB",
            "",
        ),
        (
            "transparent",
            "note",
            lambda r, c: r.header.transparent,
            "with transparent parts, which become white",
            "",
        ),
        ("turned", "note", lambda r, c: r.header.turned, "turned as EXIF says", ""),
    ]
    found = []
    for kind, level, holds, text, remedy in rules:
        files = {f.name: f"{r.header.format} {r.header.mode}" for f, r, c in good if holds(r, c)}
        if files:
            found.append(Finding(kind, level, f"{text}: {_count(files, 'image')}", remedy, files))
    if all(c.gray for _, _, c in good) and good:
        remedy = "--model.in_chans 1 does with a third of the memory of a batch"
        found.append(Finding("gray", "note", "all images are gray", remedy))
    named = {
        file.name: f"is {record.header.format}"
        for file, record, _ in good
        if PurePosixPath(file.name).suffix.lower() not in SUFFIXES.get(record.header.format, ("",))
        and record.header.format in SUFFIXES
    }
    if named:
        text = f"with another format's ending, read all the same: {_count(named, 'image')}"
        found.append(Finding("ending", "note", text, "", named))
    return found


# Classes ------------------------------------------------------------------------------------------


def class_findings(counts: Counts, classes: Sequence[str]) -> list[Finding]:
    """How the classes are filled."""
    if not classes:
        return []
    found = []
    train, val = (counts.get(part, Counter[int]()) for part in ("train", "val"))
    sizes = {name: train[label] for label, name in enumerate(classes)}
    few = [f"{name} ({n})" for name, n in sizes.items() if n < FEW]
    if few:
        text = f"{_plural(len(few), 'class has', 'classes have')} fewer than {FEW} training images"
        found.append(Finding("few", "look", f"{text}: {_some(few)}"))
    least, most = min(sizes.values()), max(sizes.values())
    if least and most > IMBALANCE * least:
        text = f"the largest class has {most / least:,.0f} times the images of the smallest"
        remedy = "compare by val/top1 of each class (the confusion matrix), not by the mean alone"
        found.append(Finding("imbalance", "look", text, remedy))
    absent = [name for label, name in enumerate(classes) if val and not val[label] and train[label]]
    if absent:
        text = f"{_plural(len(absent), 'class', 'classes')} without validation image"
        found.append(Finding("no_validation", "look", f"{text}: {_some(absent)}"))
    return found


def unseen(left_out: Mapping[str, int]) -> list[Finding]:
    """Files that lie there, but are not read as images."""
    if not left_out:
        return []
    kinds = _some([f"{kind} ({n:,})" for kind, n in sorted(left_out.items(), key=lambda p: -p[1])])
    return [Finding("left_out", "note", f"not read as images: {kinds}")]


def count_left_out(root: str, suffixes: tuple[str, ...]) -> dict[str, int]:
    """Count the files below a folder that an index leaves out, by kind; empty folders too."""
    kinds: Counter[str] = Counter()
    for folder, folders, names in os.walk(root):
        if not folders and not names:
            kinds["empty folders"] += 1
        below = os.path.relpath(folder, root).split(os.sep)
        hidden = any(part.startswith(".") and part != "." for part in below)
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("._") or "__MACOSX" in below:
                kinds["macOS ._ files"] += 1
            elif name.startswith(".") or hidden:
                kinds["hidden files"] += 1
            elif suffix not in suffixes:
                kinds[f"*{suffix}" if suffix else "files without ending"] += 1
    return dict(kinds)


def _size(content: Content) -> str:
    return f"{content.width} x {content.height} px"


def _count(files: Mapping[str, str], word: str) -> str:
    return _plural(len(files), word, f"{word}s")


def _plural(n: int, one: str, many: str) -> str:
    return f"{n:,} {one if n == 1 else many}"


def _some(words: Sequence[str], most: int = 5) -> str:
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest:,} more" if rest > 0 else "")
