"""`simmim benchmark data`: how fast images are read, and whether that is fast enough."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from simmim.base.progress import Bar
from simmim.commands.benchmark.experiment import Experiment, open_experiment, step_rate
from simmim.commands.benchmark.loader_profile import Endless, Feed, stage_times
from simmim.commands.benchmark.record import check_out, describe, machine, write_record
from simmim.data import ImageFolderData
from simmim.data.dataset import ImageData
from simmim.data.decode import UnreadableImage
from simmim.data.sampler import choose
from simmim.data.shards import is_packed

SAMPLE = 64  # images whose way is followed step by step
FIRST = 8  # images in a batch that a CPU is tried with first: a whole one could take minutes
LITTLE = 0.05  # share of the time that may be waited without a word


@dataclass(frozen=True)
class LoaderSpeed:
    """What came out.

    Attributes:
        config: Of what.
        root: Which images.
        batch_size: Images in a batch.
        stages: Seconds an image on one core, by stage.
        rates: Images/s of the loader, by the number of workers.
        workers: Processes that training would use.
        consumes: Images/s of the training step.
        tried: Images in the batch that it was measured with; None: it was given.
        on_cpu: Whether the step needs the same cores.
        packed: Whether the images are packed already.
        machine: Where.
    """

    config: str
    root: str
    batch_size: int
    stages: dict[str, float]
    rates: dict[int, float]
    workers: int
    consumes: float
    tried: int | None
    on_cpu: bool
    packed: bool = False
    machine: dict[str, Any] = field(default_factory=machine)

    @property
    def per_core(self) -> float:
        """Images/s that one core reads."""
        return 1 / sum(self.stages.values())

    @property
    def supply(self) -> float:
        """Images/s of the loader that training would use."""
        return self.rates[self.workers]

    @property
    def waits(self) -> float:
        """Share of the time that training waits for images; without workers they alternate."""
        if not self.workers:
            return self.consumes / (self.consumes + self.supply)
        return max(1 - self.supply / self.consumes, 0.0)

    @property
    def cure(self) -> int:
        """Workers that give what the model consumes."""
        one = self.supply / self.workers if self.workers else self.per_core
        return max(math.ceil(self.consumes / one), 1)

    def verdict(self) -> str:
        """Say whether training will starve, and what cures it."""
        sentence = (
            f"the loader gives {self.supply:,.1f} images/s {_with(self.workers)}, the model "
            f"consumes {self.consumes:,.1f}"
        )
        if self.waits <= LITTLE:
            return f"Training will not starve: {sentence}."
        cores, cure = self.machine["cores"], self.cure
        sentence = f"Training will starve {self.waits:.0%} of the time: {sentence}. "
        if cure == self.workers:  # more than enough in number, but not in cores
            cure += 1
        sentence += f"{_workers(cure).capitalize()} would cure it"
        if cure + self.on_cpu > cores:
            needs = " and one for the step" if self.on_cpu else ""
            takes = f"{cure} core" + "s" * (cure != 1)
            remedy = "smaller images" if self.packed else "the images packed (simmim pack)"
            return (
                f"{sentence}, but that takes {takes}{needs}, and this machine has {cores}: use "
                f"one with more, or {remedy}"
            )
        return f"{sentence} (--data.num_workers {cure}): this machine has {cores} cores"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with what follows from them."""
        derived = {name: getattr(self, name) for name in ("per_core", "supply", "waits", "cure")}
        plain = {name: v for name, v in asdict(self).items() if name != "machine"}
        return {**plain, **derived, "verdict": self.verdict()}

    def __str__(self) -> str:
        total = sum(self.stages.values())
        return "\n".join(
            [
                "",
                f"{self.config}, {self.root}, batches of {self.batch_size}, on "
                f"{describe(self.machine)}",
                "",
                f"  {'an image on one core':<22}{'ms':>9}{'share':>8}",
                *(
                    f"  {stage:<22}{1000 * spent:>9.3f}{spent / total:>8.0%}"
                    for stage, spent in self.stages.items()
                ),
                f"  {'all':<22}{1000 * total:>9.3f}{self.per_core:>11,.1f} images/s",
                "",
                f"  {'workers':<10}{'images/s':>12}{'each':>12}",
                *(
                    f"  {workers:<10}{rate:>12,.1f}{rate / max(workers, 1):>12,.1f}"
                    for workers, rate in self.rates.items()
                ),
                "",
                self.verdict() + _how(self.tried),
            ]
        )


