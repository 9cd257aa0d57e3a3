"""`simmim compare`: what is compared, in which order, and what is said about it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator

from simmim.base.files import read_config
from simmim.base.progress import Bar
from simmim.commands.compare.learning_curve import draw_learning_curve
from simmim.commands.compare.results_store import (
    RESULTS,
    append_result,
    key_of,
    open_folder,
    read_results,
)
from simmim.commands.compare.runs import (
    OF_THE_TRAINER,
    Arm,
    Budget,
    Recipe,
    choose_budgets,
    open_arm,
    open_data,
    read_recipe,
    train,
)
from simmim.commands.compare.significance import (
    OURS,
    PUBLIC,
    SCRATCH,
    Result,
    Validation,
    counted_steps,
    gaps,
    markdown,
    table,
    unlearned,
    verdict,
)
from simmim.commands.report import REPORT, Page, Picture, Table, Text, write_page
from simmim.data.classification import ClassificationData
from simmim.data.labels import read_labels
from simmim.data.split import group_of
from simmim.runs.folder import CONFIG, leave_run, run_of
from simmim.training.inner_runs import quiet
from simmim.weights import find_checkpoint

BUDGETS = (0.01, 0.1, 1.0)
RECIPES = {"finetune": "finetune_small", "probe": "linear_probe"}
# Epochs of a budget, and steps of the smallest: on a CPU so that the digits take minutes.
ON_CPU, ELSEWHERE = (5.0, 150), (None, 1000)
OF_THE_SPLIT = ("root", "dataset", "data_dir", "val_fraction", "split_seed", "group_pattern")
OF_THE_IMAGES = ("hflip", "percentiles", "window")  # a kind of images is so wherever they lie
SUMMARY, PLOT = "summary.md", "plot.png"


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes:
        folder: Where it lies.
        results: The runs.
        validation: The images that they were scored on.
        summary: Tables, notes and the verdict, in Markdown.
        verdict: One sentence for each mode.
    """

    folder: Path
    results: list[Result]
    validation: Validation
    summary: str
    verdict: str

    def __str__(self) -> str:
        return f"\n{self.summary}\n{self.folder}: {REPORT}, {RESULTS}, {SUMMARY}, {PLOT}"


