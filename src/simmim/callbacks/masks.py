"""What is hidden: the masks that never change, and those of an epoch."""

from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor

from simmim.callbacks.look import batch_at, fixed_places, last_step
from simmim.callbacks.pictures import draw_panel, to_rgb, to_unit
from simmim.callbacks.schedule import EpochPictures
from simmim.masking import upsample_mask

LABELS = {0: "visible", 1: "hidden"}


class Masks(EpochPictures):
    """Draw what is hidden of a few validation images: under their fixed masks, and in training.

    The second column is what `val/loss` is measured under, in every epoch and every run; the third
    is a mask as this epoch's training draws it. `masks/epoch_0007.png` in the run's folder is after
    seven epochs; TensorBoard gets the same picture, W&B the images with masks that can be switched
    on and off.

    Args:
        every_n_epochs: Epochs between two pictures; the last epoch always has one. 0 draws none.
        num_images: Validation images to draw, spread evenly over the data set.
    """

    NAME, AT_START = "masks", True

    def __init__(self, every_n_epochs: int = 10, num_images: int = 4) -> None:
        super().__init__(every_n_epochs, num_images)

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule, epochs: int) -> bool:
        """Draw both masks of each image; no weight is looked at."""
        shown = fixed_places(trainer, self.num_images)
        if shown is None:
            return False
        if trainer.is_global_zero:
            module: Any = pl_module
            batch = batch_at(trainer, *shown)
            raw, _, index = module.inputs(batch, 0)
            masks = {
                name: module.draw_mask(raw, index, validation=fixed)[0]
                for name, fixed in (("validation", True), ("training", False))
            }
            self._keep(trainer, to_unit(raw), masks, epochs)
        return True

    def _keep(
        self, trainer: L.Trainer, images: Tensor, masks: dict[str, Tensor], epochs: int
    ) -> None:
        size = (images.shape[-2], images.shape[-1])
        hidden = {name: upsample_mask(mask, size) for name, mask in masks.items()}

        def to_wandb(logger: WandbLogger) -> None:
            pictures = [Image.fromarray(pixels) for pixels in to_rgb(images)]
            layers = [
                {
                    name: {"mask_data": mask[i, 0].byte().cpu().numpy(), "class_labels": LABELS}
                    for name, mask in hidden.items()
                }
                for i in range(len(pictures))
            ]
            logger.log_image(self.NAME, pictures, last_step(trainer), masks=layers)

        columns = {"image": images}
        columns |= {f"in {name}": images.masked_fill(mask, 0.5) for name, mask in hidden.items()}
        self.keep(trainer, draw_panel(columns), epochs, to_wandb)
