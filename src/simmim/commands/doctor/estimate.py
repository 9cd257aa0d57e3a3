"""What a config will cost on this machine: some real steps of its model, in a process of their own.

So the memory that is measured is that of training alone, and a step for which there is too little
memory ends that process and not the command.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from math import lcm
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from simmim.base.errors import explain
from simmim.base.progress import Bar
from simmim.callbacks.vitals import held_memory
from simmim.masking import average_distance, draw_masks, random_mask, sample_keys
from simmim.optim import param_groups
from simmim.pretrain import SimMIM
from simmim.training.inner_runs import make, quiet

SIZES = (32, 48, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
LARGEST = 224  # px that are recommended: costs grow with the square, and published recipes end here
AVG_DIST = (10.0, 20.0)  # px at 192 px: best in the paper's section 4.1
MASKS = 256  # whose AvgDist is averaged
TRY_SECONDS = 15.0  # for trying sizes
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Cost:
    """What was measured, and what follows.

    Attributes:
        encoder: The config's.
        device: What computed.
        precision: Of the config.
        parameters: Of the model.
        batch_size: Of the config.
        measured_batch: The largest batch that was tried.
        images_per_s: Of whole steps: forward, backward and optimiser.
        state_mb: Parameters, gradients and optimiser states, computed.
        peak_mb: Memory at the measured batch; on a CPU all resident memory. None: not known here.
        memory_mb: Memory at the config's batch: measured there, or the line through the last two.
        problem: Why there is no more; empty where all went well.
    """

    encoder: str = ""
    device: str = ""
    precision: str = ""
    parameters: int = 0
    batch_size: int = 0
    measured_batch: int = 0
    images_per_s: float = 0.0
    state_mb: float = 0.0
    peak_mb: float | None = None
    memory_mb: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Sizes:
    """Which sizes go with the config's encoder and these images.

    Attributes:
        img_size: Of the config, (height, width).
        stride: Pixels of a feature.
        token: Pixels of a token, which a mask's cell holds whole ones of.
        legal: Square sizes up to those of the images that the model was built with.
        img_size_advice: The one that fits the images.
        cells: AvgDist of each legal mask_patch_size at the config's img_size, in px of an image
            that is reduced to 192.
        cell_advice: The one that fits the paper's rule best.
    """

    img_size: tuple[int, int] = (0, 0)
    stride: int = 0
    token: int = 0
    legal: list[int] = field(default_factory=list)
    img_size_advice: int = 0
    cells: dict[int, float] = field(default_factory=dict)
    cell_advice: int = 0


def estimate(
    model: Mapping[str, Any],
    batch_size: int,
    trainer: Mapping[str, Any],
    short_side: float,
    seconds: float,
) -> tuple[Cost, Sizes]:
    """Measure a model.

    Args:
        model: Options of SimMIM.
        batch_size: Of the config.
        trainer: Options of the trainer; accelerator and precision are heeded.
        short_side: Median of the images', in px.
        seconds: For steps; the first two sizes of batch take as long as they take.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    job = (dict(model), batch_size, dict(trainer), short_side, seconds)
    process = context.Process(target=_serve, args=(*job, theirs), daemon=True)
    process.start()
    theirs.close()
    cost, sizes = Cost(batch_size=batch_size), Sizes()
    began, shown = time.monotonic(), 0
    try:
        with Bar(total=round(seconds), desc="Trying the model", unit="s", leave=False) as bar:
            while True:
                if ours.poll(0.5):
                    cost, sizes = ours.recv()
                passed = min(round(time.monotonic() - began), round(seconds))
                bar.update(passed - shown)
                shown = passed
    except EOFError:
        process.join()
    finally:
        process.kill()
    if process.exitcode:
        done = f"a batch of {cost.measured_batch} went well" if cost.measured_batch else "none did"
        problem = f"the measuring process was ended, probably for lack of memory: {done}"
        cost = replace(cost, problem=cost.problem or problem)
    return cost, sizes


def _serve(
    options: dict[str, Any],
    batch_size: int,
    trainer: dict[str, Any],
    short_side: float,
    seconds: float,
    pipe: Connection,
) -> None:
    """Measure, and send what is known after each step."""
    cost, sizes = Cost(batch_size=batch_size), Sizes()
    try:
        with quiet():
            model = make(SimMIM, {**options, "compile": False})
        for cost in measure(model, str(options.get("encoder")), batch_size, trainer, seconds):
            pipe.send((cost, sizes))
        with quiet():
            sizes = fitting_sizes(model, options, short_side)
    except Exception as error:
        cost = replace(cost, problem=explain(error) or f"{type(error).__name__}: {error}")
    pipe.send((cost, sizes))


