"""`simmim benchmark step`: how fast the model trains when no image is waited for."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from simmim.benchmark.experiment import Experiment, open_experiment, train
from simmim.benchmark.record import check_out, describe, machine, write_record


@dataclass(frozen=True)
class StepSpeed:
    """What came out.

    Attributes:
        config: Of what.
        batch_size: Images of a step.
        images_per_s: Of the training step, without the loader.
        machine: Where.
    """

    config: str
    batch_size: int
    images_per_s: float
    machine: dict[str, Any] = field(default_factory=machine)

    def __str__(self) -> str:
        return (
            f"training step of {self.config} on {describe(self.machine)}: "
            f"{self.images_per_s:,.1f} images/s with batches of {self.batch_size}"
        )


def step(
    config: list[str] | None = None,
    batch_size: int | None = None,
    seconds: float = 10,
    accelerator: str | None = None,
    precision: str | None = None,
    out: str | None = None,
) -> StepSpeed:
    """Measure the training step of a config, with images that are there already.

    Args:
        config: Configs of `simmim pretrain`, by name or file (-c); the demo's by default.
        batch_size: Images in a batch; by default the config's.
        seconds: How long to measure.
        accelerator: cpu, gpu, ... (Lightning's); by default the config's.
        precision: 32-true, bf16-mixed, ... (Lightning's); by default the config's.
        out: New JSON file for the figures.

    Returns:
        What came out; it prints as a sentence.

    Raises:
        ValueError: If there is no such config.
    """
    check_out(out)
    experiment = open_experiment(
        config, trainer={"accelerator": accelerator, "precision": precision}
    )
    size = batch_size or experiment.data.batch_size
    speed = StepSpeed(experiment.name, size, step_rate(experiment, size, seconds))
    write_record(out, {"step": {"batch_size": size, "images_per_s": speed.images_per_s}})
    return speed


def step_rate(experiment: Experiment, batch_size: int, seconds: float) -> float:
    """Train with one batch of random images, again and again.

    Args:
        experiment: What is trained.
        batch_size: Images in the batch.
        seconds: How long, after the warm-up.

    Returns:
        Images/s.
    """
    shape = (batch_size, experiment.data.in_chans, *experiment.data.img_size)
    batch = {
        "image": torch.randint(0, 256, shape, dtype=torch.uint8),
        "index": torch.arange(batch_size),
    }
    durations = train(experiment, Batches(batch), seconds)
    return batch_size * len(durations) / sum(durations)


class Batches:
    """One batch, a thousand times an epoch.

    Args:
        batch: A dict as the loader gives it.

    Attributes:
        batch_size: Its images, which the learning rate follows.
    """

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch, self.batch_size = batch, len(batch["image"])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return repeat(self.batch, len(self))

    def __len__(self) -> int:
        return 1000
