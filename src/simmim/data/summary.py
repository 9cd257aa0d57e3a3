"""What a task trains and scores on: counts of each split, and what is read but counts for nothing.

Every data module gives a `DataSummary` of its splits; it is printed as one table when a run starts,
and its problems are raised or warned of, the same for every task. `simmim doctor` prints the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SHOWN = 12  # classes with a row of their own in the table
IGNORED_SHARE = 0.5  # of a split's labels, above which it is warned of


@dataclass(frozen=True)
class LeftOut:
    """Something that was found and counts for nothing.

    Attributes:
        what: Its unit: files, images, objects, outlines, pixels.
        reason: Why, such as "iscrowd".
        count: How many.
        example: The first one.
    """

    what: str
    reason: str
    count: int
    example: str = ""

    def __str__(self) -> str:
        """One phrase: "3 files left out: cannot be read here (first: a.heic)"."""
        first = f" (first: {self.example})" if self.example else ""
        return f"{self.count:,} {self.what} left out: {self.reason}{first}"


@dataclass(frozen=True)
class SplitSummary:
    """Counts of one split.

    Attributes:
        images: How many images are used.
        counts: Further rows of the table by name, such as "with labels", "objects", "outlines".
        class_counts: Images, objects or pixels of each class, in the order of the classes; empty
            where there are no classes.
        left_out: What counts for nothing.
    """

    images: int
    counts: Mapping[str, int] = field(default_factory=dict)
    class_counts: Sequence[int] = ()
    left_out: Sequence[LeftOut] = ()


@dataclass(frozen=True)
class DataSummary:
    """Counts of all splits.

    Attributes:
        root: The folder.
        splits: By "train", "val" and "test".
        unit: What `class_counts` counts: images, objects or pixels.
        classes: Names of the classes.
        needs_labels: Whether there is nothing to learn without them.
        notes: Further sentences to warn of.
    """

    root: str
    splits: Mapping[str, SplitSummary]
    unit: str = "images"
    classes: Sequence[str] = ()
    needs_labels: bool = False
    notes: Sequence[str] = ()

    def refusal(self) -> str | None:
        """Why nothing can be learned: not one label of the training images counts; else None."""
        train = self.splits["train"]
        if not self.needs_labels or any(n > 0 for n in train.class_counts):
            return None
        reasons = "; ".join(map(str, self._ignored(train))) or f"there are no {self.unit}"
        return f"no {self.unit} to train on in {self.root!r}: {reasons}"

    def warnings(self) -> list[str]:
        """What counts for less than its owner may think, one sentence each."""
        found = list(self.notes)
        for name, split in self.splits.items() if self.needs_labels else ():
            total, ignored = sum(split.class_counts), self._ignored(split)
            if not total:
                reasons = "; ".join(map(str, ignored)) or f"there are no {self.unit}"
                found.append(
                    f"{name} has no {self.unit} that count, so it scores nothing: {reasons}"
                )
                continue
            missing = sum(one.count for one in ignored)
            if missing > IGNORED_SHARE * (missing + total):
                found.append(
                    f"{missing:,} of the {missing + total:,} {self.unit} of {name} count for "
                    f"nothing: {'; '.join(map(str, ignored))}"
                )
            empty = [c for c, n in zip(self.classes, split.class_counts, strict=False) if not n]
            if empty and name != "test":
                effect = "cannot be learned" if name == "train" else "is not scored"
                found.append(
                    f"{len(empty)} of {len(self.classes)} classes have no {self.unit} in {name}, "
                    f"such as {empty[0]!r}, which {effect}"
                )
        return found

    def table(self) -> str:
        """All counts, a column for each split."""
        rows = [["", *self.splits], self._row("images", [s.images for s in self.splits.values()])]
        names = dict.fromkeys(name for s in self.splits.values() for name in s.counts)
        rows += [
            self._row(name, [s.counts.get(name, 0) for s in self.splits.values()]) for name in names
        ]
        rows += self._class_rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        ]
        notes = [f"{name}: {one}" for name, split in self.splits.items() for one in split.left_out]
        return "\n".join([f"data in {self.root}", *lines, *dict.fromkeys(notes)])

    def _class_rows(self) -> list[list[str]]:
        """A row for each class; of many classes the least and the most frequent."""
        counted = [s.class_counts or [0] * len(self.classes) for s in self.splits.values()]
        if not self.classes or not any(map(sum, counted)):
            return []
        if len(self.classes) <= SHOWN:
            each = zip(self.classes, *counted, strict=True)
            return [self._row(f"  {name}", list(counts)) for name, *counts in each]
        return [
            self._row("classes", [sum(n > 0 for n in counts) for counts in counted]),
            self._row(f"  least {self.unit} of a class", [min(counts) for counts in counted]),
            self._row(f"  most {self.unit} of a class", [max(counts) for counts in counted]),
        ]

    def _ignored(self, split: SplitSummary) -> list[LeftOut]:
        """What was left out of the unit that is learned from."""
        return [one for one in split.left_out if one.what == self.unit]

    @staticmethod
    def _row(name: str, counts: Sequence[int]) -> list[str]:
        return [name, *(f"{n:,}" for n in counts)]