def measure(
    model: SimMIM, encoder: str, batch_size: int, trainer: Mapping[str, Any], seconds: float
) -> Iterator[Cost]:
    """Train on noise: batches of 1, 2, 4, ..., as long as there is time; on a GPU the whole one.

    Yields:
        The cost as it is known after each batch size.
    """
    device = _device(str(trainer.get("accelerator") or "auto"))
    precision = str(trainer.get("precision") or "32-true")
    model = model.to(device).train()
    optimizer = model.optimizer(
        param_groups(model, model.hparams["weight_decay"], compat=model.compat)
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    cost = Cost(
        encoder=encoder if encoder != "None" else model.encoder.name,
        device=name,
        precision=precision,
        parameters=sum(p.numel() for p in model.parameters()),
        batch_size=batch_size,
    )
    began, batch = time.monotonic(), batch_size if device.type == "cuda" else 1
    while True:
        try:
            step_seconds = _time_step(model, optimizer, batch, device, precision)
        except torch.OutOfMemoryError:
            if batch == 1:
                yield replace(cost, problem="the device's memory is too small for one image")
                return
            batch //= 2
            problem = f"a batch of {batch_size} does not fit: use --data.batch_size {batch} or less"
            cost = replace(cost, problem=problem)
            continue
        cost = _extend(cost, batch, batch / step_seconds, _peak_mb(device), model, optimizer)
        yield cost
        left = seconds - (time.monotonic() - began)
        # It takes two sizes to know what an image adds to the memory.
        enough = 5 * step_seconds > left and batch > 1
        if batch >= batch_size or cost.problem or enough:
            return
        batch = min(2 * batch, batch_size)


def _extend(
    cost: Cost,
    batch: int,
    rate: float,
    peak: float | None,
    model: SimMIM,
    optimizer: torch.optim.Optimizer,
) -> Cost:
    """Add what a batch has shown."""
    memory = peak
    if peak is not None and batch < cost.batch_size:
        slope = (peak - (cost.peak_mb or 0)) / max(batch - cost.measured_batch, 1)
        memory = peak + slope * (cost.batch_size - batch) if cost.peak_mb else None
    return replace(
        cost,
        measured_batch=batch,
        images_per_s=max(rate, cost.images_per_s),
        state_mb=_state_mb(model, optimizer),
        peak_mb=peak,
        memory_mb=memory,
    )


def _time_step(
    model: SimMIM,
    optimizer: torch.optim.Optimizer,
    batch: int,
    device: torch.device,
    precision: str,
) -> float:
    """Seconds of the quicker of two steps; the first of its size also finds its memory."""
    height, width = model.encoder.img_size
    chans = model.mean.shape[1]
    raw = torch.randint(256, (batch, chans, height, width), dtype=torch.uint8, device=device)
    index = torch.arange(batch, device=device)
    kind = AUTOCAST.get(precision)
    times = []
    for _ in range(2):
        began = time.perf_counter()
        with torch.autocast(device.type, kind) if kind else nullcontext():
            mask, keys = model.draw_mask(raw, index, validation=False)
            loss, _ = model.loss_of(model.normalize(raw), mask, keys)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        times.append(time.perf_counter() - began)
    return min(times)


def _state_mb(model: SimMIM, optimizer: torch.optim.Optimizer) -> float:
    trained = [p for p in model.parameters() if p.requires_grad]
    states = [
        t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)
    ]
    tensors = [*model.parameters(), *trained, *states]  # values, gradients, states
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def _peak_mb(device: torch.device) -> float | None:
    held = held_memory(device)
    return None if held is None else held / 1e6


def _device(accelerator: str) -> torch.device:
    wanted = {"gpu": "cuda", "auto": "cuda"}.get(accelerator, accelerator)
    if wanted == "cuda" and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def fitting_sizes(model: SimMIM, options: Mapping[str, Any], short_side: float) -> Sizes:
    """Find the sizes of image and cell that the config's encoder takes and these images fill."""
    encoder = model.encoder
    token = encoder.patch_size if encoder.mask_token is not None else 1
    cell, (height, width) = encoder.mask_patch_size, encoder.img_size
    cells = _distances(options, (height, width), lcm(token, model.target.stride))
    best = min(cells, key=lambda c: _off_the_rule(cells[c]), default=cell)
    # A wish of the rule, or not: AvgDist of 14 is no better than one of 17.
    best = cell if cell in cells and not _off_the_rule(cells[cell]) else best
    step = lcm(encoder.stride, cell)
    wanted = [n for n in SIZES if n % step == 0 and n <= max(short_side * 1.25, step)]
    best_side = min(LARGEST, short_side * 1.25)
    # From the best one down, then up: there may not be time to try all.
    down, up = [n for n in wanted if n <= best_side], [n for n in wanted if n > best_side]
    legal = _buildable(options, [*reversed(down), *up] or [step], height if height == width else 0)
    fits = [n for n in legal if n <= best_side]
    advice = max(fits, default=min(legal, default=height))
    return Sizes((height, width), encoder.stride, encoder.patch_size, legal, advice, cells, best)


def _off_the_rule(distance: float) -> float:
    low, high = AVG_DIST
    return max(low - distance, distance - high, 0.0)


def _distances(options: Mapping[str, Any], size: tuple[int, int], token: int) -> dict[int, float]:
    """AvgDist of each legal cell, random masks at the config's ratio, in px at 192."""
    height, width = size
    ratio = options.get("mask_ratio", 0.6)
    keys = sample_keys(torch.arange(MASKS), 0, 0)
    found = {}
    for cell in range(token, min(size) // 2 + 1, token):
        if height % cell or width % cell:
            continue
        masks = draw_masks(random_mask, keys, (height // cell, width // cell), ratio, None)
        distance = float(average_distance(masks, cell).nanmean())
        found[cell] = round(distance * 192 / min(size), 1)
    return found


def _buildable(options: Mapping[str, Any], sizes: Sequence[int], built: int) -> list[int]:
    """Those sizes that the whole model can be built with, as far as there is time to try."""
    began = time.monotonic()
    legal: list[int] = []
    for size in sizes:
        if size != built and legal and time.monotonic() - began > TRY_SECONDS:
            continue
        with suppress(Exception):  # timm refuses in many words
            if size != built:
                make(SimMIM, {**options, "img_size": size, "compile": False, "weights": None})
            legal.append(size)
    return sorted(legal)


def hours(images: int, epochs: float, rate: float) -> float:
    """Hours of a run."""
    return images * epochs / rate / 3600 if rate else 0.0
