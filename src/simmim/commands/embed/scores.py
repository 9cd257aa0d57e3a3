"""What features are worth: kNN and a linear probe that learn from the training images."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from simmim.base.progress import Bar
from simmim.commands.embed.table import Embeddings
from simmim.evaluation.probe import fit_linear_probe, knn_scores, top1

HELD_OUT = ("val", "test")
SCORES = {"probe_top1": "linear probe", "commonest": "chance (the commonest class)"}


def score(
    found: Embeddings, ks: Sequence[int], temperature: float, l2: float, device: torch.device
) -> dict[str, float]:
    """Let the training images' features classify the others, as the online probe does.

    Args:
        found: The embeddings.
        ks: Numbers of neighbours that vote.
        temperature: Of their votes.
        l2: Weight decay of the linear probe.
        device: Where it is computed, if that is a GPU.

    Returns:
        Top-1 accuracies, `val/knn_top1` (of several k `val/knn_top1_k10`, ...), `val/probe_top1`
        and `val/commonest` (of the answer that is always the commonest training class), and those
        of `test/`; none where there is nothing to tell apart, or to tell it of.
    """
    if device.type != "cuda":
        device = torch.device("cpu")
    parts = _labelled_parts(found, device)
    if "train" not in parts or len(parts) < 2 or len(parts["train"][1].unique()) < 2:
        return {}
    train, labels = parts.pop("train")
    commonest = labels.bincount().argmax()
    rank_zero_info(f"fitting a linear probe to {len(train):,} training images")
    probe = fit_linear_probe(train, labels, l2)
    scores: dict[str, float] = {}
    for name, (features, truth) in parts.items():
        for k in ks:
            chunks = Bar(features.split(2048), desc="kNN", delay=1.0)
            votes = torch.cat(
                [knn_scores(train, labels, chunk, k, temperature) for chunk in chunks]
            )
            key = "knn_top1" if len(ks) == 1 else f"knn_top1_k{k}"
            scores[f"{name}/{key}"] = top1(votes, truth)
        scores[f"{name}/probe_top1"] = top1(probe(features), truth)
        scores[f"{name}/commonest"] = float((truth == commonest).float().mean())
    return scores


def score_table(found: Embeddings) -> str:
    """Set the scores of the held-out parts side by side, or say why there are none."""
    if not found.scores:
        return f"no scores: {_why_no_scores(found)}"
    held_out = [part for part in HELD_OUT if f"{part}/probe_top1" in found.scores]
    names = [n.removeprefix(f"{held_out[0]}/") for n in found.scores if n.startswith(held_out[0])]
    labelled = {part: int(((found.parts == part) & (found.labels >= 0)).sum()) for part in held_out}
    train = int(((found.parts == "train") & (found.labels >= 0)).sum())
    lines = [
        f"{train:,} training images of {len(found.classes)} classes classify the others",
        f"{'top-1 accuracy':<32}" + "".join(f"{part:>10}" for part in held_out),
    ]
    for name in names:
        cells = [f"{found.scores[f'{part}/{name}']:10.3f}" for part in held_out]
        lines.append(f"{_title(name):<32}{''.join(cells)}")
    lines.append(f"{'images':<32}" + "".join(f"{labelled[part]:10,}" for part in held_out))
    return "\n".join(lines)


def _labelled_parts(found: Embeddings, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Features and labels of the parts that have any."""
    parts = {}
    for part in ("train", *HELD_OUT):
        places = np.flatnonzero((found.parts == part) & (found.labels >= 0))
        if len(places):
            pair = found.features[places], found.labels[places]
            parts[part] = tuple(torch.from_numpy(array).to(device) for array in pair)
    return cast(dict[str, tuple[Tensor, Tensor]], parts)


def _why_no_scores(found: Embeddings) -> str:
    if not len(found.classes):
        return "the images have no labels (folders right below the root, or train/, are classes)"
    if len(found.classes) == 1:
        return f"all images are of one class, {str(found.classes[0])!r}"
    return "no labelled images are held out (or none are left to learn from): see val_fraction"


def _title(name: str) -> str:
    if name.startswith("knn"):
        return "kNN" + (f", k = {name.rpartition('_k')[2]}" if "_k" in name else "")
    return SCORES[name]
