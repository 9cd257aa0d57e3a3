"""What a person sees of a detector: boxes beside the truth, and on the images of a folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from faster_coco_eval.core import mask as coco_mask
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from simmim.callbacks.base import call, datamodule, last_step, undisturbed
from simmim.callbacks.boxes import board_boxes, draw_boxes, enlarge, select
from simmim.callbacks.pictures import draw_table
from simmim.callbacks.schedule import EpochPictures, save_png
from simmim.callbacks.writer import ResultsWriter


class Detections(EpochPictures):
    """Draw what is found in the same few validation images, beside what is there.

    `detections/epoch_0007.png` in the run's folder is the model after seven epochs; TensorBoard
    gets the same picture, and W&B the images with their boxes.

    Args:
        every_n_epochs: Epochs between two pictures; the last epoch always has one. 0 draws none.
        num_images: Validation images to draw, spread evenly over the data set.
        min_score: Score from which a box is drawn.
    """

    NAME, CONTENT = "detections", "what it finds"

    def __init__(
        self, every_n_epochs: int = 10, num_images: int = 4, min_score: float = 0.3
    ) -> None:
        super().__init__(every_n_epochs, num_images)
        self.min_score = min_score
        self._batch: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the run's folder, which every process must ask for."""
        super().setup(trainer, pl_module, stage)
        self._batch = None

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule, epochs: int) -> bool:
        """Draw what is found beside what is there."""
        samples_to_draw = getattr(datamodule(trainer), "samples_to_draw", None)
        if samples_to_draw is None:
            return False
        module: Any = pl_module
        with undisturbed(pl_module):
            if self._batch is None:
                self._batch = samples_to_draw(self.num_images)
            batch = trainer.strategy.batch_to_device(self._batch, dataloader_idx=0)
            images = module.inputs(batch)
            found = call(trainer, module.find, images, batch["size"], batch["original"])
        if trainer.is_global_zero:
            shown = [select(_on_cpu(one), self.min_score) for one in found]
            self._keep(trainer, shown, module.class_names, epochs)
        return True

    def _keep(
        self, trainer: L.Trainer, found: list[dict[str, Tensor]], names: list[str], epochs: int
    ) -> None:
        batch = self._batch
        rows = []
        for picture, truth, one, size in zip(
            batch["picture"], batch["truth"], found, batch["original"].tolist(), strict=True
        ):
            drawn = {"truth": truth, "prediction": one}
            rows.append({k: draw_boxes(picture, v, names, tuple(size)) for k, v in drawn.items()})

        def to_wandb(logger: WandbLogger) -> None:
            self._keep_on_board(logger, found, names, last_step(trainer))

        self.keep(trainer, draw_table(rows), epochs, to_wandb)

    def _keep_on_board(
        self, logger: WandbLogger, found: list[dict[str, Tensor]], names: list[str], step: int
    ) -> None:
        pictures = [enlarge(picture) for picture in self._batch["picture"]]
        boxes = []
        for picture, one, truth, size in zip(
            pictures, found, self._batch["truth"], self._batch["original"].tolist(), strict=True
        ):
            scale = picture.width / size[1]
            boxes.append(
                {
                    "prediction": board_boxes(one, names, scale),
                    "truth": board_boxes(truth, names, scale),
                }
            )
        logger.log_image(self.NAME, pictures, step, boxes=boxes)


class DetectionWriter(ResultsWriter):
    """Write what `predict` finds: a picture for each image, and `predictions.json` for programs.

    `predictions/cats/1.png` is named after its image; `predictions.json` in the run's folder
    holds all of them in COCO's results format, with the image's path as `file_name`. Image ids are
    those of data.annotations, or else count from 1 in the order of the paths.

    Args:
        min_score: Score from which a box is drawn; the json has all that the model reports.
    """

    RESULTS = "predictions.json"

    def __init__(self, min_score: float = 0.3) -> None:
        super().__init__()
        self.min_score = min_score

    def write(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any) -> None:
        """Write a picture and the results of each image of the batch."""
        image_id = getattr(datamodule(trainer), "image_id", lambda index: index + 1)
        sizes, places = batch["original"].tolist(), batch["index"].tolist()
        for i, (found, place) in enumerate(zip(outputs, places, strict=True)):
            found = _on_cpu(found)
            path = str(batch["path"][i])
            shown = select(found, self.min_score)
            picture = draw_boxes(batch["picture"][i], shown, module.class_names, tuple(sizes[i]))
            save_png(picture, self.run / "predictions" / self.names(path))
            about = {"image_id": image_id(place), "file_name": self.names.relative(path)}
            results = [{**about, **one} for one in coco_results(found, module.category_ids)]
            self.part.write(json.dumps([place, results]) + "\n")

    def merge(self, module: Any, parts: Sequence[Path]) -> None:
        """Put the results of all processes together, and say where they are."""
        lines = [line for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
        by_place = dict(json.loads(line) for line in lines)
        results = [one for place in sorted(by_place) for one in by_place[place]]
        (self.run / self.RESULTS).write_text(json.dumps(results), encoding="utf-8")
        print(f"Pictures of what it finds: {self.run / 'predictions'}")
        print(f"The same for programs (COCO): {self.run / self.RESULTS}")


def coco_results(found: Mapping[str, Tensor], category_ids: list[int]) -> list[dict[str, Any]]:
    """Say what was found in an image in COCO's results format, without the image's id.

    Args:
        found: boxes, labels, scores and masks in pixels of the image.
        category_ids: Number of each class; empty: they count from 1.
    """
    results = []
    for i, box in enumerate(found["boxes"].tolist()):
        left, top, right, bottom = box
        label = int(found["labels"][i])
        result: dict[str, Any] = {
            "category_id": category_ids[label] if category_ids else label + 1,
            "bbox": [round(value, 2) for value in (left, top, right - left, bottom - top)],
            "score": round(float(found["scores"][i]), 5),
        }
        if "masks" in found:
            runs = coco_mask.encode(np.asfortranarray(found["masks"][i].numpy().astype(np.uint8)))
            result["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode()}
        results.append(result)
    return results


def _on_cpu(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in found.items()}
