"""`simmim benchmark`: the loader, the training step, and both together."""

from dataclasses import asdict, dataclass, field
from typing import Any

from simmim.base.progress import Bar
from simmim.commands.benchmark.data import advance, loader_rate
from simmim.commands.benchmark.experiment import open_experiment, step_rate, train
from simmim.commands.benchmark.record import check_out, describe, machine, write_record


@dataclass(frozen=True)
class Speed:
    """What came out, in images/s.

    Attributes:
        config: Of what.
        batch_size: Images of a step.
        loader: The loader alone.
        step: The training step alone, with images that are there already.
        both: Training, as it is.
        machine: Where.
    """

    config: str
    batch_size: int
    loader: float
    step: float
    both: float
    machine: dict[str, Any] = field(default_factory=machine)

    def __str__(self) -> str:
        rows = {"loader": self.loader, "step": self.step, "both": self.both}
        lines = [f"  {name:<8}{rate:>12,.1f} images/s" for name, rate in rows.items()]
        head = f"{self.config}, batches of {self.batch_size}, on {describe(self.machine)}"
        return "\n".join(["", head, *lines])


def together(
    root: str | None = None,
    config: list[str] | None = None,
    workers: int | None = None,
    batch_size: int | None = None,
    seconds: float = 10,
    accelerator: str | None = None,
    precision: str | None = None,
    out: str | None = None,
) -> Speed:
    """Measure the loader, the training step, and training with both.

    Args:
        root: Folder of images, or a packed one; the config's images by default.
        config: Configs of `simmim pretrain`, by name or file (-c); the demo's by default.
        workers: Processes that read images; by default as in training.
        batch_size: Images in a batch; by default the config's.
        seconds: How long to measure each.
        accelerator: cpu, gpu, ... (Lightning's); by default the config's.
        precision: 32-true, bf16-mixed, ... (Lightning's); by default the config's.
        out: New JSON file for the figures.

    Returns:
        What came out; it prints as a table.

    Raises:
        ValueError: If there is no such config, or no images.
    """
    check_out(out)
    experiment = open_experiment(
        config,
        data={"root": root, "num_workers": workers, "batch_size": batch_size},
        trainer={"accelerator": accelerator, "precision": precision},
    )
    data = experiment.data
    data.setup("fit")
    size = min(data.batch_size, data.num_train)
    with Bar(total=3, desc="Loader", leave=False) as bar:
        loader = loader_rate(data, seconds)
        advance(bar, "Step")
        alone = step_rate(experiment, size, seconds)
        advance(bar, "Both together")
        durations = train(experiment, data, seconds)
    both = size * len(durations) / sum(durations)
    speed = Speed(experiment.name, size, loader, alone, both)
    write_record(out, {name: v for name, v in asdict(speed).items() if name != "machine"})
    return speed
