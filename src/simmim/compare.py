"""Was pretraining worth it? The encoder against the same one from scratch, at several budgets."""

import csv
import hashlib
import logging
import os
import time
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import lightning as L
import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.cli import LightningArgumentParser

from simmim.classify import Classifier
from simmim.configuration import differences, find_config, read_config
from simmim.data.classification import ClassificationData, read_labels
from simmim.data.split import group_of
from simmim.evidence import (
    OURS,
    PUBLIC,
    SCRATCH,
    Result,
    Validation,
    gaps,
    markdown,
    table,
    unlearned,
    verdict,
)
from simmim.learning_curve import draw_learning_curve
from simmim.mistakes import word_usage_error
from simmim.readout import init_head_
from simmim.run import CONFIG, leave_run, new_run, run_of
from simmim.transfer import _our_checkpoint
from simmim.weights import find_checkpoint

T = TypeVar("T", Classifier, ClassificationData)
Mode = Literal["finetune", "probe"]
RECIPES: dict[Mode, str] = {"finetune": "finetune_small", "probe": "linear_probe"}
# Of a whole budget, and the fewest steps of a small one. On a CPU minutes count, and the digits
# learn quickly; elsewhere None is the recipe's own length.
CPU_LENGTH, LENGTH = (6.0, 150), (None, 1000)
OF_THE_RUN = ("root", "dataset", "data_dir", "val_fraction", "split_seed", "group_pattern")
OF_THE_IMAGES = ("hflip", "percentiles", "window")  # of a kind of images, wherever they lie
OF_THE_TRAINER = ("gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches")
RESULTS, HITS, SUMMARY, PLOT = "results.csv", "correct", "summary.md", "plot.png"
SHOWN = 1000  # training images that an arm is asked about when it has learned


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes:
        folder: Where it lies.
        results: The runs.
        validation: The images that they were scored on.
        summary: Table, sentence and notes, in Markdown.
        verdict: The sentence; of several modes one each.
    """

    folder: Path
    results: list[Result]
    validation: Validation
    summary: str
    verdict: str

    def __str__(self) -> str:
        return f"{self.summary}\n{self.folder}: {RESULTS}, {SUMMARY}, {PLOT}"


def compare(
    weights: str,
    root: str | None = None,
    public: str | None = None,
    budgets: list[int | float] | None = None,
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
) -> Comparison:
    """Train with few and with all labels, from these weights and from scratch, and say which won.

    All arms get the same recipe, images, augmentation, pixel statistics, head and number of steps.
    A seed chooses which images keep their label, the initial weights and the order, for all arms
    alike, so that the difference is taken seed by seed. Accuracies are those after the last step on
    the validation images: nothing was chosen by looking at them.

    Args:
        weights: The encoder: a run's folder or a checkpoint of ours, an official release (.pth),
            `timm:NAME`, or a Hugging Face or timm folder.
        root: Folder of labelled images; by default that of the weights' run, with its split.
        public: Other weights to compare with, such as timm:vit_small_patch16_224.augreg_in21k. Their
            architecture can be another one, and their pixel statistics are their own.
        budgets: Labels to train with: whole numbers are images of each class, numbers with a point
            are shares (1.0 = all), of each class at least one image. By default
            [0.01, 0.1, 1.0].
        seeds: Number of seeds. With one there is no spread, and nothing is shown.
        mode: finetune, probe (a linear classifier of the frozen encoder), or both; by default what
            the config does.
        config: Config of `simmim classify`, by name or file (-c). By default finetune_small, and
            linear_probe for probes.
        epochs: Epochs with all labels; a smaller budget gets as many of its own, and no fewer
            steps than min_steps. By default the recipe's, on a CPU 6.
        min_steps: Steps that the smallest budget trains at least. By default 1000, on a CPU 150.
        batch_size: Images in a batch; by default the recipe's. The learning rate follows.
        img_size: Height and width in pixels; by default those of the weights.
        labels: CSV file that gives the labels instead of folders, as data.labels of `classify`.
        val_fraction: Share that validates where there is no val/; by default the run's, or 0.1.
        split_seed: Which share; by default the run's, or 0.
        group_pattern: Regular expression whose first group names the patient or scene of an image;
            by default the run's. Images of one group count as one draw.
        hflip: Probability that a training image is mirrored; by default the run's, or 0.5.
        num_workers: Processes that read images; by default as in training.
        accelerator: cpu, gpu, ... (Lightning's).
        precision: 32-true, bf16-mixed, ... (Lightning's); by default the recipe's, on a CPU 32-true.
        out: Folder of the results; by default runs/compare/version_N. That of an interrupted
            comparison goes on where it stopped.

    Returns:
        What came out; it prints as a table with a verdict.

    Raises:
        ValueError: If weights, images and options do not go together.
    """
    if seeds < 1:
        raise ValueError(f"seeds {seeds} leaves nothing to run: use 3")
    if labels is not None:
        _check_labels(labels)
    on_cpu = _on_cpu(accelerator)
    said = {
        "labels": labels,
        "val_fraction": val_fraction,
        "split_seed": split_seed,
        "group_pattern": group_pattern,
        "hflip": hflip,
        "num_workers": num_workers,
        "batch_size": batch_size,
        "root": root,
    }
    data = _data_options(weights, {k: v for k, v in said.items() if v is not None})
    length = CPU_LENGTH if on_cpu else LENGTH
    plans = {
        which: Plan.read(
            which,
            config,
            weights={SCRATCH: None, OURS: weights, **({PUBLIC: public} if public else {})},
            data=data,
            img_size=img_size,
            epochs=epochs or length[0],
            min_steps=min_steps if min_steps is not None else length[1],
            trainer={"accelerator": accelerator, "precision": precision or _precision(on_cpu)},
        )
        for which in _modes(mode, config)
    }
    return _run(plans, budgets or [0.01, 0.1, 1.0], seeds, out)


def _run(
    plans: Mapping[Mode, "Plan"], asked: Sequence[float], seeds: int, out: str | None
) -> Comparison:
    """Train what is not yet in the folder, and sum up."""
    first = next(iter(plans.values()))
    with _quiet():
        whole = first.open_data(None, 0)
        validation = _validation(whole)
        budgets = choose_budgets(asked, whole.class_counts)
        first.check(whole)
    settings = {name: plan.settings() for name, plan in plans.items()}
    folder = _open_folder(out, settings)
    done = _read_results(folder, len(validation.labels))
    todo = [
        (plan, arm, budget, seed)
        for seed in range(seeds)
        for budget in budgets
        for plan in plans.values()
        for arm in plan.weights
        if (plan.mode, arm, budget.images, seed) not in done
    ]
    for line in _announce(plans, budgets, whole, todo, done):
        print(line)
    steps = sum(plan.steps(budget) for plan, _, budget, _ in todo)
    bar = Tqdm(total=steps, unit="step", disable=not todo, dynamic_ncols=True)
    try:
        for i, (plan, arm, budget, seed) in enumerate(todo, 1):
            bar.set_description(
                f"run {i}/{len(todo)}: {arm}, {budget.images:,} labels, seed {seed}"
            )
            with _quiet():
                result = plan.train(arm, budget, seed, bar)
            done[result.mode, arm, budget.images, seed] = result
            _append(folder, result)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt(f"go on with the same options and --out {folder}") from None
    finally:
        bar.close()
        leave_run(folder if out is None else None, failed=False)
    kept = {b.images for b in budgets}
    results = [r for r in done.values() if r.images in kept and r.seed < seeds and r.mode in plans]
    return _sum_up(folder, results, validation, budgets, plans)


# What is trained ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """Some of the labels.

    Attributes:
        asked: As `data.labels_per_class` takes it; None: all.
        images: Training images with a label.
        share: Of all.
        least: Images of the smallest class.
        most: Of the largest.
    """

    asked: float | None
    images: int
    share: float
    least: int
    most: int

    def __str__(self) -> str:
        each = f"{self.least:,}" if self.least == self.most else f"{self.least:,} to {self.most:,}"
        percent = f"{100 * self.share:.2g}" if self.share < 0.1 else f"{100 * self.share:.0f}"
        return f"{self.images:,} labels ({percent} %, {each} a class)"


def choose_budgets(asked: Sequence[float], class_counts: Sequence[int]) -> list[Budget]:
    """Count what budgets come to; those that come to the same are one.

    Args:
        asked: Whole numbers are images of each class; others shares, 1.0 = all.
        class_counts: Training images of each class.

    Raises:
        ValueError: If a class has fewer images, or a number is no budget.
    """
    counts = [n for n in class_counts if n]
    found: dict[int, Budget] = {}
    for amount in asked:
        if not amount > 0 or (isinstance(amount, float) and amount > 1):
            raise ValueError(
                f"budget {amount} is neither a share nor a number of images a class: use 0.1 for a "
                "tenth, 1.0 for all, 10 for ten of each class"
            )
        if isinstance(amount, int) and amount > min(counts):
            raise ValueError(
                f"budget {amount} is more than the {min(counts)} training images of the smallest "
                f"class: use {min(counts)} or fewer, or a share such as 0.5"
            )
        each = [amount if isinstance(amount, int) else max(round(amount * n), 1) for n in counts]
        share = sum(each) / sum(counts)
        budget = Budget(
            None if amount == 1.0 and isinstance(amount, float) else amount,
            sum(each),
            share,
            min(each),
            max(each),
        )
        found.setdefault(budget.images, budget)
    return [found[images] for images in sorted(found)]


@dataclass(frozen=True)
class Plan:
    """How every run of a mode is trained; the arm, the budget and the seed come on top.

    Attributes:
        mode: finetune or probe.
        recipe: Options of Classifier, ClassificationData and Trainer, as in a config.
        weights: Of each arm.
        encoder: What the arm from scratch is: Classifier's options.
        statistics: Pixel statistics of our weights, where they are known.
        origins: What became of the tensors of each arm's weights.
        epochs: Of a budget.
        min_steps: At least.
    """

    mode: Mode
    recipe: dict[str, Any]
    weights: dict[str, str | None]
    encoder: dict[str, Any]
    statistics: tuple[list[float], list[float]] | None
    origins: dict[str, str]
    epochs: float
    min_steps: int

    @classmethod
    def read(
        cls,
        mode: Mode,
        config: str | None,
        *,
        weights: dict[str, str | None],
        data: Mapping[str, Any],
        img_size: Any,
        epochs: float | None,
        min_steps: int,
        trainer: Mapping[str, Any],
    ) -> "Plan":
        """Lay the recipe and the options over each other, and look at the weights."""
        recipe = _read_recipe(config or RECIPES[mode])
        recipe["data"] = {**recipe["data"], **data}
        whole = epochs or float(recipe["trainer"].get("max_epochs") or 100)
        recipe["length"] = float(recipe["trainer"].get("max_epochs") or 100)
        kept = {k: v for k, v in recipe["trainer"].items() if k in OF_THE_TRAINER}
        said = recipe["trainer"].get("precision")
        recipe["trainer"] = {
            **kept,
            **trainer,
            "precision": trainer["precision"] or said or "32-true",
        }
        recipe["model"] |= {"frozen": mode == "probe"}
        if img_size is not None:
            recipe["model"]["img_size"] = img_size
        with _quiet():
            ours = _make(Classifier, {**recipe["model"], "weights": weights[OURS]})
            hp = ours.hparams
            names = ("encoder", "img_size", "in_chans", "encoder_kwargs")
            origins = {SCRATCH: f"{hp['encoder']}, new weights", OURS: str(ours.origin)}
            if PUBLIC in weights:
                sizes = {"img_size": hp["img_size"], "in_chans": hp["in_chans"]}
                options = {**recipe["model"], **sizes, "weights": weights[PUBLIC]}
                options.pop("encoder_kwargs", None)  # another architecture has others
                public = _make(Classifier, options)
                origins[PUBLIC] = f"{public.hparams['encoder']}: {public.origin}"
                if public.hparams["encoder"] != hp["encoder"]:
                    origins[PUBLIC] += f"; another architecture than {hp['encoder']}"
        statistics = None
        if ours.has_statistics:
            statistics = ours.mean.flatten().tolist(), ours.std.flatten().tolist()
        encoder = {name: hp[name] for name in names}
        return cls(mode, recipe, weights, encoder, statistics, origins, whole, min_steps)

    def settings(self) -> dict[str, Any]:
        """What another run of the same comparison must agree with, as plain values."""
        return {
            "weights": self.weights[OURS],
            "public": self.weights.get(PUBLIC),
            "content": {arm: _fingerprint(w) for arm, w in self.weights.items() if w},
            "epochs": self.epochs,
            "min_steps": self.min_steps,
            **self.recipe,
        }

    def steps(self, budget: Budget) -> int:
        """Optimiser steps, of every arm alike."""
        batch = int(self.recipe["data"].get("batch_size", 128))
        per_epoch = max(budget.images // batch, 1)
        accumulate = int(self.recipe["trainer"].get("accumulate_grad_batches", 1))
        return max(round(self.epochs * max(per_epoch // accumulate, 1)), self.min_steps)

    def open_data(self, asked: float | None, seed: int) -> ClassificationData:
        """The images, with so many labels."""
        options = {
            **self.recipe["data"],
            "img_size": self.encoder["img_size"],
            "in_chans": self.encoder["in_chans"],
            "labels_per_class": asked,
            "seed": seed,
        }
        data = _make(ClassificationData, options)
        data.setup("fit")
        return data

    def open_model(self, arm: str, data: ClassificationData, seed: int, steps: int) -> Classifier:
        """The classifier of an arm, ready to be trained: the same head and schedule in all."""
        per_epoch = data.batches_per_epoch()
        per_epoch //= min(int(self.recipe["trainer"].get("accumulate_grad_batches", 1)), per_epoch)
        # The recipe's warm-up and milestones, as shares of its length.
        stretch = steps / max(per_epoch, 1) / self.recipe["length"]
        options = {**self.recipe["model"], "seed": seed, "weights": self.weights[arm]}
        options["warmup_epochs"] = options.get("warmup_epochs", 20) * stretch
        if options.get("milestones"):
            options["milestones"] = [round(epoch * stretch) for epoch in options["milestones"]]
        sizes = {name: self.encoder[name] for name in ("img_size", "in_chans")}
        if arm == PUBLIC:
            options.pop("encoder_kwargs", None)
        options |= self.encoder if arm == SCRATCH else sizes
        torch.manual_seed(seed)
        model = _make(Classifier, options)
        if self.statistics and arm != PUBLIC:
            model.set_statistics(*self.statistics)
            model.has_statistics = True
        model.set_classes(data.classes, may_renew=True)
        if not model.own_head:  # timm's, which may have come with the weights
            torch.manual_seed(seed)
            init_head_(model.model.get_classifier(), model.hparams["head_init_scale"])
        return model

    def train(self, arm: str, budget: Budget, seed: int, bar: Any) -> Result:
        """Train one arm on one budget, and ask it about the validation images."""
        data, steps = self.open_data(budget.asked, seed), self.steps(budget)
        model = self.open_model(arm, data, seed, steps)
        hits = Hits()
        trainer = L.Trainer(
            **self.recipe["trainer"],
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,  # nothing is chosen by looking at them
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[Advance(bar), hits],
        )
        began = time.perf_counter()
        trainer.fit(model, datamodule=data)
        seconds = time.perf_counter() - began
        trainer.predict(model, data.val_dataloader(), return_predictions=False)
        correct, labels = hits.take()
        trainer.predict(model, data.probe_dataloader(SHOWN), return_predictions=False)
        learned, _ = hits.take()
        each = [correct[labels == label].mean() for label in np.unique(labels)]
        return Result(
            mode=self.mode,
            arm=arm,
            budget=1.0 if budget.asked is None else budget.asked,
            images=budget.images,
            seed=seed,
            steps=int(trainer.global_step),
            top1=float(correct.mean()),
            top1_balanced=float(np.mean(each)),
            train_top1=float(learned.mean()),
            seconds=round(seconds, 1),
            correct=correct,
        )

    def check(self, data: ClassificationData) -> None:
        """Refuse weights that were trained with the labels that are to be few."""
        ours = None if self.weights[OURS] is None else _classifier_root(str(self.weights[OURS]))
        if ours is not None and os.path.abspath(ours) == os.path.abspath(data.root):
            raise ValueError(
                f"{self.weights[OURS]} is a classifier that was trained with the labels of "
                f"{data.root}: give the pretraining run that it began from"
            )


class Hits(Callback):
    """Collects which images are recognised, in the order of the data."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Any, Any]] = []

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Compare with the labels."""
        labels = batch["label"].cpu().numpy()
        self.pairs.append((outputs["probabilities"].argmax(1).cpu().numpy() == labels, labels))

    def take(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Whether each image is recognised, and its class; and begin anew."""
        correct, labels = (np.concatenate(part) for part in zip(*self.pairs, strict=True))
        self.pairs = []
        return correct, labels


class Advance(Callback):
    """Moves a progress bar on, a step at a time."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.seen = bar, 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Draw what was done."""
        self.bar.update(trainer.global_step - self.seen)
        self.seen = trainer.global_step


# Options -----------------------------------------------------------------------------------------


def _make(kind: type[T], options: dict[str, Any]) -> T:
    """Build a model or data from options, their types checked as on the command line."""
    group = "model" if issubclass(kind, L.LightningModule) else "data"
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(kind, group)
    try:
        parsed = parser.parse_object({group: options})
    except ArgumentError as error:
        names = [option for action in parser._actions for option in action.option_strings]
        raise ArgumentError(None, word_usage_error(str(error), names)) from error
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name until 4.49
    return cast(T, make(parsed)[group])


def _read_recipe(name: str) -> dict[str, Any]:
    config = read_config(find_config(name, "classify"))
    recipe = {group: dict(config.get(group) or {}) for group in ("model", "data", "trainer")}
    for follows in ("weights", "num_classes", "seed", "multi_label"):
        if recipe["model"].pop(follows, None) and follows == "multi_label":
            raise ValueError(f"config {name}: compare is for one class an image, not multi_label")
    return recipe


def _modes(mode: str | None, config: str | None) -> list[Mode]:
    if mode == "both":
        if config is not None:
            raise ValueError("mode both has a recipe for each: leave config out, or choose a mode")
        return ["finetune", "probe"]
    if config is None:
        return [cast(Mode, mode or "finetune")]
    said: Mode = "probe" if _read_recipe(config)["model"].get("frozen") else "finetune"
    if mode not in (None, said):
        raise ValueError(f"config {config} is for {said}: leave mode out, or the config")
    return [said]


def _data_options(weights: str, said: dict[str, Any]) -> dict[str, Any]:
    """Where the images are, and how they are split: as said, or else as the weights' run did."""
    run = None
    if (
        not weights.startswith("timm:")
        and not (Path(weights).expanduser() / "config.json").is_file()
    ):
        run = run_of(find_checkpoint(weights))
    kept = (read_config(run / CONFIG).get("data") or {}) if run else {}
    if "root" not in said and not (kept.get("root") or kept.get("dataset")):
        raise ValueError(
            f"root must be given: {weights} lies in no run that says what it was trained on"
        )
    same = "root" not in said or os.path.abspath(said["root"]) == os.path.abspath(
        kept.get("root") or os.path.join(kept.get("data_dir", ""), kept.get("dataset") or "")
    )
    names = (*OF_THE_RUN, *OF_THE_IMAGES) if same else OF_THE_IMAGES
    inherited = {name: kept[name] for name in names if kept.get(name) is not None}
    if "root" in said or inherited.get("root"):
        inherited.pop("dataset", None)
    return {**inherited, **said}


def _check_labels(labels: str) -> None:
    several = (read_labels(labels, several=True).presence.sum(1) != 1).sum()
    if several:
        raise ValueError(
            f"labels {labels}: {int(several)} images do not have one label: compare is for one "
            "class an image"
        )


def _on_cpu(accelerator: str) -> bool:
    from lightning.pytorch.accelerators import CPUAccelerator

    with _quiet():
        chosen = L.Trainer(accelerator=accelerator, logger=False, enable_checkpointing=False)
    return isinstance(chosen.accelerator, CPUAccelerator)


def _precision(on_cpu: bool) -> str | None:
    return "32-true" if on_cpu else None


def _classifier_root(weights: str) -> str | None:
    """The folder whose labels a classifier of ours was trained with."""
    content = None if weights.startswith("timm:") else _our_checkpoint(weights)
    run = run_of(find_checkpoint(weights)) if content and content.get("classes") else None
    data = (read_config(run / CONFIG).get("data") or {}) if run else {}
    if data.get("root"):
        return str(data["root"])
    return os.path.join(data["data_dir"], data["dataset"]) if data.get("dataset") else None


def _fingerprint(weights: str) -> str | None:
    """Of the file, so that a run that has gone on meanwhile is not taken for the same weights."""
    if weights.startswith("timm:") or (Path(weights).expanduser() / "config.json").is_file():
        return None
    with find_checkpoint(weights).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# The folder --------------------------------------------------------------------------------------


def _open_folder(out: str | None, settings: dict[str, Any]) -> Path:
    """Make the folder, or go on in one of the same comparison."""
    settings = yaml.safe_load(yaml.safe_dump(settings))
    if out is None:
        folder = new_run(Path("runs"), "compare")
    else:
        folder = Path(out).expanduser()
        if folder.is_file():
            raise ValueError(f"out {out} is a file: give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CONFIG).is_file():
            _check_same(folder, settings)
        elif any(folder.iterdir()):
            raise ValueError(f"out {out} holds something else than a comparison: give a new folder")
    text = yaml.safe_dump({**_kept(folder), **settings}, sort_keys=False)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    (folder / HITS).mkdir(exist_ok=True)
    return folder


def _kept(folder: Path) -> dict[str, Any]:
    return read_config(folder / CONFIG) if (folder / CONFIG).is_file() else {}


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    kept = _kept(folder)
    for mode in [mode for mode in settings if mode in kept]:
        asked, before = dict(settings[mode]), dict(kept[mode])
        if before.get("public") is None or asked.get("public") is None:  # an arm more or less
            for one in (asked, before):
                one["public"] = None
                one["content"] = {OURS: one["content"].get(OURS)}
        found = differences(mode, asked, before)
        found = {k: v for k, v in found.items() if not k.endswith(("num_workers", "accelerator"))}
        if found:
            name, (now, then) = next(iter(found.items()))
            raise ValueError(
                f"{folder} holds a comparison with {name} {then}, not {now}: use the same options "
                "to go on, or another --out"
            )


def _name(result: Result) -> str:
    return f"{result.mode}-{result.arm}-{result.images}-{result.seed}.npy"


def _columns() -> list[str]:
    return [field.name for field in fields(Result) if field.name != "correct"]


def _append(folder: Path, result: Result) -> None:
    """Keep a run: its images first, so that a row in the table is a run that is complete."""
    np.save(folder / HITS / _name(result), result.correct)
    new = not (folder / RESULTS).exists()
    with (folder / RESULTS).open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(_columns())
        writer.writerow([getattr(result, name) for name in _columns()])


def _read_results(folder: Path, images: int) -> dict[tuple[str, str, int, int], Result]:
    """The runs that are done; what a crash left of a row is dropped."""
    path = folder / RESULTS
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8", newline="")
    found = {}
    for row in csv.DictReader(whole.splitlines()):
        values: dict[str, Any] = {
            field.name: field.type(row[field.name])  # type: ignore[operator]
            for field in fields(Result)
            if field.name != "correct"
        }
        one = Result(**values, correct=np.empty(0, bool))
        correct = np.load(folder / HITS / _name(one))
        if len(correct) != images:
            raise ValueError(
                f"{folder} was made with {len(correct)} validation images, now there are {images}: "
                "use another --out"
            )
        found[one.mode, one.arm, one.images, one.seed] = Result(**values, correct=correct)
    return found


# What is said ------------------------------------------------------------------------------------


def _validation(data: ClassificationData) -> Validation:
    images = data.sets["validation"]
    assert images.labels is not None
    groups = np.arange(len(images))
    if data.group_pattern:
        names = [group_of(images.name(i), data.group_pattern) for i in range(len(images))]
        groups = np.unique(names, return_inverse=True)[1]
    return Validation(images.labels.numpy(), groups)


def _announce(
    plans: Mapping[Mode, Plan],
    budgets: Sequence[Budget],
    data: ClassificationData,
    todo: Sequence[Any],
    done: Mapping[Any, Any],
) -> Iterator[str]:
    first = next(iter(plans.values()))
    yield f"{data.root}: {data.num_train:,} training images, {len(data.classes)} classes"
    for arm, origin in first.origins.items():
        yield f"{arm}: {origin}"
    for plan in plans.values():
        lengths = ", ".join(f"{plan.steps(b):,} steps for {b}" for b in budgets)
        yield f"{plan.mode}: {lengths}"
    yield f"{len(todo)} runs" + (f", {len(done)} are done" if done else "")


def _sum_up(
    folder: Path,
    results: list[Result],
    validation: Validation,
    budgets: Sequence[Budget],
    plans: Mapping[Mode, Plan],
) -> Comparison:
    """Write table and picture, and find the sentence."""
    balanced = validation.imbalanced
    words = {budget.images: str(budget) for budget in budgets}
    parts, sentences = [], []
    for mode, plan in plans.items():
        runs = [r for r in results if r.mode == mode]
        for equal in (False, True) if balanced else (False,):
            metric = "Balanced accuracy" if equal else "Top-1"
            rows = table(runs, validation, words=words.__getitem__, balanced=equal)
            parts += [f"{metric}, {mode}, %\n\n{markdown(rows)}"]
        found = gaps(runs, validation, (OURS, SCRATCH), words=words.__getitem__, balanced=balanced)
        said = verdict(found)
        if PUBLIC in plan.weights:
            other = gaps(
                runs, validation, (OURS, PUBLIC), words=words.__getitem__, balanced=balanced
            )
            said += f" Against public weights? {verdict(other, second='public')}"
        sentences.append(said if len(plans) == 1 else f"{mode}: {said}")
        parts += unlearned(runs, words.__getitem__)
    parts.append("\n".join(sentences))
    summary = "\n\n".join(parts) + "\n"
    (folder / SUMMARY).write_text(summary, encoding="utf-8")
    encoder = next(iter(plans.values())).encoder["encoder"]
    draw_learning_curve(
        results,
        validation,
        folder / PLOT,
        title=f"{encoder}: is pretraining worth it?",
        balanced=balanced,
    )
    return Comparison(folder, results, validation, summary, "\n".join(sentences))


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Lightning says at each of many runs."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for known in (
            r"`isinstance\(treespec, LeafSpec\)`",
            ".*does not have many workers",
            ".*The number of training batches",
            "GPU available but not used",
            r".*are not in .*: left out",
        ):
            warnings.filterwarnings("ignore", known)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
