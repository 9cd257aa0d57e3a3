"""Which validation images are reconstructed worst: odd images, wrong files, or what is hard."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from simmim.callbacks.look import call, evaluation_loader, samples_at, undisturbed
from simmim.callbacks.pictures import draw_panel
from simmim.callbacks.schedule import EpochPictures
from simmim.masking import upsample_mask

HEADER = ["rank", "loss", "path"]


class WorstImages(EpochPictures):
    """Show the validation images with the largest masked loss, under their fixed masks.

    Every few epochs all of them are looked at once more, behind that epoch's validation.
    `worst/epoch_0010.png` and `worst.csv` (the last) lie in the run's folder; W&B gets a table of
    rank, picture, loss and path, TensorBoard the picture.

    Args:
        every_n_epochs: Epochs between two tables; the last epoch always has one. 0 makes none.
        num_images: Images to show.
    """

    NAME, CONTENT = "worst", "what it reconstructs worst"

    def __init__(self, every_n_epochs: int = 10, num_images: int = 16) -> None:
        super().__init__(every_n_epochs, num_images)

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule, epochs: int) -> bool:
        """Find them, draw them, and list them."""
        loader = evaluation_loader(trainer)
        if trainer.val_dataloaders is None or loader is None:
            return False
        with undisturbed(pl_module):
            losses, places = self._search(trainer, loader)
            if not len(places):
                return False
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

            def to_wandb(logger: WandbLogger) -> None:
                import wandb

                table = [
                    [row[0], wandb.Image(panel), *row[1:]]
                    for row, panel in zip(rows, panels, strict=True)
                ]
                columns = ["rank", "picture", *HEADER[1:]]
                logger.log_table(self.NAME, columns, table, step=trainer.global_step)

            self.keep(trainer, draw_panel(pictures), epochs, to_wandb)
            self._list(trainer, rows)
        return True

    def _search(self, trainer: L.Trainer, loader: Any) -> tuple[list[float], list[int]]:
        """The largest losses over all processes, and the images' places in the data set."""
        module: Any = trainer.lightning_module
        worst = torch.full((self.num_images,), -torch.inf, device=module.device)
        places = torch.full_like(worst, -1, dtype=torch.int64)
        for batch_idx, batch in enumerate(loader):
            if batch_idx >= trainer.num_val_batches[0]:  # as the validation does
                break
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            raw, images, index = module.inputs(batch, batch_idx)
            mask, keys = module.draw_mask(raw, index, validation=True)
            losses = call(trainer, lambda *b: image_losses(module, *b), images, mask, keys)
            known = torch.cat([worst, losses.nan_to_num(torch.inf)])
            worst, chosen = known.topk(self.num_images)
            places = torch.cat([places, index])[chosen]
        worst = trainer.strategy.all_gather(worst).flatten()
        places = trainer.strategy.all_gather(places).flatten()
        found: dict[int, float] = {}  # ranks may share an image that fills up their last batch
        for i in worst.argsort(descending=True).tolist():
            if places[i] >= 0:
                found.setdefault(int(places[i]), float(worst[i]))
        chosen_places = list(found)[: self.num_images]
        return [found[place] for place in chosen_places], chosen_places

    def _list(self, trainer: L.Trainer, rows: list[list[Any]]) -> None:
        if self.folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            path: Path = self.folder.parent / f"{self.NAME}.csv"
            with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                csv.writer(file).writerows([HEADER, *rows])
        except OSError as error:  # a full disk costs the table, not the run
            rank_zero_warn(f"no table: {error}")


def image_losses(module: Any, images: Tensor, mask: Tensor, keys: Tensor) -> Tensor:
    """Masked loss of each image by itself.

    Args:
        module: A `SimMIM`.
        images: Normalised images, (B, C, H, W).
        mask: Cells, (B, h, w), True = hidden.
        keys: One key an image, (B,).

    Returns:
        The mean error over each image's hidden elements, (B,).
    """
    error = module.error(module(images, mask, keys), module.target(images)).float()
    error = error.mean(1, keepdim=True)  # over channels
    hidden = upsample_mask(mask, (error.shape[-2], error.shape[-1]))
    total = (error * hidden).flatten(1).sum(1)
    return total / hidden.flatten(1).sum(1).clamp_min(1)
