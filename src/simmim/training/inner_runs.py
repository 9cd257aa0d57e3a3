"""Training within a command: built from options as on the command line, and without a word."""

from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import ERROR, getLogger
from typing import Any, TypeVar, cast
from warnings import catch_warnings, filterwarnings

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser

from simmim.base.errors import word_usage_error

T = TypeVar("T", bound=L.LightningModule | L.LightningDataModule)
KNOWN = (  # warnings about what is meant
    r"`isinstance\(treespec, LeafSpec\)`",
    ".*does not have many workers",
    ".*The number of training batches",
    "GPU available but not used",
    "You defined a `validation_step`",
    r".*are not in .*: left out",  # said once
)


def make(kind: type[T], options: Mapping[str, Any]) -> T:
    """Build a model or data from options, their types checked as on the command line.

    Raises:
        ArgumentError: If there is no such option, or it does not take the value.
    """
    group = "model" if issubclass(kind, L.LightningModule) else "data"
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(kind, group)
    try:
        parsed = parser.parse_object({group: dict(options)})
    except ArgumentError as error:
        names = [option for action in parser._actions for option in action.option_strings]
        raise ArgumentError(None, word_usage_error(str(error), names)) from error
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its older name
    return cast(T, build(parsed)[group])


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Lightning says of every run."""
    loggers = [getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with catch_warnings():
        for message in KNOWN:
            filterwarnings("ignore", message)
        for logger in loggers:
            logger.setLevel(ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
