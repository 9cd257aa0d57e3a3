"""`simmim benchmark step`: images/s of the training step, and where its time goes."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor

from simmim.base.errors import one_line
from simmim.base.progress import Bar
from simmim.commands.benchmark.experiment import read_options, trainer_options
from simmim.commands.benchmark.record import check_out, describe, machine, write_record
from simmim.commands.benchmark.step_timer import (
    WARM_UP,
    Bare,
    Batches,
    Matmul,
    Stopwatch,
    count_flop,
    dtype_of,
    held,
    run_trainer,
)
from simmim.encoder import POINTWISE_HEADS
from simmim.pretrain import SimMIM
from simmim.training.inner_runs import make, quiet
from simmim.training.kernels import multiplies_bf16

PARTS = ("forward", "backward", "optimizer", "logging")


@dataclass(frozen=True)
class StepSpeed:
    """One line of the table.

    Attributes:
        encoder: timm's name of it.
        img_size: Height and width in pixels.
        cells: Cells of the mask.
        depth: Blocks, where they were asked for.
        hidden_tokens: What becomes of them: encode or skip.
        batch_size: Images a step.
        precision: Lightning's name of it.
        compiled: Whether encoder and head were compiled.
        ms: Milliseconds of forward, backward, optimizer and logging.
        peak_bytes: Largest memory of a step, weights and optimiser state included.
        flop_per_image: Floating-point operations of the model, forward and backward.
        matmul_flop_per_s: Rate of a large matrix product of the same type, in the same minutes.
        floor_ms: Milliseconds of a step of the bare timm model.
        overheads: How much longer each step took than the bare model's before and after it, as a
            share of these.
        failed: Why there are no numbers.
    """

    encoder: str
    img_size: tuple[int, int]
    cells: int
    depth: int | None
    hidden_tokens: str
    batch_size: int
    precision: str
    compiled: bool
    ms: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    flop_per_image: int = 0
    matmul_flop_per_s: float = 0.0
    floor_ms: float | None = None
    overheads: list[float] = field(default_factory=list)
    failed: str = ""

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step: the sum of its parts."""
        return sum(self.ms.values())

    @property
    def images_per_s(self) -> float:
        """Images a second."""
        return 1000 * self.batch_size / self.step_ms

    @property
    def utilisation(self) -> float:
        """The model's operations a second, as a share of the matrix product's."""
        return self.flop_per_image * self.images_per_s / self.matmul_flop_per_s

    @property
    def overhead(self) -> tuple[float, float, float] | None:
        """The quartiles of the overheads; the middle one is the measurement."""
        if not self.overheads:
            return None
        low, middle, high = np.percentile(self.overheads, (25, 50, 75)).tolist()
        return low, middle, high

    def speedup_over(self, other: "StepSpeed") -> float:
        """How many times as fast as another line it is, by the bare model's steps if it had any."""
        if self.overhead and other.overhead:
            return (1 + other.overhead[1]) / (1 + self.overhead[1])
        return self.images_per_s / other.images_per_s


