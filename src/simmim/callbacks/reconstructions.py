"""Pictures of what the model makes of masked images: while it trains, and for a folder."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import lightning as L
from PIL import Image
from torch import Tensor

from simmim.callbacks.base import call, fixed_samples, undisturbed
from simmim.callbacks.pictures import draw_panel
from simmim.callbacks.schedule import EpochPictures, save_png
from simmim.callbacks.writer import FolderWriter


class Reconstructions(EpochPictures):
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

    NAME, CONTENT, AT_START = "reconstructions", "what it reconstructs", True

    def __init__(self, every_n_epochs: int = 10, num_images: int = 8) -> None:
        super().__init__(every_n_epochs, num_images)

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule, epochs: int) -> bool:
        """Draw what it makes of the images."""
        with undisturbed(pl_module):
            samples = fixed_samples(trainer, self.num_images)
            if samples is None:
                return False
            module: Any = pl_module
            pictures: Mapping[str, Tensor] = call(trainer, module.reconstruct, *samples)
        if trainer.is_global_zero:
            self.keep(trainer, draw_panel(pictures), epochs)
        return True


class PredictionWriter(FolderWriter):
    """Write one picture for each image of a folder into `predictions/` of the run's folder.

    Each picture is one row of a panel as `Reconstructions` draws it, named after its image with
    folders kept: `predictions/cats/1.png`.
    """

    CONTENT: ClassVar[str] = "Pictures of what it reconstructs"

    def draw(self, module: Any, outputs: Any) -> Iterator[Image.Image]:
        """Draw each image of a batch, from what `predict_step` returns."""
        for i in range(len(outputs["original"])):
            yield draw_panel({name: pictures[i : i + 1] for name, pictures in outputs.items()})

    def write(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any) -> None:
        """Write a picture for each image of the batch."""
        paths = batch.get("path") if isinstance(batch, Mapping) else None
        for i, picture in enumerate(self.draw(module, outputs)):
            place = self.next_place(trainer)
            name = self.names(str(paths[i]) if paths else f"{place:06d}")
            save_png(picture, self.run / "predictions" / name)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where the pictures are."""
        if trainer.is_global_zero:
            print(f"{self.CONTENT}: {self.run / 'predictions'}")
