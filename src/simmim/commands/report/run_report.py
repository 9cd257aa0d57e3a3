"""The report of a run, from what lies in its folder."""

import csv
import fnmatch
import math
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from simmim.commands.report.page import (
    Curve,
    Curves,
    Flow,
    Page,
    Part,
    Picture,
    Table,
    Text,
    write_page,
)
from simmim.evaluation.metrics import less_is_better
from simmim.runs.checkpoints import CHECKPOINTS, LAST
from simmim.runs.folder import CONFIG

REPORT = "report.html"
ROWS = 100  # of a table; a longer one stays in its file
PANELS = 12  # pictures of a series; of more, as many are taken evenly
PACKAGES = ("simmim", "torch", "torchvision", "lightning", "timm", "torchmetrics", "numpy")

# What a diagram shows together. What none of them names gets one of its own.
TOGETHER = {
    "loss": ("train/loss", "val/loss"),
    "top-1 accuracy on frozen features": ("val/knn_top1", "val/probe_top1"),
    "accuracy": ("val/top1", "val/top5", "val/top1_balanced"),
    "accuracy of each class": ("val/top1_class/*",),
    "segmentation": ("val/miou", "val/pixel_accuracy", "val/class_accuracy"),
    "IoU of each class": ("val/iou/*",),
    "mean average precision": ("val/map", "val/map_50", "val/map_75"),
    "mean average precision by size": ("val/map_small", "val/map_medium", "val/map_large"),
    "average precision of each class": ("val/map_class/*",),
    "parts of the training loss": ("train/loss_*",),
    "learning rate": ("lr",),
    "norm of the gradient, before clipping": ("train/grad_norm",),
    "norm of the encoder's gradient alone": ("collapse/encoder_grad_norm",),
    "images per second": ("throughput/images_per_s",),
    "share of the time spent waiting for data": ("throughput/data_wait",),
    "memory held at most, GiB": ("memory/max_gib",),
    "features: effective rank": ("collapse/effective_rank",),
    "features: variance between images": ("collapse/feature_variance",),
    "loss as a multiple of predicting the mean": ("collapse/loss_over_mean",),
    "attention: entropy by layer (1: on all alike)": ("attention/entropy_*",),
    "attention: distance by layer, pixels": ("attention/distance_*",),
}
# Pictures that say most come first; the others below the curves. What is not named comes last.
FIRST = {
    "reconstructions": "Reconstructions",
    "segmentations": "Segmentations",
    "detections": "Detections",
    "confusion_matrix": "Confusion matrix",
    "val_predictions": "Predictions",
}
LATER = {"worst": "Reconstructed worst"}
IN_SHORT = ("val/loss", "val/knn_top1", "val/probe_top1", "val/top1", "val/miou", "val/map")

Rows = Mapping[str, tuple[list[float], list[float]]]  # metric -> steps, values


def report_run(folder: Path, ended: str = "") -> Path:
    """Write `report.html` into a run's folder: curves, pictures, results, config, how to go on.

    Args:
        folder: Of a run of any task, finished or not.
        ended: A sentence on why it ended before its time, if it did.

    Returns:
        The file.
    """
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    metrics = read_metrics(folder / "metrics.csv")
    sections: list[tuple[str, Sequence[Part]]] = []
    if results := best_and_last(metrics):
        columns = ["metric", "first", "best", "at step", "last"]
        sections.append(("Results", [Table(columns, results)]))
    pictures: dict[str, list[Part]] = {t: [Flow(p)] for t, p in series_of(folder).items()}
    for title, name in {
        "Reconstructed worst": "worst.csv",
        "Confusion matrix": "classes.csv",
    }.items():
        if title in pictures and (table := _table(folder / name)):
            pictures[title].append(table)
    sections += [(title, pictures.pop(title)) for title in FIRST.values() if title in pictures]
    if diagrams := choose_diagrams(metrics):
        shown = [name for name in metrics if not name.startswith(("best/", "val/", "epoch"))]
        same = [
            f"{name} {_number(metrics[name][1][0])}"
            for name in shown
            if len(metrics[name][1]) > 1 and _is_constant(metrics[name][1])
        ]
        said = [Text(f"Always the same: {', '.join(same)}.")] if same else []
        sections.append(("Curves", [Curves(diagrams), *said]))
    sections += pictures.items()
    sections.append(("Go on", [Text(commands(folder, config), verbatim=True)]))
    sections.append(
        (
            "How it was made",
            [
                Table(["", ""], list(environment().items())),
                Text(yaml.safe_dump(config, sort_keys=False), verbatim=True, folded=CONFIG),
            ],
        )
    )
    name = f"{folder.parent.name}/{folder.name}"
    lead = f"{ended}\n{_lead(metrics)}" if ended else _lead(metrics)
    return write_page(Page(name, lead, sections), folder / REPORT)


def read_metrics(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Read a metrics file: for each metric the steps at which it was logged, and its values."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    if not path.exists():
        return found
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = float(row.pop("step"))
            for name, text in row.items():
                if name is None or not text or not math.isfinite(float(text)):
                    continue
                steps, values = found.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(text))
    return found


def best_and_last(metrics: Rows) -> list[tuple[str, float, float, int, float]]:
    """For each validation metric: its first, best and last value, and the step of the best."""
    rows = []
    for name, (steps, values) in metrics.items():
        if not name.startswith("val/") or name == "val/avg_dist":
            continue
        if name.count("/") > 1:  # of a class: there may be thousands, and they have a diagram
            continue
        choose = min if less_is_better(name) else max
        best = choose(range(len(values)), key=values.__getitem__)
        rows.append((name, values[0], values[best], int(steps[best]), values[-1]))
    return sorted(rows, key=lambda row: row[0] not in IN_SHORT)