def compare(
    weights: str,
    root: str | None = None,
    public: str | None = None,
    budgets: int | float | list[int | float] | None = None,
    seeds: int = 3,
    mode: Literal["finetune", "probe", "both"] | None = None,
    config: str | None = None,
    epochs: float | None = None,
    min_steps: int | None = None,
    batch_size: int | None = None,
    img_size: int | list[int] | None = None,
    labels: str | None = None,
    val_fraction: float | None = None,
    split_seed: int | None = None,
    group_pattern: str | None = None,
    hflip: float | None = None,
    num_workers: int | None = None,
    accelerator: str = "auto",
    precision: str | None = None,
    out: str | None = None,
    trust: bool = False,
) -> Comparison:
    """Train with few and with all labels, from these weights and from scratch: which is better?

    All arms get the same recipe, images, augmentation, head and number of steps; these weights and
    scratch the same pixel statistics, too. A seed chooses which images keep their labels, the
    initial weights and the order, alike for all arms, so that they differ seed by seed. Accuracies
    are those of the validation images after the last step: none was chosen by looking at them.

    Args:
        weights: The encoder: a run's folder or a checkpoint of ours, an official release (.pth),
            `timm:NAME`, or a Hugging Face or timm folder.
        root: Folder of labelled images; by default that of the weights' run, split as there.
        public: Other weights to compare with, such as timm:vit_small_patch16_224.augreg_in21k, with
            their own architecture and pixel statistics, and the image size of the first.
        budgets: Labels to train with: whole numbers are images of each class, numbers with a point
            are shares (1.0 = all), at least one image of each class. One, or several: 0.01 0.1 1.0
            by default.
        seeds: Number of seeds. With one there is no spread, and nothing can be shown.
        mode: finetune, probe (a linear classifier on the frozen encoder), or both; by default what
            the config does.
        config: Config of `simmim classify`, by name or file (-c); finetune_small by default, and
            for probes linear_probe.
        epochs: Epochs of each budget, unless that is fewer steps than min_steps; by default the
            recipe's, and on a CPU 5. Warm-up keeps its share.
        min_steps: Optimiser steps of a small budget at least; 1000 by default, on a CPU 150.
        batch_size: Images in a batch; by default the recipe's. The learning rate follows it.
        img_size: Height and width in pixels; by default those of the weights.
        labels: CSV file that gives the labels instead of folders, as data.labels of `classify`.
        val_fraction: Share that validates where there is no val/; by default the run's, or 0.1.
        split_seed: Which share; by default the run's, or 0.
        group_pattern: Regular expression whose first group names the patient or scene of an image,
            whose images are on one side of the split and count as one draw; by default the run's.
        hflip: Probability that a training image is mirrored; by default the run's, or 0.5.
        num_workers: Processes that read images; by default as in training.
        accelerator: cpu, gpu, ... (Lightning's).
        precision: 32-true, bf16-mixed, ... (Lightning's); by default the recipe's, on a CPU
            32-true.
        out: Folder of the results, runs/compare/version_N by default. In that of an interrupted
            comparison the runs that are complete are not trained again.
        trust: Import an encoder that the checkpoint names by its import path, which runs its code.
            (One that a module of yours registers: --imports MODULE.)

    Returns:
        What came out; it prints as tables and a verdict.

    Raises:
        ValueError: If weights, images and options do not go together.
    """
    if seeds < 1:
        raise ValueError(f"seeds {seeds} leaves nothing to run: use 3")
    data = {
        "labels": labels,
        "val_fraction": val_fraction,
        "split_seed": split_seed,
        "group_pattern": group_pattern,
        "hflip": hflip,
        "num_workers": num_workers,
        "batch_size": batch_size,
    }
    images = images_of(weights, root, {k: v for k, v in data.items() if v is not None})
    recipes = choose_recipes(
        mode,
        config,
        images,
        epochs=epochs,
        min_steps=min_steps,
        trainer={"accelerator": accelerator, "precision": precision},
    )
    arms = {
        which: open_arms(weights, public, {**recipe.model, "trust": trust}, img_size)
        for which, recipe in recipes.items()
    }
    if isinstance(budgets, int | float):
        budgets = [budgets]
    return _compare(
        arms,
        recipes,
        BUDGETS if budgets is None else budgets,
        seeds,
        out,
        {OURS: weights, PUBLIC: public},
    )


def _compare(
    arms: Mapping[str, Mapping[str, Arm]],
    recipes: Mapping[str, Recipe],
    amounts: Sequence[float],
    seeds: int,
    out: str | None,
    weights: Mapping[str, str | None],
) -> Comparison:
    """Train what the folder does not have yet, and sum up."""
    mode, recipe = next(iter(recipes.items()))
    whole = open_data(recipe, arms[mode][OURS], None, 0)
    _check_labels(str(weights[OURS]), whole)
    validation = validation_of(whole)
    budgets = choose_budgets(amounts, whole.class_counts)
    settings: dict[str, Any] = {mode: asdict(recipe) for mode, recipe in recipes.items()}
    for mode in recipes:
        settings[f"{mode} arms"] = {
            name: {"weights": weights[name], "tensors": _hash(arm)}
            for name, arm in arms[mode].items()
            if arm.tensors is not None
        }
    folder = open_folder(out, settings)
    try:
        done = read_results(folder, len(validation.labels))
        print("\n".join(_introduction(folder, whole, arms, recipes, budgets)))
        _train_all(folder, arms, recipes, budgets, seeds, done)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt(f"go on with the same options and --out {folder}") from None
    finally:
        leave_run(folder, failed=False)
    images = {budget.images for budget in budgets}
    results = [
        result
        for result in done.values()
        if result.images in images
        and result.seed < seeds
        and result.mode in recipes
        and result.arm in arms[result.mode]
    ]
    return sum_up(folder, results, validation, {b.images: str(b) for b in budgets})


