"""What a person sees of a segmenter: overlays while it trains, and a mask for each image."""

import colorsys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import WandbLogger
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from simmim.callbacks.base import (
    batch_at,
    call,
    fixed_places,
    last_step,
    undisturbed,
)
from simmim.callbacks.pictures import BACKGROUND, GAP, INK, draw_panel
from simmim.callbacks.reconstructions import PredictionWriter
from simmim.callbacks.schedule import EpochPictures

Color = tuple[int, int, int]

SIDE = 320  # px of a picture's longer side in a panel
SWATCH = 12  # px of a colour in the legend
STRENGTH = 0.6  # of the colours over the image
BYTE = 256  # values of an 8-bit mask


class Segmentations(EpochPictures):
    """Draw the same few validation images with their classes every few epochs.

    Rows are images; columns the image, its mask, and what is predicted, both in the classes'
    colours over the image; pixels without a class are left as they are. Below are the colours'
    names. `segmentations/epoch_0007.png` in the run's folder is the model after seven epochs;
    TensorBoard gets the same picture, W&B the images with masks that can be switched on and off.

    Args:
        every_n_epochs: Epochs between two pictures; the last epoch always has one. 0 draws none.
        num_images: Validation images to draw, spread evenly over the data set.
    """

    NAME, CONTENT = "segmentations", "its segmentations"

    def __init__(self, every_n_epochs: int = 10, num_images: int = 6) -> None:
        super().__init__(every_n_epochs, num_images)

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule, epochs: int) -> bool:
        """Draw what it makes of the images."""
        with undisturbed(pl_module):
            found = segment_samples(trainer, self.num_images)
        if found and trainer.is_global_zero:
            self._keep(trainer, pl_module, found, epochs)
        return True

    def _keep(self, trainer: L.Trainer, module: Any, found: list["Segmented"], epochs: int) -> None:
        names, colors = module.class_names, module.colors or distinct_colors(module.num_classes)

        def to_wandb(logger: WandbLogger) -> None:
            images, masks = for_board(found, names)
            logger.log_image(self.NAME, images, last_step(trainer), masks=masks)

        self.keep(trainer, draw_segmentations(found, names, colors), epochs, to_wandb)


class MaskWriter(PredictionWriter):
    """Write a mask for each image of a folder into `predictions/` of the run's folder.

    A PNG whose pixels are the values of the classes, as in the training masks; its palette shows
    them in the classes' colours. It is named after its image, with folders kept:
    `predictions/cats/1.png`, or `1.jpg.png` beside a `1.tif`.
    """

    CONTENT = "Masks that it predicts"

    def draw(self, module: Any, outputs: Any) -> Iterator[Image.Image]:
        """Draw the mask of each image of a batch."""
        values = module.values or range(module.num_classes)
        colors = module.colors or distinct_colors(module.num_classes)
        for classes in outputs["classes"]:
            yield index_picture(classes, values, colors)


class Segmented(NamedTuple):
    """An image in 0..1, (C, H, W), its mask, and the prediction, (H, W); -1 = no class."""

    image: Tensor
    mask: Tensor
    predicted: Tensor


def segment_samples(trainer: L.Trainer, n: int) -> list[Segmented]:
    """Segment a few validation images, spread evenly over the data set.

    Args:
        trainer: The trainer of a `Segmenter`.
        n: Number of images; no more than there are.

    Returns:
        The same images in every epoch and every run, on the CPU; none without validation images.
    """
    fixed = fixed_places(trainer, n)
    if fixed is None:
        return []
    loader, places = fixed
    found = []
    module: Any = trainer.lightning_module
    for place in places:
        images, masks = module.inputs(batch_at(trainer, loader, [place]))
        logits = call(trainer, module.forward, images)
        mask = masks[0].cpu()
        predicted = F.interpolate(logits.float(), mask.shape, mode="bilinear").argmax(1)[0].cpu()
        image = (images * module.std + module.mean)[0].cpu()
        found.append(Segmented(image, mask, predicted))
    return found


def draw_segmentations(
    found: Sequence[Segmented], names: Sequence[str], colors: Sequence[Color]
) -> Image.Image:
    """Draw images beside their masks and predictions, with a legend of the classes below."""
    rows = [_shrink(each) for each in found]
    height = max(row.mask.shape[0] for row in rows)
    width = max(row.mask.shape[1] for row in rows)
    columns: dict[str, list[Tensor]] = {"image": [], "mask": [], "predicted": []}
    for row in rows:
        image = _rgb(row.image)
        columns["image"].append(image)
        columns["mask"].append(overlay(image, row.mask, colors))
        columns["predicted"].append(overlay(image, row.predicted, colors))
    pictures = {
        name: torch.stack([_fit(picture, height, width) for picture in pictures])
        for name, pictures in columns.items()
    }
    panel = draw_panel(pictures, side=SIDE)
    present = sorted({int(c) for each in found for c in (*each[1].unique(), *each[2].unique())})
    shown = [i for i in present if i >= 0]
    legend = draw_legend([names[i] for i in shown], [colors[i] for i in shown], panel.width)
    whole = Image.new("RGB", (panel.width, panel.height + legend.height), BACKGROUND)
    whole.paste(panel, (0, 0))
    whole.paste(legend, (0, panel.height))
    return whole


