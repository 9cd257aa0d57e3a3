"""Draw boxes, masks, names and scores on pictures: pure functions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

from simmim.callbacks.pictures import BACKGROUND, INK, to_rgb, to_unit

SIDE = 512  # px that the longer side of a picture should have at least, so that names fit
COLOURS = (  # of the classes: Tableau's ten, and their lighter halves
    *((31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189)),
    *((23, 190, 207), (227, 119, 194), (188, 189, 34), (140, 86, 75), (127, 127, 127)),
    *((174, 199, 232), (255, 152, 150), (152, 223, 138), (255, 187, 120), (197, 176, 213)),
    *((158, 218, 229), (247, 182, 210), (219, 219, 141), (196, 156, 148), (199, 199, 199)),
)
IGNORED, DASH = (150, 150, 150), 6  # colour, and px of a dash and a gap


def draw_boxes(
    picture: Tensor, found: Mapping[str, Tensor], names: Sequence[str], original: tuple[int, int]
) -> Image.Image:
    """Draw what was found, or is to be found, in an image.

    Args:
        picture: Of the image, at any size, uint8 or 0..1, (C, h, w); a small one is enlarged.
        found: boxes (n, 4) and masks (n, H, W) in pixels of the original, labels, and scores where
            it is a prediction; iscrowd, true of what is ignored, where it is not.
        names: Of the classes.
        original: Height and width.

    Returns:
        The picture, RGB.
    """
    canvas = enlarge(picture)
    if len(found["boxes"]) and "masks" in found:
        canvas = _draw_masks(canvas, found)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    scale = np.array([canvas.width / original[1], canvas.height / original[0]] * 2)
    scores = found["scores"].tolist() if "scores" in found else None
    boxes = found["boxes"].float().cpu().numpy() * scale
    labels = found["labels"].tolist()
    ignored = _ignored(found)
    colours = [
        IGNORED if skip else COLOURS[label % len(COLOURS)]
        for label, skip in zip(labels, ignored, strict=True)
    ]
    for box, colour, skip in zip(boxes, colours, ignored, strict=True):
        _draw_dashes(draw, box) if skip else draw.rectangle([*box], outline=colour, width=2)
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):  # above all lines
        text = names[label] if scores is None else f"{names[label]} {scores[i]:.2f}"
        text = f"{text} (ignored)" if ignored[i] else text
        _draw_name(draw, text, box, colours[i], font)
    return canvas


def enlarge(picture: Tensor) -> Image.Image:
    """Turn (C, h, w), uint8 or 0..1, into a picture that names can be written on."""
    image = Image.fromarray(to_rgb(to_unit(picture)[None])[0])
    scale = SIDE / max(image.size)
    if scale <= 1:
        return image
    size = round(image.width * scale), round(image.height * scale)
    return image.resize(size, Image.Resampling.BICUBIC)


def select(found: Mapping[str, Tensor], min_score: float) -> dict[str, Tensor]:
    """Keep what has at least this score."""
    kept = found["scores"] >= min_score
    return {name: tensor[kept] for name, tensor in found.items()}


def board_boxes(found: Mapping[str, Tensor], names: Sequence[str], scale: float) -> dict[str, Any]:
    """Say boxes as W&B's `Image(boxes={name: ...})` takes them.

    Args:
        found: As in `draw_boxes`.
        names: Of the classes.
        scale: Pixels of the board's picture in one of the original.
    """
    data = []
    scores = found["scores"].tolist() if "scores" in found else [None] * len(found["boxes"])
    labels = found["labels"].tolist()
    each = zip(found["boxes"].tolist(), labels, scores, _ignored(found), strict=True)
    for box, label, score, ignored in each:
        if ignored:
            continue
        left, top, right, bottom = (value * scale for value in box)
        position = {"minX": left, "minY": top, "maxX": right, "maxY": bottom}
        caption = names[label] if score is None else f"{names[label]} {score:.2f}"
        entry = {"position": position, "class_id": label, "domain": "pixel", "box_caption": caption}
        data.append(entry if score is None else {**entry, "scores": {"score": score}})
    return {"box_data": data, "class_labels": dict(enumerate(names))}


def _ignored(found: Mapping[str, Tensor]) -> list[bool]:
    """Which objects count neither for nor against a detector."""
    if "iscrowd" not in found:
        return [False] * len(found["boxes"])
    return [bool(crowd) for crowd in found["iscrowd"].tolist()]


def _draw_dashes(draw: Any, box: Any) -> None:
    left, top, right, bottom = (int(edge) for edge in box)
    for x in range(left, right, 2 * DASH):
        for y in (top, bottom):
            draw.line([x, y, min(x + DASH, right), y], fill=IGNORED, width=2)
    for y in range(top, bottom, 2 * DASH):
        for x in (left, right):
            draw.line([x, y, x, min(y + DASH, bottom)], fill=IGNORED, width=2)


def _draw_masks(canvas: Image.Image, found: Mapping[str, Tensor]) -> Image.Image:
    counted = ~torch.tensor(_ignored(found), dtype=torch.bool)
    found = {name: found[name].cpu()[counted] for name in ("masks", "labels")}
    masks = found["masks"][:, None].float()
    size = (canvas.height, canvas.width)
    masks = torch.nn.functional.interpolate(masks, size, mode="nearest-exact")[:, 0] > 0.5
    colours = [COLOURS[label % len(COLOURS)] for label in found["labels"].tolist()]
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1)
    drawn = draw_segmentation_masks(pixels, masks, alpha=0.5, colors=colours)
    return Image.fromarray(drawn.permute(1, 2, 0).numpy())


def _draw_name(draw: Any, text: str, box: Any, colour: tuple[int, int, int], font: Any) -> None:
    """Write above a box, or inside where it touches the upper edge, on its colour."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(box[0], 0), max(draw.im.size[0] - width, 0))
    y = box[1] - height if box[1] >= height else box[1]
    draw.rectangle([x, y, x + width, y + height], fill=colour)
    light = sum(w * c for w, c in zip((0.299, 0.587, 0.114), colour, strict=True)) > 150
    draw.text((x + 2 - left, y + 2 - top), text, fill=INK if light else BACKGROUND, font=font)
