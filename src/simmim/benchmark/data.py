"""`simmim benchmark data`: how fast images are read, and whether that is fast enough."""

import time
from dataclasses import dataclass, field
from typing import Any

from simmim.benchmark.experiment import open_experiment
from simmim.benchmark.record import check_out, describe, machine, write_record
from simmim.data import ImageFolderData


@dataclass(frozen=True)
class LoaderSpeed:
    """What came out.

    Attributes:
        config: Of what.
        images_per_s: Of the loader.
        machine: Where.
    """

    config: str
    images_per_s: float
    machine: dict[str, Any] = field(default_factory=machine)

    def __str__(self) -> str:
        return (
            f"loader of {self.config} on {describe(self.machine)}: {self.images_per_s:,.1f} "
            "images/s"
        )


def data(
    root: str | None = None,
    config: list[str] | None = None,
    workers: int | None = None,
    batch_size: int | None = None,
    seconds: float = 10,
    out: str | None = None,
) -> LoaderSpeed:
    """Measure the loader of a config.

    Args:
        root: Folder of images, or a packed one; the config's images by default.
        config: Configs of `simmim pretrain`, by name or file (-c); the demo's by default.
        workers: Processes that read images; by default as in training.
        batch_size: Images in a batch; by default the config's.
        seconds: How long to measure.
        out: New JSON file for the figures.

    Returns:
        What came out; it prints as a sentence.

    Raises:
        ValueError: If there is no such config, or no images.
    """
    check_out(out)
    experiment = open_experiment(
        config, data={"root": root, "num_workers": workers, "batch_size": batch_size}
    )
    experiment.data.setup("fit")
    speed = LoaderSpeed(experiment.name, loader_rate(experiment.data, seconds))
    write_record(out, {"loader": {"images_per_s": speed.images_per_s}})
    return speed


def loader_rate(data: ImageFolderData, seconds: float) -> float:
    """Read batches of training images, and do nothing with them.

    Args:
        data: After its setup.
        seconds: How long, after the first batch.

    Returns:
        Images/s.
    """
    loader = data.train_dataloader()
    count, began = 0, None
    while True:  # epochs
        for batch in loader:
            if began is None:
                began = time.perf_counter()
                continue
            count += len(batch["image"])
            if time.perf_counter() - began >= seconds:
                return count / (time.perf_counter() - began)
