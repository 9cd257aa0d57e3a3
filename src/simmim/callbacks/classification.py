"""What a person sees of a classifier: which classes it takes for which, and its predictions."""

import csv
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from simmim.callbacks.base import last_step
from simmim.callbacks.pictures import BACKGROUND, INK
from simmim.callbacks.schedule import check_every_n_epochs, show
from simmim.callbacks.writer import TEXT, ResultsWriter

NAMED, NUMBERED = 40, 20  # classes up to which rows have names, and cells numbers
MOST, LEAST = (8, 48, 107), (247, 251, 255)  # colours of all and of none of a class's images
MOST_ON_BOARD = 100  # classes up to which W&B's own chart is made: it has a row for each pair


class ConfusionMatrix(L.Callback):
    """Draw which classes are taken for which, and list what each class is worth.

    `confusion_matrix.png` and `classes.csv` in the run's folder belong to the last evaluation; W&B
    and TensorBoard get the picture. Several labels an image have the table alone.

    Args:
        every_n_epochs: Epochs between two pictures; the last epoch always has one. 0 draws none.
    """

    def __init__(self, every_n_epochs: int = 10) -> None:
        check_every_n_epochs(every_n_epochs)
        self.every_n_epochs = every_n_epochs
        self._undrawn = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw every few epochs."""
        if not self.every_n_epochs or trainer.sanity_checking:
            return
        self._undrawn = True
        if trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the last evaluation, however the run came to its end."""
        if self._undrawn:
            self._draw(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the test's."""
        if self.every_n_epochs:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._undrawn = False
        folder = trainer.log_dir or trainer.default_root_dir  # every process must ask
        module: Any = pl_module
        counts: Tensor | None = module.confusion_matrix
        labels: dict[str, Tensor] | None = module.label_scores
        if not trainer.is_global_zero or (counts is None and labels is None):
            return
        picture = None if counts is None else draw_confusion(counts, module.class_names)
        if picture is not None:
            name = "confusion_matrix"

            def to_wandb(logger: WandbLogger) -> None:
                logger.log_image(name, [picture], last_step(trainer))
                assert counts is not None
                if len(counts) <= MOST_ON_BOARD:
                    chart = board_confusion(counts, module.class_names)
                    logger.log_metrics({"confusion": chart}, last_step(trainer))

            show(trainer, name, picture, to_wandb)
        if trainer.fast_dev_run or (not trainer.loggers and trainer.state.fn != "fit"):  # type: ignore[attr-defined]
            return
        table = class_rows(counts, labels or {}, module.class_names)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with (Path(folder) / "classes.csv").open("w", **TEXT) as file:
                csv.writer(file).writerows(table)
            if picture is not None:
                picture.save(Path(folder) / "confusion_matrix.png")
        except OSError as error:  # a full disk costs the picture, not the run
            rank_zero_warn(f"no picture: {error}")


def board_confusion(counts: Tensor, names: Sequence[str]) -> Any:
    """Make W&B's own chart of a confusion matrix.

    Args:
        counts: (label, prediction), (K, K).
        names: Of the classes.
    """
    import wandb

    rows = [
        [names[i], names[j], count]
        for i, row in enumerate(counts.tolist())
        for j, count in enumerate(row)
    ]
    columns = ["Actual", "Predicted", "nPredictions"]
    return wandb.plot_table(
        "wandb/confusion_matrix/v1",
        wandb.Table(columns=columns, data=rows),
        {column: column for column in columns},
        {"title": "confusion"},
    )


class PredictionTable(ResultsWriter):
    """Write `predictions.csv` into the run's folder: path, label and probabilities of each image.

    The label is the most probable class, or with several labels an image those above one half,
    separated by ";". Rows are in the order of the images, whatever process saw them. Those of an
    earlier call stay: the next are `predictions_2.csv`, and so on.
    """

    RESULTS = "predictions.csv"

    def write(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any) -> None:
        """Write the rows of a batch."""
        names, several = module.class_names, module.multi_label
        paths = batch.get("path") if isinstance(batch, Mapping) else None
        writer = csv.writer(self.part)
        for i, row in enumerate(outputs["probabilities"].float().cpu().tolist()):
            place = int(batch["index"][i]) if paths else self.next_place(trainer)
            path = paths[i] if paths else f"{place:06d}"
            shares = [f"{value:.6g}" for value in row]
            writer.writerow([place, path, label_of(row, names, several), *shares])

    def merge(self, module: Any, parts: Sequence[Path]) -> None:
        """Put the rows of all processes together, and say where they are."""
        header = ["path", "label", *(f"probability of {name}" for name in module.class_names)]
        target = _free(self.run / self.RESULTS)
        merge_parts(parts, target, header)
        print(f"Predictions: {target}")


def label_of(row: Sequence[float], names: Sequence[str], several: bool) -> str:
    """Name the predicted class, or of several labels those that are more likely than not."""
    if several:
        return ";".join(name for name, share in zip(names, row, strict=True) if share > 0.5)
    return names[max(range(len(row)), key=row.__getitem__)]


def merge_parts(parts: Sequence[Path], target: Path, header: Sequence[str]) -> None:
    """Merge tables whose first column is the place of a row, each once."""
    rows: dict[int, list[str]] = {}
    for part in parts:
        with part.open(**TEXT) as file:
            rows |= {int(place): row for place, *row in csv.reader(file)}
    with target.open("w", **TEXT) as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows[place] for place in sorted(rows))


