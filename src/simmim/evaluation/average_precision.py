"""How good boxes (and masks) are: COCO's mean average precision, over all processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

FEW = 20  # classes that are scored one by one
SCORES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")


class AveragePrecision:
    """torchmetrics' mean average precision, collected on the CPU.

    Processes may have seen different numbers of images, for which torchmetrics' own gathering would
    wait for ever: what they hold is gathered as objects.

    Args:
        class_names: Names of the classes.
        masks: Whether masks are scored beside boxes.
    """

    def __init__(self, class_names: Sequence[str], *, masks: bool) -> None:
        self.class_names, self.masks = list(class_names), masks
        self.metric = MeanAveragePrecision(
            iou_type=("bbox", "segm") if masks else "bbox",
            class_metrics=len(self.class_names) <= FEW,
            backend="faster_coco_eval",
            sync_on_compute=False,
        )

    def update(self, found: list[dict[str, Tensor]], truth: list[dict[str, Tensor]]) -> None:
        """Take a batch in.

        Args:
            found: Of each image boxes by their corners, scores, labels and, where they are scored,
                masks, bool, (n, H, W).
            truth: The same without scores, and iscrowd and area.
        """
        self.metric.update(*([_on_cpu(image) for image in images] for images in (found, truth)))

    def compute(self) -> dict[str, float]:
        """The scores by name, and begin anew.

        Returns:
            map, map_50, ..., map_class/NAME, and of masks mask_map, ... Without any object in the
            truth `map` is not a number, and what no object belongs to (a size, a class) is missing.
        """
        self._gather()
        result = self.metric.compute() if self.metric.detection_labels else {}
        self.metric.reset()
        scores: dict[str, float] = {}
        for kind, name in (("bbox_", ""), ("segm_", "mask_")) if self.masks else (("", ""),):
            scores |= self._named(result, kind, name)
        return scores

    def _named(self, result: Mapping[str, Tensor], kind: str, name: str) -> dict[str, float]:
        scores = {f"{name}{score}": float(result.get(f"{kind}{score}", -1)) for score in SCORES}
        each = result.get(f"{kind}map_per_class", torch.tensor(-1.0)).reshape(-1).tolist()
        seen = result.get("classes", torch.tensor([])).reshape(-1).tolist()
        if len(each) == len(seen):
            named = zip(seen, each, strict=True)
            scores |= {f"{name}map_class/{self.class_names[int(i)]}": value for i, value in named}
        whole = scores[f"{name}map"]
        known = {key: value for key, value in scores.items() if value >= 0}
        return {f"{name}map": whole if whole >= 0 else float("nan"), **known}

    def _gather(self) -> None:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        states = dict(self.metric.metric_state)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, states)
        for name in states:
            setattr(self.metric, name, [one for states in everyone for one in states[name]])


def _on_cpu(image: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in image.items()}