def data(
    root: str | None = None,
    config: list[str] | None = None,
    workers: list[int] | None = None,
    batch_size: int | None = None,
    consumes: float | None = None,
    seconds: float = 5,
    accelerator: str | None = None,
    precision: str | None = None,
    out: str | None = None,
) -> LoaderSpeed:
    """Measure the loader of a config: how fast, where the time goes, and whether it is enough.

    Args:
        root: Folder of images, or a packed one; the config's images by default.
        config: Configs of `simmim pretrain`, by name or file (-c); the demo's by default.
        workers: Processes that read images, one number or several to compare; by default as many as
            training would use. The first is what the verdict is about.
        batch_size: Images in a batch; by default the config's.
        consumes: Images/s of the training step; by default it is measured here.
        seconds: How long each measurement takes at least.
        accelerator: cpu, gpu, ... (Lightning's); by default the config's.
        precision: 32-true, bf16-mixed, ... (Lightning's); by default the config's.
        out: New JSON file for the figures.

    Returns:
        What came out; it prints as tables and a verdict.

    Raises:
        ValueError: If there is no such config, or no images.
    """
    check_out(out)
    _check(workers, consumes, seconds)
    options = {"root": root, "batch_size": batch_size}
    experiment = open_experiment(
        config, data=options, trainer={"accelerator": accelerator, "precision": precision}
    )
    images = experiment.data
    images.setup("fit")
    chosen = workers or [images._workers(images.sets["training"])]
    indices = readable(images.sets["training"])
    device = _device(experiment)
    size = min(images.batch_size, images.num_train)
    with Bar(total=len(chosen) + 2, desc="Reading step by step") as bar:
        stages = stage_times(images.sets["training"], indices, images.collate, device, seconds)
        rates = {}
        for n in chosen:
            advance(bar, f"Reading {_with(n)}")
            rates[n] = loader_rate(images, seconds, n, pin=device.type == "cuda")
        advance(bar, "Training" if consumes is None else "Done")
        rate, tried = (consumes, None) if consumes else _consumes(experiment, size, device, seconds)
        bar.update()
    speed = LoaderSpeed(
        config=experiment.name,
        root=images.root,
        batch_size=size,
        stages=stages,
        rates=rates,
        workers=chosen[0],
        consumes=rate,
        tried=tried,
        on_cpu=device.type == "cpu",
        packed=is_packed(images.root),
    )
    write_record(out, speed.as_dict())
    return speed


def loader_rate(
    data: ImageFolderData, seconds: float, workers: int | None = None, *, pin: bool = False
) -> float:
    """Read batches of training images, and do nothing with them.

    Args:
        data: After its setup.
        seconds: How long, after the first batches.
        workers: Processes that read; None: as many as training would use.
        pin: Whether batches go into pinned memory.

    Returns:
        Images/s.
    """
    training = data.sets["training"]
    number = data._workers(training) if workers is None else workers
    size = min(data.batch_size, len(training))
    sampler = Endless(range(len(training)))
    return Feed(training, sampler, size, number, data.collate, pin).rate(seconds)


def advance(bar: Any, what: str) -> None:
    """Move a bar on to the next step, and say which it is."""
    bar.update()
    bar.set_description(what)


def readable(data: ImageData) -> list[int]:
    """Choose some images, the same ones always, and leave out those that cannot be read.

    Raises:
        ValueError: If none can be read.
    """
    good = []
    for index in choose(len(data), min(SAMPLE, len(data))).tolist():
        try:
            data.read(index)
        except UnreadableImage as error:
            reason = error
            continue
        good.append(index)
    if not good:
        raise ValueError(f"none of {SAMPLE} images could be read, the last: {reason}")
    return good


def _consumes(
    experiment: Experiment, batch_size: int, device: torch.device, seconds: float
) -> tuple[float, int]:
    """Measure the training step; on a CPU with a whole batch only if that does not take minutes."""
    if device.type == "cpu" and batch_size > FIRST:
        rate = step_rate(experiment, FIRST, min(seconds, 1))
        if 5 * batch_size / rate > 2 * seconds:
            return rate, FIRST
    return step_rate(experiment, batch_size, seconds), batch_size


def _device(experiment: Experiment) -> torch.device:
    wanted = experiment.trainer["accelerator"]
    gpu = torch.cuda.is_available() and wanted in ("auto", "gpu", "cuda")
    return torch.device("cuda" if gpu else "cpu")


def _workers(number: int) -> str:
    return "1 worker" if number == 1 else f"{number} workers"


def _with(number: int) -> str:
    return f"with {_workers(number)}" if number else "without workers"


def _how(tried: int | None) -> str:
    return "" if tried is None else f"\n(The step was measured with batches of {tried}.)"


def _check(
    workers: Sequence[int] | None,
    consumes: float | None,
    seconds: float,
) -> None:
    if any(number < 0 for number in workers or ()):
        raise ValueError(f"workers {list(workers or ())}: a number of processes is 0 or more")
    for name, value in {"consumes": consumes, "seconds": seconds}.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} {value:g} is out of range: use a number above 0")
