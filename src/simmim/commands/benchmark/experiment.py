"""A config of pretraining, opened as `simmim pretrain fit` would, on one device."""

import json
import time
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import repeat
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from simmim.base.errors import word_usage_error
from simmim.base.files import read_config
from simmim.command_line.configuration import OVERLAY, find_config
from simmim.command_line.task import Task
from simmim.data import ImageFolderData
from simmim.pretrain import SimMIM
from simmim.training.inner_runs import make, quiet

DEFAULT = "pretrain/digits"
TASK = Task("pretrain", SimMIM, ImageFolderData, DEFAULT, {})
OF_THE_TRAINER = (
    *("accelerator", "precision", "accumulate_grad_batches", "benchmark", "log_every_n_steps"),
    *("gradient_clip_val", "gradient_clip_algorithm"),
)
WARM_UP = 2  # steps that are not counted: kernels are chosen, memory is taken


@dataclass(frozen=True)
class Experiment:
    """What is measured.

    Attributes:
        name: Its configs.
        model: The model, new.
        data: Its images; not set up yet.
        trainer: Options of Lightning's Trainer that decide about speed.
    """

    name: str
    model: SimMIM
    data: ImageFolderData
    trainer: dict[str, Any]

    def __post_init__(self) -> None:
        self.trainer.setdefault("accelerator", "auto")


def open_experiment(
    config: Sequence[str] | None,
    *,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> Experiment:
    """Open a config of pretraining.

    Args:
        config: Configs of `simmim pretrain`, by name or file, laid over each other; without an
            experiment among them the demo comes first.
        model: Options of SimMIM that overrule theirs, such as `encoder_kwargs.depth`; None among
            them: theirs.
        data: Options of ImageFolderData, likewise.
        trainer: Options of the Trainer, likewise.

    Raises:
        ArgumentError: If a config is not found, or an option is wrong.
        ValueError: If a config is another task's.
    """
    options = read_options(config, model=model, data=data, trainer=trainer)
    name = " + ".join(path.stem for path in _paths(config))
    return Experiment(
        name,
        make(SimMIM, options.model.as_dict()),
        make(ImageFolderData, options.data.as_dict()),
        trainer_options(options),
    )


def read_options(
    config: Sequence[str] | None,
    *,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> Any:
    """Read the options of a config of pretraining, without building anything.

    Args:
        config: As of `open_experiment`; so are model, data and trainer, and the errors.
        model: Options of SimMIM that overrule theirs.
        data: Options of ImageFolderData, likewise.
        trainer: Options of the Trainer, likewise.

    Returns:
        The groups `model`, `data` and `trainer`, each option an attribute.
    """
    words = [f"--config={json.dumps(_read(path))}" for path in _paths(config)]
    if not torch.cuda.is_available():  # compiling takes minutes on a CPU, and gains little there
        words.append("--model.compile=false")
    for group, values in {"model": model, "data": data, "trainer": trainer}.items():
        for name, value in (values or {}).items():
            if value is not None:
                text = value if isinstance(value, str) else json.dumps(value)
                words.append(f"--{group}.{name}={text}")
    if (data or {}).get("root"):
        words.append("--data.dataset=null")
    parser = _parser()
    try:
        return parser.parse_args(words)
    except ArgumentError as error:
        names = [option for action in parser._actions for option in action.option_strings]
        raise ArgumentError(None, word_usage_error(str(error), names)) from error


def trainer_options(options: Any) -> dict[str, Any]:
    """Those options of the Trainer that decide about speed."""
    return {name: value for name, value in options.trainer.items() if name in OF_THE_TRAINER}


def train(
    experiment: Experiment, data: L.LightningDataModule | Iterable[Any], seconds: float
) -> list[float]:
    """Train for some steps.

    Args:
        experiment: What.
        data: Its data module, or batches; they are repeated if there are too few.
        seconds: For so long, after the warm-up, but three steps at least.

    Returns:
        The duration of each step after the warm-up, in seconds, the wait for its batch included.
    """
    clock = Clock(seconds)
    with quiet():
        trainer = L.Trainer(
            **experiment.trainer,
            devices=1,
            max_epochs=-1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[clock],
            max_steps=10**6,  # the clock stops it
        )
        if isinstance(data, L.LightningDataModule):
            trainer.fit(experiment.model, datamodule=data)
        else:
            trainer.fit(experiment.model, data)
    return clock.durations


def step_rate(experiment: Experiment, batch_size: int, seconds: float) -> float:
    """Train with one batch of random images, again and again.

    Args:
        experiment: What is trained.
        batch_size: Images in the batch.
        seconds: How long, after the warm-up.

    Returns:
        Images/s.
    """
    shape = (batch_size, experiment.data.in_chans, *experiment.data.img_size)
    batch = {
        "image": torch.randint(0, 256, shape, dtype=torch.uint8),
        "index": torch.arange(batch_size),
    }
    durations = train(experiment, Batches(batch), seconds)
    return batch_size * len(durations) / sum(durations)


class Batches:
    """One batch, a thousand times an epoch.

    Args:
        batch: A dict as the loader gives it.

    Attributes:
        batch_size: Its images, which the learning rate follows.
    """

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch, self.batch_size = batch, len(batch["image"])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return repeat(self.batch, len(self))

    def __len__(self) -> int:
        return 1000


class Clock(Callback):
    """Takes the time of each step, and stops in time.

    Args:
        seconds: Of all steps together, after the warm-up.

    Attributes:
        durations: Of each step after the warm-up, in seconds.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.seen, self.before = seconds, 0, 0.0
        self.durations: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Wait for the device, and note how long it took."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.seen >= WARM_UP:
            self.durations.append(now - self.before)
        self.seen, self.before = self.seen + 1, now
        if len(self.durations) >= 3 and sum(self.durations) >= self.seconds:
            trainer.should_stop = True


def _paths(config: Sequence[str] | None) -> list[Path]:
    paths = [find_config(name, TASK.name) for name in config or ()]
    if all(path.parent.name == OVERLAY for path in paths):
        return [find_config(DEFAULT, TASK.name), *paths]
    return paths


def _read(path: Path) -> dict[str, Any]:
    """Read the groups of a config that matter here."""
    config = read_config(path)
    groups = {name: dict(config.get(name) or {}) for name in ("model", "data", "trainer")}
    foreign = groups["model"].keys() - signature(SimMIM).parameters.keys()
    if foreign:
        raise ValueError(
            f"config {path} is none of simmim pretrain, whose model has no option "
            f"{min(foreign)}: give one that is, such as -c image_folder"
        )
    if "seed_everything" in config:
        return {**groups, "seed_everything": config["seed_everything"]}
    return groups


def _parser() -> LightningArgumentParser:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    parser.add_argument("--trust", type=bool, default=True)  # the config is the user's own
    parser.add_lightning_class_args(SimMIM, "model")
    parser.add_lightning_class_args(ImageFolderData, "data")
    parser.add_lightning_class_args(L.Trainer, "trainer")
    for target, link in TASK.all_links().items():
        parser.link_arguments(link.source, target, compute_fn=link.compute)
    return parser
