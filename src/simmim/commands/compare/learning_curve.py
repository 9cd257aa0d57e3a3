"""A picture of a comparison: accuracy over the number of labels, a line an arm."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simmim.commands.compare.significance import OURS, PUBLIC, SCRATCH, Result, Validation, spread

COLORS = {SCRATCH: "#7f7f7f", OURS: "#1f77b4", PUBLIC: "#d9822b"}
TITLES = {"finetune": "fine-tuned", "probe": "linear probe"}
MARKS = {SCRATCH: "s", OURS: "o", PUBLIC: "^"}


def draw_learning_curve(
    results: Sequence[Result], validation: Validation, path: Path, *, balanced: bool
) -> None:
    """Draw accuracy over the number of labels, with the spread of the seeds.

    Args:
        results: The runs; a panel for each mode.
        validation: What they were scored on.
        path: The PNG to write.
        balanced: Whether classes count alike, instead of images.
    """
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(r.mode for r in results))
    figure = Figure(figsize=(1 + 5.5 * len(modes), 4.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(modes), squeeze=False, sharey=True)[0]
    for mode, panel in zip(modes, panels, strict=True):
        _draw_panel(panel, [r for r in results if r.mode == mode], balanced)
        _draw_chance(panel, validation, balanced)
        panel.set_title(TITLES.get(mode, mode), fontsize=11)
    metric = "balanced accuracy" if balanced else "top-1 accuracy"
    panels[0].set_ylabel(f"{metric} on the validation images, %")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.savefig(path)


def _draw_panel(panel: Any, results: Sequence[Result], balanced: bool) -> None:
    budgets = sorted({r.images for r in results})
    arms = [name for name in COLORS if any(r.arm == name for r in results)]
    for place, arm in enumerate(arms):
        scores = {n: 100 * np.array(spread(results, arm, n, balanced)) for n in budgets}
        there = [n for n in budgets if len(scores[n])]
        beside = {n: n * 1.03 ** (place - (len(arms) - 1) / 2) for n in there}  # no bar hides one
        panel.errorbar(
            [beside[n] for n in there],
            [scores[n].mean() for n in there],
            yerr=[scores[n].std(ddof=1) if len(scores[n]) > 1 else 0 for n in there],
            color=COLORS[arm],
            marker=MARKS[arm],
            capsize=4,
            label=arm,
        )
        for n in there:  # each seed: three of them are no distribution
            panel.plot([beside[n]] * len(scores[n]), scores[n], ".", color=COLORS[arm], alpha=0.4)
    panel.set_xscale("log")
    panel.set_xticks(budgets, [f"{n:,}" for n in budgets])
    panel.set_xticks([], minor=True)
    if len(budgets) == 1:
        panel.set_xlim(budgets[0] / 2, budgets[0] * 2)
    panel.set_xlabel("labelled training images (mean ± standard deviation of the seeds)")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_chance(panel: Any, validation: Validation, balanced: bool) -> None:
    counts = np.bincount(validation.labels)
    chance = 1 / np.count_nonzero(counts) if balanced else counts.max() / counts.sum()
    panel.axhline(100 * chance, color="black", linewidth=0.8, linestyle=":")
    text = "guessing" if balanced else "always the most frequent class"
    panel.annotate(
        text,
        (0.99, 100 * chance),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
