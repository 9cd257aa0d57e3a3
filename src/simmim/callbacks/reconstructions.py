"""Pictures of what the model makes of masked images: while it trains, and for a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor

from simmim.callbacks.look import Samples, call, datamodule, fixed_samples, undisturbed
from simmim.callbacks.pictures import PictureNames, draw_panel


class Reconstructions(L.Callback):
    """Draw the same few validation images, under the same masks, every few epochs.

    Rows are images, columns the original, what is left of it, the reconstruction, the
    reconstruction under the visible part, and the error; where the target is not the image, the
    target too. `reconstructions/epoch_0007.png` in the run's folder is the model after seven
    epochs, epoch_0000 the untrained one; W&B and TensorBoard get the same pictures.

    Args:
        every_n_epochs: Epochs between two pictures; the last epoch always has one. 0 draws none.
        num_images: Validation images to draw, spread evenly over the data set and so over its
            classes.
    """

    def __init__(self, every_n_epochs: int = 10, num_images: int = 8) -> None:
        if every_n_epochs < 0:
            raise ValueError(f"every_n_epochs {every_n_epochs} is negative: use 0 to draw nothing")
        if num_images < 1:
            raise ValueError(f"num_images {num_images} is too few: use at least 1")
        self.every_n_epochs, self.num_images = every_n_epochs, num_images
        self.folder: Path | None = None
        self._samples: Samples | None = None
        self._drawn_at: int | None = None  # optimiser steps at the last picture

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the run's folder, which every process must ask for."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "reconstructions"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the untrained model, so that a wrong image shows before hours are spent."""
        self._samples, self._drawn_at = None, None
        if trainer.global_step == 0:
            self._draw(trainer, pl_module, epochs=0)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw every few epochs."""
        epochs = trainer.current_epoch + 1
        if self.every_n_epochs and epochs % self.every_n_epochs == 0:
            self._draw(trainer, pl_module, epochs)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the last state, however the run came to its end."""
        if self._drawn_at != trainer.global_step:
            self._draw(trainer, pl_module, epochs=trainer.current_epoch)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where the pictures are."""
        if trainer.is_global_zero and self.folder is not None and self.folder.is_dir():
            print(f"Pictures of what it reconstructs: {self.folder}")

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule, epochs: int) -> None:
        if not self.every_n_epochs:
            return
        with undisturbed(pl_module):
            if self._samples is None:
                self._samples = fixed_samples(trainer, self.num_images)
            if self._samples is None:
                return
            module: Any = pl_module
            pictures: Mapping[str, Tensor] = call(trainer, module.reconstruct, *self._samples)
        self._drawn_at = trainer.global_step
        if trainer.is_global_zero:
            self._keep(trainer, draw_panel(pictures), epochs)

    def _keep(self, trainer: L.Trainer, panel: Image.Image, epochs: int) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("reconstructions", [panel], trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(
                    "reconstructions", np.asarray(panel), trainer.global_step, dataformats="HWC"
                )
        if self.folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            save_png(panel, self.folder / f"epoch_{epochs:04d}.png")
        except OSError as error:  # a full disk costs the picture, not the run
            rank_zero_warn(f"no picture: {error}")


class PredictionWriter(L.Callback):
    """Write one picture for each image of a folder into `predictions/` of the run's folder.

    Each picture is one row of a panel as `Reconstructions` draws it, named after its image with
    folders kept: `predictions/cats/1.jpg.png`. What `predict_step` returns is not collected as
    well: a folder of a million images would not fit into memory.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._names = PictureNames()
        self._seen = 0  # images of this process

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the run's folder, which every process must ask for."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "predictions"

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep Lightning from collecting what is written."""
        self._names, self._seen = PictureNames(getattr(datamodule(trainer), "root", None)), 0
        trainer.predict_loop.return_predictions = False

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a picture for each image of the batch."""
        assert self.folder is not None
        paths = batch.get("path") if isinstance(batch, Mapping) else None
        for i in range(len(outputs["original"])):
            place = self._seen * trainer.world_size + trainer.global_rank
            row = {name: pictures[i : i + 1] for name, pictures in outputs.items()}
            name = self._names(str(paths[i]) if paths else f"{place:06d}")
            save_png(draw_panel(row), self.folder / name)
            self._seen += 1

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where the pictures are."""
        if trainer.is_global_zero:
            print(f"Pictures of what it reconstructs: {self.folder}")


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a picture, and the folders above it where there are none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