@dataclass(frozen=True)
class StepReport:
    """What came out.

    Attributes:
        rows: The measurements.
        machine: Where.
    """

    rows: list[StepSpeed]
    machine: dict[str, Any] = field(default_factory=machine)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with what follows from them."""
        rows = []
        for row in self.rows:
            derived = ("step_ms", "images_per_s", "utilisation", "overhead")
            more = {} if row.failed else {name: getattr(row, name) for name in derived}
            rows.append({**asdict(row), **more})
        skipping = [{**named, "speedup": speedup} for named, speedup in _skipping(self.rows)]
        return {"rows": rows, **({"skipping": skipping} if skipping else {})}

    def __str__(self) -> str:
        return "\n".join(["", f"on {describe(self.machine)}", "", *_table(self.rows)])


def step(
    config: list[str] | None = None,
    encoder: str | None = None,
    img_size: list[int] | None = None,
    batch_size: list[int] | None = None,
    mask_patch_size: list[int] | None = None,
    depth: list[int] | None = None,
    precision: list[str] | None = None,
    compile: list[bool] | None = None,
    hidden_tokens: list[Literal["encode", "skip"]] | None = None,
    against: Literal["timm"] | None = None,
    steps: int = 10,
    accelerator: str | None = None,
    out: str | None = None,
) -> StepReport:
    """Measure the training step of pretraining, on batches of noise: no image is read.

    It runs in Lightning's Trainer with the callbacks and loggers of every run. Where several values
    are given, each combination is a line of the table. Utilisation is the model's floating-point
    operations (forward and backward, counted by torch) over what a large matrix product of the same
    type reaches in the same minutes.

    The loop gives the batches out itself, and between two steps the bare model has its turn: what
    else the machine does falls on both. "over timm" is the middle of the steps' ratios, and behind
    it stand their quartiles.

    Args:
        config: Configs of `simmim pretrain`, by name or file (-c); the digits by default.
        encoder: timm's name of the encoder, instead of the config's.
        img_size: Heights (and widths) in pixels; the config's by default.
        batch_size: Images a step; the config's by default.
        mask_patch_size: Sides of a mask cell in pixels; the config's by default.
        depth: Numbers of blocks, for encoders that take one; the config's by default.
        precision: 32-true, bf16-mixed, ... (Lightning's); by default both of these, and on a
            processor without bf16 the first.
        compile: false, true; by default both. Compiling takes minutes.
        hidden_tokens: encode, skip; the config's by default. Skipping has the head transformer
            where the config's looks at one place alone. With both, and --against timm, each is
            measured in turn with the same bare model, and so their ratio.
        against: timm also measures the bare encoder with a linear layer, a loss and fused AdamW,
            step by step in turn with ours: the floor.
        steps: Steps that are measured, of each line; 3 more warm up.
        accelerator: cpu, gpu, ... (Lightning's); by default the config's.
        out: New JSON file for the figures.

    Returns:
        The measurements; they print as a table.

    Raises:
        ValueError: If an option does not fit, or the file is there already.
    """
    if steps < 1:
        raise ValueError(f"steps {steps} measures nothing: use 10")
    check_out(out)
    options = read_options(config)
    device, head = _device(accelerator or options.trainer.accelerator), options.model.head
    values: dict[str, Sequence[Any]] = {
        "img_size": img_size or [None],
        "mask_patch_size": mask_patch_size or [None],
        "depth": depth or [None],
        "hidden_tokens": hidden_tokens or [None],
        "batch_size": batch_size or [options.data.batch_size],
        "compile": [False, True] if compile is None else compile,
        "precision": precision or _precisions(device),
    }
    cases = [dict(zip(values, case, strict=True)) for case in product(*values.values())]
    cases.sort(key=lambda case: bool(case["compile"]))  # what takes minutes comes last
    rows = []
    with Bar(total=len(cases) * (WARM_UP + steps + 1), desc="Steps") as bar:
        for case in cases:
            trainer = {"precision": case["precision"], "accelerator": accelerator}
            said = _said(case, encoder, head)
            options = read_options(config, model=said, trainer=trainer)
            rows.append(_measure(options, case, device, steps, against, bar))
    report = StepReport(rows)
    write_record(out, report.as_dict())
    return report


def _measure(
    options: Any,
    case: Mapping[str, Any],
    device: torch.device,
    steps: int,
    against: str | None,
    bar: Any,
) -> StepSpeed:
    """Measure one line of the table."""
    model = make(SimMIM, options.model.as_dict())
    grid, encoder = model.encoder.mask_grid, model.encoder
    facts: dict[str, Any] = {
        "encoder": encoder.name,
        "img_size": encoder.img_size,
        "cells": grid[0] * grid[1],
        "depth": case["depth"],
        "hidden_tokens": model.hparams["hidden_tokens"],
        "batch_size": case["batch_size"],
        "precision": case["precision"],
        "compiled": case["compile"],
    }
    batch = _noise(case["batch_size"], model)
    watch, matmul = Stopwatch(), Matmul(device, dtype_of(case["precision"]))
    flop = count_flop(model, encoder.img_size)
    bare = None
    if against == "timm":
        images = model.normalize(batch["image"])
        bare = Bare(model, device, case["precision"], images, case["compile"])
        watch.others_bytes = held(bare.model, bare.optimizer) if device.type == "cuda" else 0

    def between(i: int) -> None:
        bar.update()
        if i < WARM_UP:
            matmul.run()
        if bare is not None:
            bare.step()

    batches = Batches(batch, steps, watch, between)
    trainer = {**trainer_options(options), "accumulate_grad_batches": 1}
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            run_trainer(model, batches, trainer, Path(folder, "step", "run"))
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:  # memory, no compiler
        return StepSpeed(**facts, failed=one_line(str(error)))
    for _ in range(WARM_UP):
        matmul.run()
    return StepSpeed(
        **facts,
        ms={name: 1000 * value for name, value in watch.seconds().items()},
        peak_bytes=watch.peak_bytes,
        flop_per_image=flop,
        matmul_flop_per_s=matmul.flop / median(matmul.seconds[1:]),
        **(_compare(watch.steps(), bare.seconds[WARM_UP:]) if bare else {}),
    )


def _compare(ours: Sequence[float], bare: Sequence[float]) -> dict[str, Any]:
    """Compare each step with the bare model's before and after it; there is one more of these."""
    around = [(before + after) / 2 for before, after in pairwise(bare)]
    return {
        "floor_ms": 1000 * median(bare),
        "overheads": [step / floor - 1 for step, floor in zip(ours, around, strict=True)],
    }


# What is measured --------------------------------------------------------------------------------


def _said(case: Mapping[str, Any], encoder: str | None, head: str) -> dict[str, Any]:
    """The model's options that overrule the config's, whose head is known."""
    names = ("img_size", "mask_patch_size", "hidden_tokens", "compile")
    said = {name: case[name] for name in names}
    if encoder is not None:
        said |= {"encoder": encoder, "encoder_kwargs": {}}
    if case["hidden_tokens"] == "skip" and head in POINTWISE_HEADS:
        said |= {"head": "transformer", "head_kwargs": {}}
    return {**said, "encoder_kwargs.depth": case["depth"]}


def _noise(batch_size: int, model: SimMIM) -> dict[str, Tensor]:
    """A batch as the loader gives it: uint8, HWC in memory."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, model.mean.shape[1], *model.encoder.img_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    return {"image": images, "index": torch.arange(batch_size)}


def _device(accelerator: str) -> torch.device:
    with quiet():
        trainer = L.Trainer(accelerator=accelerator, devices=1, logger=False, barebones=True)
    return trainer.strategy.root_device


def _precisions(device: torch.device) -> list[str]:
    slow = device.type == "cpu" and not multiplies_bf16()
    return ["32-true"] if slow else ["32-true", "bf16-mixed"]


# What is printed ---------------------------------------------------------------------------------


def _table(rows: Sequence[StepSpeed]) -> list[str]:
    """One line a measurement, columns of equal width."""
    shown = [row for row in rows if not row.failed]
    told = ["encoder", "pixels", "cells"]
    told += ["depth"] if any(row.depth for row in rows) else []
    told += ["hidden"] if any(row.hidden_tokens == "skip" for row in rows) else []
    told += ["batch", "precision", "compiled"]
    head = [*told, "images/s", "step ms", *PARTS, "memory MB", "GFLOP/image", "of matmul"]
    with_floor = any(row.floor_ms for row in rows)
    head += ["timm ms", "over timm"] if with_floor else []
    lines = [head, *([*_case(row, told), *_numbers(row, with_floor)] for row in shown)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    for row in rows:
        if row.failed:
            how = f"{row.precision}{', compiled' if row.compiled else ''}"
            text.append(f"{row.encoder}, batch {row.batch_size}, {how}: {row.failed}")
    for named, speedup in _skipping(rows):
        what = ", ".join(f"{name} {value}" for name, value in named.items())
        text.append(f"hidden tokens skipped, {what}: {speedup:.2f} x as fast as encoded")
    return text


def _case(row: StepSpeed, told: Sequence[str]) -> list[str]:
    """What was measured, in the columns that are told."""
    height, width = row.img_size
    values = {
        "encoder": row.encoder,
        "pixels": f"{height}" if height == width else f"{height}x{width}",
        "cells": f"{row.cells}",
        "depth": f"{row.depth or ''}",
        "hidden": row.hidden_tokens,
        "batch": f"{row.batch_size}",
        "precision": row.precision,
        "compiled": "yes" if row.compiled else "no",
    }
    return [values[name] for name in told]


def _skipping(rows: Sequence[StepSpeed]) -> Iterator[tuple[dict[str, str], float]]:
    """Each case that was measured with both, and what skipping hidden tokens gains there."""
    told = ["encoder", "pixels", "cells", "depth", "batch", "precision", "compiled"]
    cases: dict[tuple[str, ...], dict[str, StepSpeed]] = {}
    for row in rows:
        if not row.failed:
            cases.setdefault((*_case(row, told),), {})[row.hidden_tokens] = row
    for case, found in cases.items():
        if len(found) == 2:
            named = {name: value for name, value in zip(told, case, strict=True) if value}
            yield named, found["skip"].speedup_over(found["encode"])


def _numbers(row: StepSpeed, with_floor: bool) -> list[str]:
    numbers = [f"{row.images_per_s:,.1f}", f"{row.step_ms:,.1f}"]
    numbers += [f"{row.ms[part]:,.1f}" for part in PARTS]
    numbers += [f"{row.peak_bytes / 1e6:,.0f}", f"{row.flop_per_image / 1e9:,.3g}"]
    numbers.append(f"{100 * row.utilisation:.0f} %")
    if with_floor:
        low, middle, high = (f"{100 * value:+.1f}" for value in row.overhead or (0, 0, 0))
        numbers += [f"{row.floor_ms:,.1f}", f"{middle} % ({low} to {high})"]
    return numbers
