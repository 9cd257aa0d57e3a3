"""A picture of a comparison: accuracy over the number of labels, a line an arm."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simmim.evidence import OURS, PUBLIC, SCRATCH, Result, Validation, spread

COLORS = {SCRATCH: "#7f7f7f", OURS: "#1f77b4", PUBLIC: "#d9822b"}
MARKS = {SCRATCH: "s", OURS: "o", PUBLIC: "^"}


def draw_learning_curve(
    results: Sequence[Result], validation: Validation, path: Path, *, title: str, balanced: bool
) -> None:
    """Draw accuracy over the number of labels, with the spread of the seeds.

    Args:
        results: The runs; a panel for each mode.
        validation: What they were scored on.
        path: The PNG to write.
        title: What stands above.
        balanced: Whether classes count alike, instead of images.
    """
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(r.mode for r in results))
    figure = Figure(figsize=(1 + 5.5 * len(modes), 4.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(modes), squeeze=False, sharey=True)[0]
    for mode, panel in zip(modes, panels, strict=True):
        _draw_panel(panel, [r for r in results if r.mode == mode], balanced)
        _draw_chance(panel, validation, balanced)
        if len(modes) > 1:
            panel.set_title(mode, fontsize=10)
    name = "balanced accuracy" if balanced else "top-1 accuracy"
    panels[0].set_ylabel(f"{name} on the validation images, %")
    panels[0].legend(frameon=False, loc="best")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _draw_panel(panel: Any, results: Sequence[Result], balanced: bool) -> None:
    budgets = sorted({r.images for r in results})
    for arm in [name for name in COLORS if any(r.arm == name for r in results)]:
        scores = {n: 100 * np.array(spread(results, arm, n, balanced)) for n in budgets}
        there = [n for n in budgets if len(scores[n])]
        panel.errorbar(
            there,
            [scores[n].mean() for n in there],
            yerr=[scores[n].std(ddof=1) if len(scores[n]) > 1 else 0 for n in there],
            color=COLORS[arm],
            marker=MARKS[arm],
            capsize=4,
            label=f"{arm} (mean ± standard deviation of the seeds)" if arm == SCRATCH else arm,
        )
        for n in there:  # each seed, so that three of them do not look like a distribution
            panel.plot([n] * len(scores[n]), scores[n], ".", color=COLORS[arm], alpha=0.45)
    panel.set_xscale("log")
    panel.set_xticks(budgets, [f"{n:,}" for n in budgets])
    panel.set_xticks([], minor=True)
    if len(budgets) == 1:
        panel.set_xlim(budgets[0] / 2, budgets[0] * 2)
    panel.set_xlabel("labelled training images")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_chance(panel: Any, validation: Validation, balanced: bool) -> None:
    counts = np.bincount(validation.labels)
    chance = 1 / np.count_nonzero(counts) if balanced else counts.max() / counts.sum()
    panel.axhline(100 * chance, color="black", linewidth=0.8, linestyle=":")
    text = "guessing" if balanced else "always the most frequent class"
    panel.annotate(
        text,
        (1, 100 * chance),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