def draw_confusion(counts: Tensor, names: Sequence[str]) -> Image.Image:
    """Draw a confusion matrix: a row for each class, shaded by the share predicted as each column.

    Args:
        counts: (label, prediction), (K, K).
        names: Of the classes.

    Returns:
        The picture, RGB. Up to 40 classes are named, of more some have their number, from 0. Up to
        20 have their counts in the cells.
    """
    n, font = len(names), ImageFont.load_default(size=12)
    cell = max(34, 240 // n) if n <= NUMBERED else max(2, 640 // n)
    shown = _row_names(names, font)
    margin = 28 + max(int(font.getlength(name)) for name in shown)
    side = cell * n
    picture = Image.new("RGB", (margin + side + 8, margin + side + 8), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    shares = (counts / counts.sum(1, keepdim=True).clamp_min(1)).cpu().numpy()[..., None]
    colours = np.array(LEAST) + shares * (np.array(MOST) - np.array(LEAST))
    table = Image.fromarray(colours.round().astype(np.uint8))
    picture.paste(table.resize((side, side), Image.Resampling.NEAREST), (margin, margin))
    draw.rectangle((margin - 1, margin - 1, margin + side, margin + side), outline=INK)
    _draw_names(picture, shown, margin, cell, font)
    if n <= NUMBERED:
        for row, column in counts.nonzero().tolist():
            middle = (margin + (column + 0.5) * cell, margin + (row + 0.5) * cell)
            ink = BACKGROUND if shares[row, column, 0] > 0.5 else INK
            draw.text(middle, _brief(int(counts[row, column])), fill=ink, font=font, anchor="mm")
    draw.text((margin + side / 2, 10), "prediction", fill=INK, font=font, anchor="mm")
    _draw_upright(picture, "label", (10, margin + side // 2), font)
    return picture


def _row_names(names: Sequence[str], font: Any) -> list[str]:
    """What stands beside each row: its name, or its number where that cannot be drawn."""
    if len(names) > NAMED:
        step = 10 if len(names) <= 400 else 100
        return [str(i) if i % step == 0 else "" for i in range(len(names))]
    unknown = bytes(font.getmask("\uffff"))  # the box that stands for what the font lacks
    drawn = [all(bytes(font.getmask(c)) != unknown for c in name) for name in names]
    short = [name if len(name) <= 18 else f"{name[:9]}…{name[-8:]}" for name in names]
    return [
        name if ok else f"class {i}" for i, (name, ok) in enumerate(zip(short, drawn, strict=True))
    ]


def _brief(count: int) -> str:
    """A count in four characters."""
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k"


def _draw_names(
    picture: Image.Image, names: Sequence[str], margin: int, cell: int, font: Any
) -> None:
    draw = ImageDraw.Draw(picture)
    lengths = [int(font.getlength(name)) for name in names]
    upright = max(lengths) > cell - 4  # a name of each column would run into the next
    for i, (name, length) in enumerate(zip(names, lengths, strict=True)):
        if not name:
            continue
        middle = margin + int((i + 0.5) * cell)
        draw.text((margin - 4, middle), name, fill=INK, font=font, anchor="rm")
        if upright:
            _draw_upright(picture, name, (middle, margin - 4 - length // 2), font)
        else:
            draw.text((middle, margin - 4), name, fill=INK, font=font, anchor="mb")


def _draw_upright(picture: Image.Image, text: str, middle: tuple[int, int], font: Any) -> None:
    """Write a line from below upwards."""
    line = Image.new("RGB", (int(font.getlength(text)) + 2, 16), BACKGROUND)
    ImageDraw.Draw(line).text((1, 8), text, fill=INK, font=font, anchor="lm")
    line = line.rotate(90, expand=True)
    picture.paste(line, (middle[0] - line.width // 2, middle[1] - line.height // 2))


def class_rows(
    counts: Tensor | None, labels: Mapping[str, Tensor], names: Sequence[str]
) -> list[list[str]]:
    """Make a table of what each class is worth, and its header.

    Args:
        counts: The confusion matrix, (K, K); None with several labels an image.
        labels: With several, `images` that have each label, and scores by name, (K,).
        names: Of the classes.

    Returns:
        Rows; what cannot be told stays empty.
    """
    if counts is None:
        header = ["class", *labels]
        columns = list(labels.values())
    else:
        header, images = ["class", "images", "recognised", "accuracy"], counts.sum(1)
        columns = [images, counts.diagonal(), counts.diagonal() / images]
    cells = [
        ["" if v != v else f"{v:.4f}" if isinstance(v, float) else str(v) for v in column.tolist()]
        for column in columns
    ]
    return [header, *([name, *row] for name, *row in zip(names, *cells, strict=True))]


def _free(path: Path) -> Path:
    """The path, or with a number behind it the first that is not taken."""
    numbered = (path.with_stem(f"{path.stem}_{n}") for n in count(2))
    return next(p for p in chain([path], numbered) if not p.exists())