def draw_legend(names: Sequence[str], colors: Sequence[Color], width: int) -> Image.Image:
    """Draw the colours with their names, in as many lines as they need."""
    font, line = ImageFont.load_default(size=13), 2 * SWATCH
    places, left, top = [], GAP, 0
    for name in names:
        length = SWATCH + GAP + int(font.getlength(name)) + 3 * GAP
        if left > GAP and left + length > width:
            left, top = GAP, top + line
        places.append((left, top))
        left += length
    picture = Image.new("RGB", (width, top + line), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for name, color, (left, top) in zip(names, colors, places, strict=True):
        draw.rectangle((left, top + 5, left + SWATCH, top + 5 + SWATCH), fill=color, outline=INK)
        draw.text((left + SWATCH + GAP, top + line // 2), name, fill=INK, font=font, anchor="lm")
    return picture


def overlay(image: Tensor, classes: Tensor, colors: Sequence[Color]) -> Tensor:
    """Lay the classes' colours over an image, (3, H, W) in 0..1, where there is a class.

    The image is gray there, so that the colours are those of the legend.
    """
    palette = torch.tensor([(0, 0, 0), *colors]) / 255
    painted = palette[classes.long() + 1].permute(2, 0, 1)  # HWC -> CHW
    gray = image.mean(0, keepdim=True)
    return torch.where(classes >= 0, gray * (1 - STRENGTH) + painted * STRENGTH, image)


def distinct_colors(n: int) -> list[Color]:
    """Choose n colours that are easy to tell apart: hues by the golden ratio, in three shades."""
    shades = ((0.75, 0.95), (0.95, 0.65), (0.4, 1.0))  # saturation, value
    found = []
    for i in range(n):
        red, green, blue = colorsys.hsv_to_rgb(i * 0.618034 % 1, *shades[i % 3])
        found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return found


def index_picture(classes: Tensor, values: Sequence[int], colors: Sequence[Color]) -> Image.Image:
    """Turn classes, (H, W), into a picture of their values: with a palette, or of 16 bits."""
    pixels = np.asarray(values)[classes.cpu().numpy()]
    if max(values) >= BYTE:
        return Image.fromarray(pixels.astype(np.uint16))
    picture = Image.fromarray(pixels.astype(np.uint8), mode="P")
    palette: NDArray[np.uint8] = np.zeros((BYTE, 3), np.uint8)
    palette[list(values)] = colors
    picture.putpalette(palette.tobytes())
    return picture


def for_board(
    found: Sequence[Segmented], names: Sequence[str]
) -> tuple[list[Image.Image], list[dict[str, Any]]]:
    """Images and masks as W&B shows them; its masks have values below 256, so void is 255."""
    images, masks = [], []
    labels = dict(enumerate(names[: BYTE - 1]))
    for each in found:
        pixels = (_rgb(each.image) * 255).round().byte().permute(1, 2, 0)  # CHW -> HWC
        size = each.mask.shape[1], each.mask.shape[0]
        images.append(Image.fromarray(pixels.numpy()).resize(size))
        masks.append(
            {
                name: {"mask_data": _bytes(classes), "class_labels": {**labels, BYTE - 1: "void"}}
                for name, classes in (("mask", each.mask), ("predicted", each.predicted))
            }
        )
    return images, masks


def _bytes(classes: Tensor) -> NDArray[np.uint8]:
    known = (classes >= 0) & (classes < BYTE - 1)
    return torch.where(known, classes, BYTE - 1).to(torch.uint8).numpy()


def _rgb(image: Tensor) -> Tensor:
    """One or two channels as gray, more as the first three, (C, H, W) -> (3, H, W) in 0..1."""
    image = image[:3] if len(image) >= 3 else image[:1]
    return image.float().nan_to_num(0).clamp(0, 1).expand(3, -1, -1)


def _shrink(each: Segmented) -> Segmented:
    """Bring an image and its masks to the size at which they are drawn."""
    height, width = each.mask.shape
    factor = min(SIDE / max(height, width), 1)
    size = max(round(height * factor), 1), max(round(width * factor), 1)
    image = F.interpolate(each.image[None], size, mode="bilinear", antialias=True)[0]
    rows = ((torch.arange(size[0]) + 0.5) / factor).long().clamp_max(height - 1)
    columns = ((torch.arange(size[1]) + 0.5) / factor).long().clamp_max(width - 1)
    mask, predicted = (classes[rows[:, None], columns] for classes in each[1:])
    return Segmented(image, mask, predicted)


def _fit(picture: Tensor, height: int, width: int) -> Tensor:
    """Put a picture, (3, H, W), into the middle of a white one."""
    down, right = height - picture.shape[1], width - picture.shape[2]
    margins = (right // 2, right - right // 2, down // 2, down - down // 2)
    return F.pad(picture, margins, value=1.0)
