"""Which validation images are reconstructed worst: odd images, wrong files, or what is hard."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from simmim.callbacks.base import call, evaluation_loader, samples_at, undisturbed
from simmim.callbacks.pictures import draw_panel
from simmim.callbacks.schedule import EpochPictures
from simmim.masking import upsample_mask

HEADER = ["rank", "loss", "path"]


class WorstImages(EpochPictures):
    """Show the validation images with the largest masked loss, under their fixed masks.

    They are found while the epoch's validation goes on, and cost it nothing but a comparison.
    `worst/epoch_0010.png` and `worst.csv` (the last) lie in the run's folder; W&B gets a table of
    picture, rank, loss and path, TensorBoard the picture and the list.

    Args:
        every_n_epochs: Epochs between two tables; the last epoch always has one. 0 makes none.
        num_images: Images to show.
    """

    NAME, CONTENT = "worst", "what it reconstructs worst"

    def __init__(self, every_n_epochs: int = 10, num_images: int = 16) -> None:
        super().__init__(every_n_epochs, num_images)
        self._worst: tuple[Tensor, Tensor] | None = None  # losses, descending, and places, (n,)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self._worst = None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the largest losses so far, on the device."""
        training = trainer.state.fn == "fit" and not trainer.sanity_checking
        if not (training and self.every_n_epochs and dataloader_idx == 0):
            return
        losses = image_losses(outputs["error"], outputs["mask"])
        losses = torch.where(losses.isnan(), torch.inf, losses)  # XLA's nan_to_num takes no inf
        places = outputs["index"]
        if self._worst is not None:
            losses, places = (torch.cat(p) for p in zip(self._worst, (losses, places), strict=True))
        worst, chosen = losses.topk(min(self.num_images, len(losses)))
        self._worst = worst, places[chosen]

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule, epochs: int) -> bool:
        """Draw and list those of the last validation, once."""
        loader = evaluation_loader(trainer)
        if self._worst is None or loader is None:
            return False
        losses, places = self._gather(trainer, *self._worst)
        self._worst = None
        with undisturbed(pl_module):
            samples, paths = samples_at(trainer, loader, places)
            pictures = call(trainer, pl_module.reconstruct, *samples)  # type: ignore[arg-type]
        if trainer.is_global_zero:
            rows = [
                [rank, round(loss, 6), path]
                for rank, (loss, path) in enumerate(zip(losses, paths, strict=True), 1)
            ]
            panels = [
                draw_panel({k: v[i : i + 1] for k, v in pictures.items()}) for i in range(len(rows))
            ]
            self.keep_table(trainer, draw_panel(pictures), epochs, HEADER, rows, panels)
        return True

    def _gather(
        self, trainer: L.Trainer, worst: Tensor, places: Tensor
    ) -> tuple[list[float], list[int]]:
        """The largest losses over all processes, and the images' places in the data set."""
        missing = self.num_images - len(worst)  # every process gives as many
        worst = F.pad(worst, (0, missing), value=-torch.inf)
        places = F.pad(places, (0, missing), value=-1)
        worst = trainer.strategy.all_gather(worst).flatten()
        places = trainer.strategy.all_gather(places).flatten()
        found: dict[int, float] = {}  # ranks may share an image that fills up their last batch
        for i in worst.argsort(descending=True).tolist():
            if places[i] >= 0:
                found.setdefault(int(places[i]), float(worst[i]))
        chosen = list(found)[: self.num_images]
        return [found[place] for place in chosen], chosen


def image_losses(error: Tensor, mask: Tensor) -> Tensor:
    """Masked loss of each image by itself.

    Args:
        error: Of each element, (B, C, h, w).
        mask: Cells, (B, rows, columns), True = hidden.

    Returns:
        The mean error over each image's hidden elements, (B,).
    """
    error = error.detach().float().mean(1, keepdim=True)  # over channels
    hidden = upsample_mask(mask, (error.shape[-2], error.shape[-1]))
    total = (error * hidden).flatten(1).sum(1)
    return total / hidden.flatten(1).sum(1).clamp_min(1)