def choose_diagrams(metrics: Rows) -> list[tuple[str, list[Curve]]]:
    """Group the metrics into diagrams; those that never change have none.

    Nor have the best scores so far: they repeat the curves, and stand in the table of results.
    """
    left = {
        name: series
        for name, series in metrics.items()
        if name != "epoch" and not name.startswith("best/")
    }
    diagrams = []
    for title, patterns in TOGETHER.items():
        chosen = [
            Curve(_short_name(name, pattern), *left.pop(name))
            for pattern in patterns
            for name in sorted(fnmatch.filter(left, pattern), key=_by_number)
        ]
        diagrams.append((title, chosen))
    diagrams += [(name, [Curve(name, *series)]) for name, series in sorted(left.items())]
    return [(t, curves) for t, curves in diagrams if not all(_is_constant(c.y) for c in curves)]


def series_of(folder: Path) -> dict[str, list[Picture]]:
    """The pictures that were drawn while it trained: by what they show, in the order of epochs."""
    found = {}
    for below in sorted(path for path in folder.iterdir() if path.is_dir()):
        paths = sorted(below.glob("epoch_*.png"))
        if not paths:
            continue
        last = len(paths) - 1
        chosen = sorted({round(i * last / max(PANELS - 1, 1)) for i in range(PANELS)})
        found[below.name] = [
            Picture(paths[i], _when(int(paths[i].stem.removeprefix("epoch_")))) for i in chosen
        ]
    for path in sorted(folder.glob("*.png")):
        found[path.stem] = [Picture(path, f"{path.name}, of the last evaluation")]
    titles = {**FIRST, **LATER}
    known = [name for name in titles if name in found]
    others = [name for name in found if name not in titles]
    title = {name: name.replace("_", " ").capitalize() for name in others} | titles
    return {title[name]: found[name] for name in (*known, *others)}


def environment() -> dict[str, str]:
    """The machine and the packages, as a run's figures depend on them."""
    device = f"{os.cpu_count()} cores of {_processor()}"
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    found = {
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "device": device,
        "system": platform.platform(),
        "Python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from its sources
            continue
    return found


def _table(path: Path) -> Table | None:
    """A table that the run has left, if it is there and short enough to be read."""
    with suppress(OSError), path.open(newline="", encoding="utf-8", errors="replace") as file:
        header, *rows = csv.reader(file)
        return Table(header, rows) if len(rows) <= ROWS else None
    return None


def _processor() -> str:
    """The processor's name, where the system says it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commands(folder: Path, config: Mapping[str, Any]) -> str:
    """What can be done with the run now, as commands to copy."""
    run = shlex.quote(str(folder))
    root = (config.get("data") or {}).get("root")
    images = shlex.quote(str(root)) if root else "DIR"
    task, name = task_of(config), shlex.quote(folder.parent.name)
    where = str(config.get("run_dir") or "runs")
    beside = f" --run_dir {shlex.quote(where)}" if where != "runs" else ""
    lines = [
        f"simmim {task} fit --name {name}{beside} --ckpt_path last    # go on",
        f"simmim {task} predict --ckpt_path {run} --data.root {images}",
    ]
    if not (folder / CHECKPOINTS / LAST).exists():
        lines = ["# no checkpoint yet: begin again"]
    elif task == "pretrain":
        lines += [
            f"simmim embed --weights {run} --root {images} --out features.npz",
            f"simmim classify fit --model.weights {run} --data.root {images}",
            f"simmim compare --weights {run}    # was it worth it?",
            f"simmim export --weights {run} --out encoder",
        ]
    return "\n".join(lines)


def task_of(config: Mapping[str, Any]) -> str:
    """Which command a run's config belongs to: each has callbacks of its own."""
    for task, key in {
        "pretrain": "reconstructions",
        "segment": "segmentations",
        "detect": "detections",
    }.items():
        if key in config:
            return task
    return "classify"


def _is_constant(values: Sequence[float]) -> bool:
    return len(set(values)) == 1


def _short_name(name: str, pattern: str) -> str:
    """What of a name the title of its diagram does not say: what the star stands for."""
    before, star, after = pattern.partition("*")
    return name.removeprefix(before).removesuffix(after) if star else name


def _when(epochs: int) -> str:
    """How long the model of a picture has trained."""
    return f"after {_counted(epochs, 'epoch')}" if epochs else "before training"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _by_number(name: str) -> tuple[str, int]:
    """Layer 10 comes after layer 9."""
    text = name.rstrip("0123456789")
    return text, int(name[len(text) :] or 0)


def _lead(metrics: Rows) -> str:
    if not metrics:
        return "Nothing has been logged yet."
    last = max(steps[-1] for steps, _ in metrics.values())
    epochs = int(metrics["epoch"][1][-1]) + 1 if "epoch" in metrics else None
    length = _counted(int(last) + 1, "step") + (f", {_counted(epochs, 'epoch')}" if epochs else "")
    said = [f"{name} {_number(metrics[name][1][-1])}" for name in IN_SHORT if name in metrics]
    alarm = metrics.get("collapse/alarm")
    warning = " It has collapsed: see the curves." if alarm and alarm[1][-1] else ""
    return f"{length}. At the end: {', '.join(said) or 'no validation'}.{warning}"


def _number(value: float) -> str:
    return f"{value:.4g}"
