"""What the runs of a comparison show: differences with their uncertainty, a table, a sentence.

An accuracy is uncertain for two reasons: another seed (labels, initial weights, order) would have
given another one, and so would other validation images. The runs are paired in both respects: for
each seed all arms train on the same images, and all are scored on the same validation images. With
c = 1 where an image is recognised, the difference of two arms is the mean of c - c' over seeds and
images, and there are two estimates of how far it may be off:

- by the seeds: the standard deviation of their differences over the root of their number;
- by the images: the same of what each contributes, averaged over the seeds. Images of one group (a
  patient, a scene) count as one draw. For one seed this is McNemar's. One image more that only one
  arm recognises is added, so that no finite set of images proves two arms to be equal.

Each is multiplied by Student's quantile for its own number of draws (4.3 for the 95 % of three
seeds), and the margin is the root of the sum of their squares. That is on the safe side: what seeds
and images do together is in both. The 5 % are shared between the budgets that are judged together
(Bonferroni), for three budgets are three chances to be lucky: 7.6 in place of 4.3.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

Floats = npt.NDArray[np.float64]
Judgement = Literal["better", "worse", "same", "open"]
ERROR = 0.05  # chance that one of the intervals of a comparison misses
MATTERS = 0.01  # a gain of less than one point is not worth a pretraining
IMBALANCED = 1.5  # images of the largest class / of the smallest, from which top-1 misleads
LEARNED = 0.9  # of its own training images: below it an arm could have learned for longer
SCRATCH, OURS, PUBLIC = "scratch", "pretrained", "public"


@dataclass(frozen=True)
class Result:
    """One run of a comparison, a row of results.csv.

    Attributes:
        mode: finetune or probe.
        arm: scratch, pretrained or public.
        budget: As it was asked for: a share, or images of each class.
        images: Training images with a label.
        seed: Of the subset, the initial weights and the order.
        steps: Optimiser steps.
        top1: Share of the validation images that are recognised after the last step.
        top1_balanced: The same, averaged over the classes.
        train_top1: Share of the training images, without augmentation; of at most 1,000.
        seconds: Of training.
        correct: Whether each validation image is recognised, bool, (n,).
    """

    mode: str
    arm: str
    budget: float
    images: int
    seed: int
    steps: int
    top1: float
    top1_balanced: float
    train_top1: float
    seconds: float
    correct: npt.NDArray[np.bool_] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Validation:
    """The images that all runs are scored on.

    Attributes:
        labels: Class of each, (n,).
        groups: What each belongs to (a patient, a scene), numbers, (n,); its own place by default.
    """

    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]

    def weights(self, balanced: bool) -> Floats:
        """What each image counts in an accuracy, (n,); they sum to 1."""
        if not balanced:
            return np.full(len(self.labels), 1 / len(self.labels))
        counts = np.bincount(self.labels)
        return np.asarray(1 / (counts[self.labels] * np.count_nonzero(counts)))

    @property
    def imbalanced(self) -> bool:
        """Whether classes differ in size so much that top-1 is about the large ones."""
        counts = np.bincount(self.labels)
        counts = counts[counts > 0]
        return bool(counts.max() >= IMBALANCED * counts.min() and counts.max() - counts.min() > 1)


@dataclass(frozen=True)
class Gap:
    """How much better one arm is than another at a budget, as shares of 1.

    Attributes:
        labels: The budget in words.
        first: Mean accuracy of the one.
        second: Mean accuracy of the other.
        spread: Standard deviation of the seeds' differences; nan for one seed.
        margin: Half of the interval that holds the true difference.
        seeds: Number of seeds.
        images: Number of validation images.
        steps: Optimiser steps of each run.
        learned: Share of its own training images that the less trained arm recognises; 1 where that
            says nothing, as of a probe.
    """

    labels: str
    first: float
    second: float
    spread: float
    margin: float
    seeds: int
    images: int
    steps: int = 0
    learned: float = 1.0

    @property
    def mean(self) -> float:
        """The difference."""
        return self.first - self.second

    @property
    def is_bounded(self) -> bool:
        """Whether the interval is one that accuracies can differ by: from -1 to 1."""
        return self.seeds > 1 and abs(self.mean) + self.margin <= 1

    @property
    def judgement(self) -> Judgement:
        """Better or worse where the interval leaves out 0; same where it leaves out a point."""
        if self.seeds < 2:
            return "open"
        if self.mean - self.margin > 0:
            return "better"
        if self.mean + self.margin < 0:
            return "worse"
        return "same" if self.mean + self.margin < MATTERS else "open"


def gap(
    first: npt.NDArray[np.bool_],
    second: npt.NDArray[np.bool_],
    weights: Floats,
    groups: npt.NDArray[np.int64],
    *,
    labels: str = "",
    judged: int = 1,
) -> Gap:
    """Compare two arms, seed by seed and image by image.

    Args:
        first: Whether each seed's run recognises each image, (seeds, n).
        second: The same of the other arm: the same seeds, the same images.
        weights: What each image counts, (n,).
        groups: Images of one number are one draw, (n,).
        labels: The budget in words.
        judged: Budgets that share the chance of error.
    """
    seeds, images = first.shape
    differences = first.astype(float) - second  # (seeds, n)
    each = differences @ weights
    mean = float(each.mean())
    pulls = np.bincount(groups, weights * (differences.mean(0) - mean))
    draws = len(np.unique(groups))
    by_images = draws / max(draws - 1, 1) * float((pulls**2).sum()) + float(weights.max() ** 2)
    by_seeds = float(each.var(ddof=1)) / seeds if seeds > 1 else float("nan")
    # One quantile for both, with Satterthwaite's degrees of freedom, misses up to twice as
    # often as it says with three seeds.
    level = 1 - ERROR / judged / 2
    margin = np.hypot(
        student.ppf(level, max(draws - 1, 1)) * np.sqrt(by_images),
        student.ppf(level, max(seeds - 1, 1)) * np.sqrt(by_seeds),
    )
    return Gap(
        labels=labels,
        first=float((first @ weights).mean()),
        second=float((second @ weights).mean()),
        spread=float(each.std(ddof=1)) if seeds > 1 else float("nan"),
        margin=float(margin),
        seeds=seeds,
        images=images,
    )


def gaps(
    results: Sequence[Result],
    validation: Validation,
    arms: tuple[str, str],
    *,
    words: Callable[[int], str] = "{:,} labels".format,
    balanced: bool = False,
) -> list[Gap]:
    """Compare two arms at each budget, the smallest first.

    Args:
        results: The runs of one mode.
        validation: What they were scored on.
        arms: The one, and the other.
        words: Says a number of images in words.
        balanced: Whether classes count alike, instead of images.
    """
    of = {(r.arm, r.images, r.seed): r for r in results}
    budgets = sorted({r.images for r in results})
    found = []
    for images in budgets:
        both = [s for s in _seeds(results) if all((arm, images, s) in of for arm in arms)]
        if not both:
            continue
        runs = [[of[arm, images, seed] for seed in both] for arm in arms]
        first, second = (np.stack([run.correct for run in arm]) for arm in runs)
        weights, groups = validation.weights(balanced), validation.groups
        one = gap(first, second, weights, groups, labels=words(images), judged=len(budgets))
        learned = min(_learned(arm) for arm in runs)
        found.append(replace(one, steps=runs[0][0].steps, learned=learned))
    return found


# The sentence ------------------------------------------------------------------------------------


def verdict(found: Sequence[Gap], first: str = OURS, second: str = "from scratch") -> str:
    """Say in one sentence whether the first is better than the second.

    Yes, where at some budget the whole interval is above 0, and at none below. No, where it is
    below, or where everywhere it stays under one point. Not shown, where neither is: more seeds,
    more validation images or a larger difference would be needed.

    Args:
        found: From `gaps`, the smallest budget first.
        first: The one, in words.
        second: The other, in words.
    """
    by: dict[Judgement, list[Gap]] = {"better": [], "worse": [], "same": [], "open": []}
    for one in found:
        by[one.judgement].append(one)
    better, worse, same, still_open = by.values()
    if found[0].seeds < 2:
        told = _told(found[0], first, second)
        return f"Not shown: one seed does not tell how far seeds lie apart: {told}; use 3 seeds."
    if better and worse:
        return (
            f"It depends: {_told(better[0], first, second)}, but {_told(worse[0], second, first)}."
        )
    if better:
        how = "Yes" if better[0].learned >= LEARNED else "Yes, after so short a training"
        return f"{how}: {_told(better[0], first, second)}{_also(by)}."
    if worse:
        return f"No: {_told(worse[0], second, first)}{_also(by)}."
    if not still_open:
        return f"No: nowhere is it worth a point; {_told(same[0], first, second)}{_also(by)}."
    return (
        "Not shown: the difference is within the spread of the seeds and of the validation images; "
        f"{_told(still_open[0], first, second)}{_also(by)}."
    )


def _told(one: Gap, high: str, low: str) -> str:
    """`at 10 labels A reaches 41.2 % against 27.9 % of B (difference 13.3 ± 1.1 points ...)`."""
    backwards = one.judgement == "worse"
    top, other = (one.second, one.first) if backwards else (one.first, one.second)
    margin = f" ± {100 * one.margin:.1f}" if one.is_bounded else ""
    seeds = f"{one.seeds} seeds" if one.seeds > 1 else "one seed"
    if one.seeds > 1 and not one.is_bounded:
        seeds += ", too few for an interval,"
    length = f", {counted_steps(one.steps)} each" if one.steps else ""
    return (
        f"at {one.labels} {high} reaches {100 * top:.1f} % against {100 * other:.1f} % {low} "
        f"(difference {100 * (top - other):.1f}{margin} points over {seeds} and {one.images:,} "
        f"validation images{length})"
    )


def _also(by: Mapping[Judgement, Sequence[Gap]]) -> str:
    """What the sentence has not said yet, briefly."""
    lead = next(kind for kind in ("better", "worse", "open", "same") if by[kind])
    words: dict[Judgement, str] = {
        "better": "also better",
        "worse": "also worse",
        "open": "neither shown" if lead == "open" else "not shown",
        "same": "less than a point",
    }
    parts = []
    for kind, text in words.items():
        rest = by[kind][1:] if kind == lead else by[kind]
        if rest:
            listed = " and ".join(f"at {one.labels} by {100 * one.mean:.1f}" for one in rest)
            parts.append(f"; {text} {listed} points")
    return "".join(parts)


def counted_steps(steps: int) -> str:
    """A number of optimiser steps in words: `1 step`, `1,200 steps`."""
    return f"{steps:,} step{'' if steps == 1 else 's'}"


def unlearned(results: Sequence[Result], words: Callable[[int], str]) -> list[str]:
    """Sentences about budgets at which training ended before an arm had learned its own images."""
    notes = []
    for images in sorted({r.images for r in results}):
        runs = [r for r in results if r.images == images]
        shares = {arm: _learned([r for r in runs if r.arm == arm]) for arm in _arms(runs)}
        if min(shares.values()) < LEARNED:
            told = ", ".join(f"{arm} {100 * share:.0f} %" for arm, share in shares.items())
            verb = "was" if runs[0].steps == 1 else "were"
            notes.append(
                f"At {words(images)}, {counted_steps(runs[0].steps)} {verb} short: of their own "
                f"training images {told} are recognised. Longer training (epochs, min_steps) may "
                "change the difference."
            )
    return notes


# The table ---------------------------------------------------------------------------------------


def table(
    results: Sequence[Result],
    validation: Validation,
    *,
    words: Callable[[int], str] = "{:,} labels".format,
    balanced: bool = False,
) -> list[dict[str, str]]:
    """Summarise the runs of one mode, a row a budget: mean ± standard deviation over the seeds.

    Args:
        results: The runs.
        validation: What they were scored on.
        words: Says a number of images in words.
        balanced: Whether classes count alike, instead of images.

    Returns:
        Rows with the same columns, as text; accuracies in percent.
    """
    rows: dict[int, dict[str, str]] = {}
    for images in sorted({r.images for r in results}):
        runs = [r for r in results if r.images == images]
        rows[images] = {"labels": words(images), "steps": f"{runs[0].steps:,}"}
        for arm in _arms(results):
            scores = [_score(r, balanced) for r in runs if r.arm == arm]
            rows[images][arm] = _mean_and_spread(scores)
    for other in [arm for arm in _arms(results) if arm != OURS]:
        found = gaps(results, validation, (OURS, other), words=words, balanced=balanced)
        named = {one.labels: one for one in found}
        for row in rows.values():
            if one := named.get(row["labels"]):
                row[f"{OURS} - {other}"] = _signed(one)
                row["interval" if other == SCRATCH else f"interval, {other}"] = _interval(one)
    return list(rows.values())


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Write rows as a table in Markdown, aligned to be read as it is."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(f"{v:<{w}}" for v, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def spread(results: Sequence[Result], arm: str, images: int, balanced: bool) -> list[float]:
    """The accuracies of an arm at a budget, one a seed."""
    return [_score(r, balanced) for r in results if (r.arm, r.images) == (arm, images)]


def _score(result: Result, balanced: bool) -> float:
    return result.top1_balanced if balanced else result.top1


def _arms(results: Sequence[Result]) -> list[str]:
    there = {r.arm for r in results}
    return [arm for arm in (SCRATCH, OURS, PUBLIC) if arm in there]


def _learned(runs: Sequence[Result]) -> float:
    """Share of its training images that an arm recognises; 1 of a probe, which need not."""
    shares = [run.train_top1 for run in runs if run.mode != "probe"]
    return float(np.mean(shares)) if shares else 1.0


def _seeds(results: Sequence[Result]) -> list[int]:
    return sorted({r.seed for r in results})


def _mean_and_spread(scores: Sequence[float]) -> str:
    if not scores:
        return ""
    mean = f"{100 * np.mean(scores):.1f}"
    return f"{mean} ± {100 * np.std(scores, ddof=1):.1f}" if len(scores) > 1 else mean


def _signed(one: Gap) -> str:
    several = f" ± {100 * one.spread:.1f}" if one.seeds > 1 else ""
    return f"{100 * one.mean:+.1f}{several}"


def _interval(one: Gap) -> str:
    if not one.is_bounded:
        return "too few seeds" if one.seeds > 1 else ""
    low, high = one.mean - one.margin, one.mean + one.margin
    return f"{100 * low:+.1f} to {100 * high:+.1f}"