def _train_all(
    folder: Path,
    arms: Mapping[str, Mapping[str, Arm]],
    recipes: Mapping[str, Recipe],
    budgets: Sequence[Budget],
    seeds: int,
    done: dict[tuple[str, str, int, int], Result],
) -> None:
    """Seed by seed, so that what is there when somebody stops it can be compared."""
    cells = [
        (mode, name, budget, seed)
        for seed in range(seeds)
        for budget in budgets
        for mode in recipes
        for name in arms[mode]
    ]
    todo = [c for c in cells if (c[0], c[1], c[2].images, c[3]) not in done]
    if len(todo) < len(cells):
        print(f"{len(cells) - len(todo)} of {len(cells)} runs are done")
    steps = sum(recipes[mode].steps(budget.images) for mode, _, budget, _ in todo)
    with Bar(total=steps, unit="step", disable=not todo, dynamic_ncols=True) as bar:
        for i, (mode, name, budget, seed) in enumerate(todo, 1):
            which = f"{mode}, " if len(recipes) > 1 else ""
            bar.set_description(
                f"Run {i}/{len(todo)}: {which}{name}, {budget.images:,} labels, seed {seed}"
            )
            result = train(
                recipes[mode], arms[mode][name], budget, seed, mode=mode, name=name, bar=bar
            )
            append_result(folder, result)
            done[key_of(result)] = result


# What is compared --------------------------------------------------------------------------------


