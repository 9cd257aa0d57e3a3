"""The short page of a task: the options that people change, and what they are set to.

Written by hand: Lightning's and timm's words are not a newcomer's, and reading them takes seconds.
`--help all` and `--help WORD` show the docstrings.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simmim.command_line.configuration import EXPERIMENTS, OVERLAY, packaged_configs, read_layers
from simmim.command_line.help.layout import fill, table

ANY = ("pretrain", "classify", "segment", "detect")
IMAGES, DENSE, DOWNSTREAM = ANY[:2], ANY[2:], ANY[1:]
PRETRAIN, CLASSIFY, SEGMENT, DETECT = ((task,) for task in ANY)
ALL = ("fit", "validate", "test", "predict")
FIT, SCORED = ALL[:1], ALL[:3]


@dataclass(frozen=True)
class Row:
    """An option on the page.

    Attributes:
        usage: Its name and what stands for its value: "model.mask_ratio X".
        text: One line.
        default: What it is where neither a config nor the user says it.
        of: The tasks that have it.
        when: The subcommands that show it.
    """

    usage: str
    text: str
    default: str = ""
    of: tuple[str, ...] = ANY
    when: tuple[str, ...] = FIT

    @property
    def option(self) -> str:
        """Its name."""
        return self.usage.split()[0]


DATA = [
    Row("data.root DIR", "folder of images, at any depth", when=ALL),
    Row("data.dataset NAME", "a data set by name instead: digits, cifar10, ...", "", IMAGES, ALL),
    Row("data.labels FILE", "CSV file of labels, instead of class folders", "", CLASSIFY, SCORED),
    Row("data.labels_per_class N", "train on fewer labels: 10, or a share, 0.1", "all", CLASSIFY),
    Row("data.classes FILE", "JSON file that names the classes", "classes.json", SEGMENT, SCORED),
    Row("data.annotations FILE", "one COCO file for all", "each part's own", DETECT, SCORED),
    Row("data.val_fraction X", "share that validates where there is no val/", "0.1", when=SCORED),
    Row("data.group_pattern REGEX", "one patient's stay together: '(patient[0-9]+)_'", when=SCORED),
    Row("data.batch_size N", "images in a batch, of each process", when=ALL),
    Row("data.num_workers N", "processes that read images", "by the CPU cores", when=ALL),
]
MODEL = [
    Row("model.weights CKPT", "begin with a run's folder, a checkpoint, timm:NAME", "none"),
    Row("model.encoder NAME", "any timm image model", "vit_base_patch16_224", PRETRAIN),
    Row("model.encoder NAME", "any timm image model", "that of the weights", DOWNSTREAM),
    Row("model.img_size N", "side of the images in pixels, or [height, width]", "224", PRETRAIN),
    Row("model.img_size N", "side in pixels, or [H, W]", "that of the weights", DOWNSTREAM),
    Row("model.in_chans N", "channels of the images", "3", PRETRAIN),
    Row("model.mask_ratio X", "share of an image that is hidden", "0.6", PRETRAIN),
    Row("model.mask_patch_size N", "side of a hidden square in pixels", "32", PRETRAIN),
    Row("model.masking KIND", "random, block, square, token, foreground", "random", PRETRAIN),
    Row("model.target KIND", "pixels, normalized_pixels, hog, features, ...", "pixels", PRETRAIN),
    Row("model.head KIND", "linear, mlp, transformer, inverse", "linear", PRETRAIN),
    Row("model.frozen true", "train a linear probe on the encoder as it is", "false", CLASSIFY),
    Row("model.layer N", "block that a probe reads, or `all` of them", "the last", CLASSIFY),
    Row("model.frozen true", "leave the encoder as it is", "false", DENSE),
    Row("model.head KIND", "upernet, or linear", "upernet", SEGMENT),
    Row("model.head KIND", "mlp, or conv (ViTDet's)", "mlp", DETECT),
    Row("model.masks true", "find outlines, too", "where the data has them", DETECT),
    Row("model.multi_label true", "an image can have several labels", "false", CLASSIFY),
    Row("model.mixup X", "alpha of mixup; 0 = none", "0.0", CLASSIFY),
    Row("model.class_weights balanced", "for rare classes", "all alike", CLASSIFY + SEGMENT),
]
OPTIMISATION = [
    Row("trainer.max_epochs N", "length of the run"),
    Row("model.base_lr X", "learning rate for 512 images a step; it follows the batch size"),
    Row("model.warmup_epochs N", "epochs in which the learning rate rises"),
    Row("model.layer_decay X", "its factor from a block to the one below", "none", DOWNSTREAM),
    Row("model.weight_decay X", "AdamW's"),
    Row("model.drop_path_rate X", "stochastic depth", "0.0"),
    Row("trainer.accumulate_grad_batches N", "batches in a step", "1"),
    Row("model.grad_checkpointing true", "less memory, more time", "false"),
]
RUN = [
    Row("config CONFIG ...", "configs, by name or file; later ones overrule earlier", when=ALL),
    Row("name NAME", "the run's name", "the config's", when=ALL),
    Row("run_dir DIR", "folder of all runs", "runs", when=ALL),
    Row("ckpt_path CKPT", "go on with `last`, the newest run of this name, or a run's folder"),
    Row("ckpt_path CKPT", "a run's folder, a checkpoint, or `last`, the newest run", when=ALL[1:]),
    Row("seed_everything N", "seed of weights, order, crops and masks", "0"),
    Row("trainer.accelerator KIND", "cpu, gpu, mps, ...", "auto", when=ALL),
    Row("trainer.devices N", "how many of them, or which: [0, 1]", "auto", when=ALL),
    Row("trainer.precision KIND", "bf16-mixed, 16-mixed, ...", "32-true", when=ALL),
    Row("imports MODULE ...", "modules of your own, which register parts"),
    Row("trust", "import code that only a checkpoint names", "false", when=ALL),
    Row("print_config", "print every option with its value, and stop", when=ALL),
]
PAGE = {"data": DATA, "model": MODEL, "optimisation": OPTIMISATION, "run": RUN}


def page_of_task(task: str, subcommand: str, summary: str, args: list[str]) -> str:
    """The short help of a task's subcommand.

    Args:
        task: Such as "pretrain".
        subcommand: Such as "fit".
        summary: What it does, in a line.
        args: What else the command line holds; the values shown are those of its configs.

    Raises:
        ArgumentError: If a config is not found, or cannot be read.
    """
    experiment, config = read_layers(task, args)
    command = f"simmim {task} {subcommand}"
    lines = [
        *fill(f"usage: {command} [-c CONFIG ...] [--OPTION VALUE ...]"),
        "",
        *fill(
            f"{summary.capitalize()}. In brackets: the value in the config `{experiment}`, or "
            "else the default."
        ),
    ]
    for title, rows in PAGE.items():
        shown = rows_of(rows, task, subcommand)
        if shown:
            texts = {_invocation(row): _explained(row, config) for row in shown}
            lines += ["", f"{title}:", *table(texts)]
    return "\n".join([*lines, "", *_more(task, command)])


def rows_of(rows: Sequence[Row], task: str, subcommand: str) -> list[Row]:
    """The rows that the page of a subcommand shows."""
    return [row for row in rows if task in row.of and subcommand in row.when]


def _invocation(row: Row) -> str:
    return f"--{row.usage}".replace("--config", "-c")


def _explained(row: Row, config: Mapping[str, Any]) -> str:
    value: Any = config
    for key in row.option.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    shown = row.default if value is None else value if isinstance(value, str) else json.dumps(value)
    return f"{row.text} [{shown}]" if shown else row.text


def _more(task: str, command: str) -> list[str]:
    names = [name.partition("/") for name in packaged_configs()]
    experiments = ", ".join(short for group, _, short in names if group == task)
    overlays = ", ".join(short for group, _, short in names if group == OVERLAY)
    default = EXPERIMENTS[task].split("/")[-1]
    return [
        "configs:",
        *table({"experiments": f"{experiments}; without -c {default}", "over them": overlays}),
        "",
        "more:",
        *table(
            {
                f"{command} --help all": "every option, with the source of its default",
                f"{command} --help WORD": "a group of them (model, data, trainer, board, ...), or "
                "those with WORD in their name",
            }
        ),
    ]
