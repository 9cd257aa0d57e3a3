"""When pictures are drawn while a model trains, and where they and their tables are kept."""

import csv
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from simmim.callbacks.base import last_step


class EpochPictures(L.Callback, ABC):
    """Draw every few epochs, and at the end, however the run comes to it.

    `NAME/epoch_0007.png` in the run's folder is the model after seven epochs; TensorBoard gets the
    same picture, and W&B that or the images themselves.

    Args:
        every_n_epochs: Epochs between two pictures; the last epoch always has one. 0 draws none.
        num_images: Validation images to draw.
    """

    NAME: ClassVar[str]  # of the folder, and of the picture on the boards
    CONTENT: ClassVar[str] = ""  # what a person is told that the pictures show; "": nothing
    # Whether it draws before the first step, so that a wrong image shows before hours are spent.
    AT_START: ClassVar[bool] = False

    def __init__(self, every_n_epochs: int, num_images: int) -> None:
        check_every_n_epochs(every_n_epochs)
        check_num_images(num_images)
        self.every_n_epochs, self.num_images = every_n_epochs, num_images
        self.folder: Path | None = None
        self._drawn_at: int | None = None  # optimiser steps at the last picture

    @abstractmethod
    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule, epochs: int) -> bool:
        """Draw the model after so many epochs, and `keep` the picture; False if there is none.

        All processes call it.
        """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the run's folder, which every process must ask for."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / self.NAME

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew, perhaps with the untrained model."""
        self._drawn_at = None
        if self.AT_START and trainer.global_step == 0:
            self.draw_now(trainer, pl_module, epochs=0)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw every few epochs."""
        epochs = trainer.current_epoch + 1
        if self.every_n_epochs and epochs % self.every_n_epochs == 0:
            self.draw_now(trainer, pl_module, epochs)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the last state, however the run came to its end."""
        if self._drawn_at != trainer.global_step:
            self.draw_now(trainer, pl_module, epochs=trainer.current_epoch)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where the pictures are."""
        shown = bool(self.CONTENT) and self.folder is not None and self.folder.is_dir()
        if trainer.is_global_zero and shown:
            print(f"Pictures of {self.CONTENT}: {self.folder}")

    def draw_now(self, trainer: L.Trainer, pl_module: L.LightningModule, epochs: int) -> None:
        """Draw the weights that are kept, a moving average if there is one; and remember when."""
        if not self.every_n_epochs:
            return
        with _averaged(trainer, pl_module):
            drawn = self.draw(trainer, pl_module, epochs)
        if drawn:
            self._drawn_at = trainer.global_step

    def keep(
        self,
        trainer: L.Trainer,
        panel: Image.Image,
        epochs: int,
        to_wandb: Callable[[WandbLogger], Any] | None = None,
    ) -> None:
        """Put a picture on the boards and into the run's folder.

        Args:
            trainer: The trainer, of the first process.
            panel: The picture.
            epochs: Which it is named after.
            to_wandb: Logs to W&B what it can show better than the picture; None: the picture.
        """
        show(trainer, self.NAME, panel, to_wandb)
        self.save(trainer, panel, epochs)

    def keep_table(
        self,
        trainer: L.Trainer,
        panel: Image.Image,
        epochs: int,
        header: Sequence[str],
        rows: Sequence[Sequence[Any]],
        pictures: Sequence[Image.Image],
    ) -> None:
        """Put a table of images on the boards, and into the run's folder as `NAME.csv`.

        W&B has a picture in each row, TensorBoard the panel and the rows as text. The file is the
        last table; the panels stay.

        Args:
            trainer: The trainer, of the first process.
            panel: All pictures in one.
            epochs: Which it is named after.
            header: Names of the columns.
            rows: Of values, one an image.
            pictures: One a row.
        """

        def to_wandb(logger: WandbLogger) -> None:
            import wandb

            table = [[wandb.Image(p), *row] for p, row in zip(pictures, rows, strict=True)]
            logger.log_table(self.NAME, ["picture", *header], table, step=last_step(trainer))

        self.keep(trainer, panel, epochs, to_wandb)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                text = _markdown([header, ["---"] * len(header), *rows])
                logger.experiment.add_text(self.NAME, text, last_step(trainer))
        if self.folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            path = self.folder.parent / f"{self.NAME}.csv"
            with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                csv.writer(file).writerows([header, *rows])
        except OSError as error:  # a full disk costs the table, not the run
            rank_zero_warn(f"no table: {error}")

    def save(self, trainer: L.Trainer, panel: Image.Image, epochs: int) -> None:
        """Write a picture into the run's folder."""
        if self.folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            save_png(panel, self.folder / f"epoch_{epochs:04d}.png")
        except OSError as error:  # a full disk costs the picture, not the run
            rank_zero_warn(f"no picture: {error}")


def check_every_n_epochs(every_n_epochs: int) -> None:
    """Refuse what is no number of epochs."""
    if every_n_epochs < 0:
        raise ValueError(f"every_n_epochs {every_n_epochs} is negative: use 0 for never")


def check_num_images(num_images: int) -> None:
    """Refuse what is no number of images."""
    if num_images < 1:
        raise ValueError(f"num_images {num_images} is too few: use at least 1")


def show(
    trainer: L.Trainer,
    name: str,
    picture: Image.Image,
    to_wandb: Callable[[WandbLogger], Any] | None = None,
) -> None:
    """Put a picture on the boards; on W&B what `to_wandb` logs, if it is given."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            if to_wandb is None:
                logger.log_image(name, [picture], last_step(trainer))
            else:
                to_wandb(logger)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(
                name, np.asarray(picture), last_step(trainer), dataformats="HWC"
            )


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a picture, and the folders above it where there are none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


@contextmanager
def _averaged(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """Have a moving average in the weights' place, as Lightning has it there while it validates."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    averages = [c for c in callbacks if isinstance(c, WeightAveraging)]
    averages = [average for average in averages if average._average_model is not None]
    for average in averages:
        average._swap_models(pl_module)
    try:
        yield
    finally:
        for average in reversed(averages):
            average._swap_models(pl_module)


def _markdown(rows: Sequence[Sequence[Any]]) -> str:
    """A table as TensorBoard shows it."""
    lines = [" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)
