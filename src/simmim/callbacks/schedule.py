"""When pictures are drawn while a model trains, and where they are kept."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image


class EpochPictures(L.Callback, ABC):
    """Draw every few epochs, and at the end, however the run comes to it.

    `NAME/epoch_0007.png` in the run's folder is the model after seven epochs; TensorBoard gets the
    same picture, and W&B that or the images themselves.

    Args:
        every_n_epochs: Epochs between two pictures; the last epoch always has one. 0 draws none.
        num_images: Validation images to draw.
    """

    NAME: ClassVar[str]  # of the folder, and of the picture on the boards
    CONTENT: ClassVar[str]  # what a person is told that the pictures show

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
        """Begin anew."""
        self._drawn_at = None

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
        if trainer.is_global_zero and self.folder is not None and self.folder.is_dir():
            print(f"Pictures of {self.CONTENT}: {self.folder}")

    def draw_now(self, trainer: L.Trainer, pl_module: L.LightningModule, epochs: int) -> None:
        """Draw, and remember at which step."""
        if self.every_n_epochs and self.draw(trainer, pl_module, epochs):
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
        if self.folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            save_png(panel, self.folder / f"epoch_{epochs:04d}.png")
        except OSError as error:  # a full disk costs the picture, not the run
            rank_zero_warn(f"no picture: {error}")


def check_every_n_epochs(every_n_epochs: int) -> None:
    """Refuse what is no number of epochs."""
    if every_n_epochs < 0:
        raise ValueError(f"every_n_epochs {every_n_epochs} is negative: use 0 to draw nothing")


def check_num_images(num_images: int) -> None:
    """Refuse what is no number of images."""
    if num_images < 1:
        raise ValueError(f"num_images {num_images} is too few: use at least 1")


def is_due(trainer: L.Trainer, every_n_epochs: int) -> bool:
    """Whether the epoch that ends is one of every so many, or the last; never with 0."""
    epochs = trainer.current_epoch + 1
    return bool(every_n_epochs) and (epochs % every_n_epochs == 0 or epochs == trainer.max_epochs)


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
                logger.log_image(name, [picture], trainer.global_step)
            else:
                to_wandb(logger)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(
                name, np.asarray(picture), trainer.global_step, dataformats="HWC"
            )


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a picture, and the folders above it where there are none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
