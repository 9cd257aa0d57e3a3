"""The parts of a task on the command line: classes, callbacks, and options that follow others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

from filelock import BaseFileLock
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger


@dataclass(frozen=True)
class Link:
    """Where an option takes its value from, so that the user gives it once.

    Attributes:
        source: The option that the user gives, or several.
        compute: Computes the value from those of the sources; None copies it.
    """

    source: str | tuple[str, ...]
    compute: Callable[..., Any] | None = None


LINKS = {  # by the option that follows; only those that a task's classes have count
    "data.img_size": Link("model.img_size"),
    "data.in_chans": Link("model.in_chans"),
    "model.seed": Link("seed_everything", int),
    "model.trust": Link("trust"),
    "data.seed": Link("seed_everything", int),
}


@dataclass(frozen=True)
class Task:
    """A command that trains.

    Attributes:
        name: The command.
        model: The LightningModule.
        data: The LightningDataModule.
        default: The config where none is named.
        callbacks: Callbacks that are always there, by the name of their options.
        writers: Callbacks without options.
        links: Options that follow others, by their names, beside LINKS.
        monitor: The metric that the best checkpoint is chosen by, or a function of the model that
            names it. The least loss is the best, and the greatest of anything else.
    """

    name: str
    model: type[LightningModule]
    data: type[LightningDataModule]
    default: str
    callbacks: Mapping[str, type[Callback]]
    writers: tuple[type[Callback], ...] = ()
    links: Mapping[str, Link] = field(default_factory=dict)
    monitor: str | Callable[[Any], str] = "val/loss"

    def best_by(self, model: LightningModule) -> tuple[str, str]:
        """The metric that chooses the best checkpoint of a model, and its mode: min or max."""
        metric = self.monitor if isinstance(self.monitor, str) else self.monitor(model)
        return metric, "min" if metric.endswith("loss") else "max"

    def all_links(self) -> dict[str, Link]:
        """The links between options that these classes have."""
        options = {
            f"{group}.{name}"
            for group, kind in (("model", self.model), ("data", self.data))
            for name in self.options_of(kind)
        }
        return {k: v for k, v in {**LINKS, **self.links}.items() if k in options}

    def options_of(self, kind: type) -> set[str]:
        """The options of a class; it may pass some on to its parent."""
        return {
            name
            for parent in kind.__mro__
            if "__init__" in vars(parent)
            for name in signature(vars(parent)["__init__"]).parameters
        }


@dataclass
class Begun:
    """What a command has opened so far, to be closed however it ends."""

    job: str | None = None  # SLURM's, and which of its commands this is
    folder: Path | None = None
    lock: BaseFileLock | None = None  # on the folder, while something trains there
    loggers: list[Logger] = field(default_factory=list)
    failed: bool = True
