"""What a classifier says of a few validation images, while it trains."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from simmim.callbacks.base import batch_at, call, fixed_places, undisturbed
from simmim.callbacks.classification import label_of
from simmim.callbacks.pictures import BACKGROUND, GAP, INK, fitting, to_rgb, to_unit
from simmim.callbacks.schedule import EpochPictures

SIDE, LINE, COLUMNS = 120, 16, 8  # px of a picture and of a line below it; pictures in a row
WRONG = (190, 20, 20)
HEADER = ["path", "label", "prediction", "probability"]


class BoardPredictions(EpochPictures):
    """Show what the classifier says of some validation images, every few epochs.

    Always of the same images, spread evenly over the data set. `val_predictions/epoch_0007.png` and
    `val_predictions.csv` (the last) lie in the run's folder; W&B gets a table of picture, path,
    label, prediction and probability, TensorBoard the picture and the list.

    Args:
        every_n_epochs: Epochs between two tables; the last epoch always has one. 0 makes none.
        num_images: Validation images to show.
    """

    NAME, CONTENT = "val_predictions", "what it says of some images"

    def __init__(self, every_n_epochs: int = 10, num_images: int = 32) -> None:
        super().__init__(every_n_epochs, num_images)

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule, epochs: int) -> bool:
        """Ask it, and keep what it says."""
        fixed = fixed_places(trainer, self.num_images)
        if fixed is None:
            return False
        loader, places = fixed
        batch = batch_at(trainer, loader, places)
        shown = batch if isinstance(batch, Mapping) else _named(pl_module, *batch)
        if "label" not in shown:
            return False
        with undisturbed(pl_module):
            found = call(trainer, lambda _: pl_module.predict_step(batch, 0), shown["image"])
        if trainer.is_global_zero:
            path = getattr(loader.dataset, "path", str)
            rows = _rows(pl_module, shown, found["probabilities"], [path(i) for i in places])
            pictures = [Image.fromarray(p) for p in to_rgb(to_unit(shown["image"]))]
            panel = draw_predictions(pictures, rows)
            self.keep_table(trainer, panel, epochs, HEADER, rows, pictures)
        return True


def draw_predictions(pictures: Sequence[Image.Image], rows: Sequence[Sequence[Any]]) -> Image.Image:
    """Draw images with what is said of them below, in red and with the label where it is wrong.

    Args:
        pictures: Of any size.
        rows: Path, label, prediction and probability of each.

    Returns:
        The panel, RGB.
    """
    columns = min(COLUMNS, len(pictures))
    width, height = SIDE + GAP, SIDE + 2 * LINE + GAP
    lines = -(-len(pictures) // columns)
    panel = Image.new("RGB", (GAP + columns * width, GAP + lines * height), BACKGROUND)
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(size=12)
    for i, (picture, (_, label, said, probability)) in enumerate(zip(pictures, rows, strict=True)):
        left, top = GAP + i % columns * width, GAP + i // columns * height
        scale = SIDE / max(picture.size)
        smooth = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC
        size = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
        panel.paste(picture.resize(size, smooth), (left, top))
        right = said == label
        texts = [f"{probability:.0%} {said}"] + ([] if right else [f"is {label}"])
        for line, text in enumerate(texts):
            place = left, top + size[1] + line * LINE
            draw.text(place, fitting(text, font, SIDE), fill=INK if right else WRONG, font=font)
    return panel


def _named(module: Any, images: Tensor, label: Tensor | None = None) -> dict[str, Tensor]:
    """A batch of a plain loader as ours are, its pixels before they were normalised."""
    if images.is_floating_point():
        images = (images * module.std + module.mean).clamp(0, 1)
    return {"image": images} if label is None else {"image": images, "label": label}


def _rows(
    module: Any, batch: Mapping[str, Tensor], shares: Tensor, paths: Sequence[str]
) -> list[list[Any]]:
    names, several = module.class_names, module.multi_label
    rows: list[list[Any]] = []
    for path, row, label in zip(paths, shares.float().cpu().tolist(), batch["label"], strict=True):
        truth = label_of(label.tolist(), names, True) if several else names[int(label)]
        rows.append([path, truth, label_of(row, names, several), round(max(row), 6)])
    return rows