def images_of(weights: str, root: str | None, said: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the data: as they are said, or else as the run of the weights had them.

    Args:
        weights: The encoder.
        root: The folder; None: that of the run, with its split.
        said: The user's options.

    Raises:
        ValueError: If nobody says where the images are; if labels are several to an image.
    """
    if "labels" in said:
        several = int((read_labels(said["labels"], several=True).table.counts != 1).sum())
        if several:
            raise ValueError(
                f"labels {said['labels']}: {several} images have none or several labels, and "
                "compare is for one class an image"
            )
    run = _run_of(weights)
    kept = (read_config(run / CONFIG).get("data") or {}) if run else {}
    if root is None and not (kept.get("root") or kept.get("dataset")):
        raise ValueError(
            f"no images: give root, a folder of labelled ones; {weights} lies in no run that says "
            "where its own are"
        )
    same = root is None or _same_folder(root, _root_of(kept))
    names = (*OF_THE_SPLIT, *OF_THE_IMAGES) if same else OF_THE_IMAGES
    inherited = {name: kept[name] for name in names if kept.get(name) is not None}
    where = {} if root is None else {"root": root}
    return {**inherited, **where, **said}


def choose_recipes(
    mode: str | None,
    config: str | None,
    images: Mapping[str, Any],
    *,
    epochs: float | None,
    min_steps: int | None,
    trainer: Mapping[str, Any],
) -> dict[str, Recipe]:
    """A recipe for each mode.

    Args:
        mode: finetune, probe or both; None: what the config does.
        config: A name or a file; None: the mode's own.
        images: Options of the data that overrule the recipe's.
        epochs: Of each budget; None: by the device.
        min_steps: At least; None: by the device.
        trainer: accelerator, and precision or None.

    Raises:
        ValueError: If mode and config contradict each other, or a length is none.
    """
    if mode == "both" and config is not None:
        raise ValueError(f"mode both has a recipe for each: leave config {config} out, or the mode")
    if config is None:
        names = dict(RECIPES) if mode == "both" else {m: RECIPES[m] for m in [mode or "finetune"]}
    else:
        does = "probe" if read_recipe(config)["model"].get("frozen") else "finetune"
        if mode not in (None, does):
            raise ValueError(f"config {config} is to {does}, not to {mode}: leave one of them out")
        names = {does: config}
    for name, value in {"epochs": epochs, "min_steps": min_steps}.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} {value} trains nothing: use a number above 0")
    on_cpu = _on_cpu(trainer["accelerator"], trainer["precision"])
    usual = ON_CPU if on_cpu else ELSEWHERE
    found = {}
    for which, name in names.items():
        groups = read_recipe(name)
        length = float(groups["trainer"].get("max_epochs") or 100)
        published = None if on_cpu else groups["trainer"].get("precision")
        found[which] = Recipe(
            model={**groups["model"], "frozen": which == "probe"},
            data={**groups["data"], **images},
            trainer={
                **{k: v for k, v in groups["trainer"].items() if k in OF_THE_TRAINER},
                "accelerator": trainer["accelerator"],
                "precision": trainer["precision"] or published or "32-true",
            },
            length=length,
            epochs=epochs or usual[0] or length,
            min_steps=min_steps or usual[1],
        )
    return found


def open_arms(
    weights: str, public: str | None, model: Mapping[str, Any], img_size: int | list[int] | None
) -> dict[str, Arm]:
    """The arms by name, in the order in which they are shown.

    Args:
        weights: The encoder.
        public: Other weights.
        model: The recipe's options of Classifier.
        img_size: Of the images; None: the recipe's, or the weights'.
    """
    sized = {**model, **({} if img_size is None else {"img_size": img_size})}
    ours = open_arm(weights, sized)
    arms = {SCRATCH: ours.from_scratch(), OURS: ours}
    if public is not None:
        sizes = {name: ours.encoder[name] for name in ("img_size", "in_chans")}
        options = {k: v for k, v in model.items() if k != "encoder_kwargs"}  # of the other's
        arms[PUBLIC] = open_arm(public, {**options, **sizes})
    return arms


def validation_of(data: ClassificationData) -> Validation:
    """The images that all runs are scored on."""
    images = data.sets["validation"]
    assert images.labels is not None
    groups = np.arange(len(images))
    if data.group_pattern:
        names = [group_of(images.name(i), data.group_pattern) for i in range(len(images))]
        groups = np.unique(names, return_inverse=True)[1]
    return Validation(images.labels.numpy(), groups)


def _check_labels(weights: str, data: ClassificationData) -> None:
    """Refuse one class, and a classifier that was trained with the labels that are to be few."""
    if len(data.classes) < 2:
        raise ValueError(
            f"{data.root} has one class, {data.classes[0]!r}: give a folder with two or more"
        )
    run = _run_of(weights)
    config = read_config(run / CONFIG) if run else {}
    supervised = "label_smoothing" in (config.get("model") or {})
    if supervised and _same_folder(data.root, _root_of(config.get("data") or {})):
        raise ValueError(
            f"{weights} is a classifier that was trained with the labels of {data.root}: give the "
            "pretraining run that it began from"
        )


def _run_of(weights: str) -> Path | None:
    """The run that a checkpoint of ours lies in."""
    if weights.startswith("timm:") or (Path(weights).expanduser() / "config.json").is_file():
        return None
    return run_of(find_checkpoint(weights))


def _root_of(data: Mapping[str, Any]) -> str | None:
    if data.get("root"):
        return str(data["root"])
    return os.path.join(data["data_dir"], data["dataset"]) if data.get("dataset") else None


def _same_folder(one: str, other: str | None) -> bool:
    paths = (os.path.realpath(os.path.expanduser(path)) for path in (one, other or ""))
    return other is not None and len(set(paths)) == 1


def _on_cpu(accelerator: str, precision: str | None) -> bool:
    """Whether Lightning chooses the CPU; what it does not know is refused before anything else."""
    try:
        with quiet():
            trainer = L.Trainer(
                accelerator=accelerator,
                precision=cast(Any, precision),
                logger=False,
                enable_checkpointing=False,
            )
    except (ValueError, MisconfigurationException) as error:
        raise ValueError(
            f"--accelerator {accelerator} with --precision {precision or '32-true'} cannot be used "
            f"here, leave them out: {error}"
        ) from error
    return isinstance(trainer.accelerator, CPUAccelerator)


def _hash(arm: Arm) -> str:
    """Of the weights, so that a run that went on meanwhile is not taken for what it was."""
    digest = sha256()
    for name, tensor in sorted((arm.tensors or {}).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


# What is said ------------------------------------------------------------------------------------


def sum_up(
    folder: Path, results: Sequence[Result], validation: Validation, words: Mapping[int, str]
) -> Comparison:
    """Write tables, picture and verdict into the folder.

    Args:
        folder: Of the comparison.
        results: Its runs.
        validation: What they were scored on.
        words: Each budget in words, by its number of images.
    """
    balanced = validation.imbalanced
    modes = list(dict.fromkeys(result.mode for result in results))
    tables: dict[str, list[dict[str, str]]] = {}
    parts, notes, sentences = [], [], []
    for mode in modes:
        runs = [result for result in results if result.mode == mode]
        for equal in (False, True) if balanced else (False,):
            metric = "Balanced accuracy" if equal else "Top-1 accuracy"
            heading = f"{metric} in percent, {mode}"
            tables[heading] = table(runs, validation, words=words.__getitem__, balanced=equal)
            parts.append(f"{heading}:\n\n{markdown(tables[heading])}")
        said = unlearned(runs, words.__getitem__)
        parts += said
        notes += said
        found = conclude(runs, validation, words, balanced)
        sentences.append(f"{mode}: {found}" if len(modes) > 1 else found)
    verdict = "\n".join(sentences)
    summary = "\n\n".join([*parts, verdict]) + "\n"
    (folder / SUMMARY).write_text(summary, encoding="utf-8")
    draw_learning_curve(results, validation, folder / PLOT, balanced=balanced)
    write_page(_page(verdict, folder / PLOT, tables, notes), folder / REPORT)
    return Comparison(folder, list(results), validation, summary, verdict)


def _page(
    verdict: str, plot: Path, tables: Mapping[str, list[dict[str, str]]], notes: Sequence[str]
) -> Page:
    return Page(
        "Was pretraining worth it?",
        verdict,
        [
            ("Accuracy over the number of labels", [Picture(plot)]),
            *(
                (heading, [Table(list(rows[0]), [list(row.values()) for row in rows])])
                for heading, rows in tables.items()
            ),
            *([("To keep in mind", [Text("\n\n".join(notes))])] if notes else []),
        ],
    )


def conclude(
    runs: Sequence[Result], validation: Validation, words: Mapping[int, str], balanced: bool
) -> str:
    """The verdict on these weights against scratch, and against public ones where there are any."""
    found = gaps(runs, validation, (OURS, SCRATCH), words=words.__getitem__, balanced=balanced)
    said = verdict(found)
    if any(run.arm == PUBLIC for run in runs):
        found = gaps(runs, validation, (OURS, PUBLIC), words=words.__getitem__, balanced=balanced)
        said += (
            f" And better than the public weights? {verdict(found, second='of the public ones')}"
        )
    return said


def _introduction(
    folder: Path,
    data: ClassificationData,
    arms: Mapping[str, Mapping[str, Arm]],
    recipes: Mapping[str, Recipe],
    budgets: Sequence[Budget],
) -> list[str]:
    scored = len(data.sets["validation"])
    lines = [
        f"{data.root}: {data.num_train:,} training and {scored:,} validation images of "
        f"{len(data.classes)} classes; results go to {folder}"
    ]
    for name, arm in next(iter(arms.values())).items():
        other = arm.encoder["encoder"] != next(iter(arms.values()))[OURS].encoder["encoder"]
        lines.append(f"{name}: {arm.origin}{'; another architecture' if other else ''}")
    for mode, recipe in recipes.items():
        steps = "; ".join(f"{counted_steps(recipe.steps(b.images))} with {b}" for b in budgets)
        lines.append(f"{mode}: {steps}")
    return lines
