"""A training step under the clock: in Lightning's Trainer, and as a bare loop of timm's model."""

import contextlib
import io
import os
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from statistics import mean, median
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from simmim import callbacks
from simmim.encoder import Encoder
from simmim.pretrain import SimMIM
from simmim.runs.loggers import board, finish_board, run_loggers

SECONDS_A_PRODUCT = 2.0  # of matrices, on a CPU
WARM_UP = 3  # steps that are not counted: memory is taken, kernels are chosen or compiled


class Stopwatch(L.Callback):
    """Takes the time of the parts of a step; it comes behind all other callbacks.

    Each part ends when the device has done its work.

    Attributes:
        parts: Seconds of forward (loss included), backward, optimizer (clipping included) and
            logging (all that is left of a step: callbacks, loggers, the loop itself), a step each.
        peak_bytes: Largest memory of a step, weights and optimiser state included.
    """

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {
            name: [] for name in ("forward", "backward", "optimizer", "logging")
        }
        self.peak_bytes = 0
        self.others_bytes = 0  # held on the device by what is measured beside
        self._marks: dict[str, float] = {}
        self._device = torch.device("cpu")

    def seconds(self) -> dict[str, float]:
        """Each part's median; for logging the mean, as it comes now and then."""
        parts = self.parts.items()
        return {name: (mean if name == "logging" else median)(part) for name, part in parts}

    def steps(self) -> list[float]:
        """Seconds of each step, if what is logged now and then were spread over all of them."""
        *work, logging = self.parts.values()
        return [sum(times) + mean(logging) for times in zip(*work, strict=True)]

    def mark(self, name: str) -> None:
        """Note the time at which the device is done."""
        synchronize(self._device)
        self._marks[name] = time.perf_counter()

    def end_step(self) -> None:
        """Tell the parts of the step that is over from each other."""
        self.mark("end")
        at = self._marks
        forward = at["forward"] - at["start"]
        backward = at["backward"] - at["forward"]
        optimizer = at["optimizer"] - at["ready"]
        whole = at["end"] - at["begin"]
        found = (forward, backward, optimizer, whole - forward - backward - optimizer)
        for seconds, part in zip(found, self.parts.values(), strict=True):
            part.append(seconds)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn on which device it is, and when the optimiser is done."""
        self._device = pl_module.device
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.mark("optimizer"))

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin the forward pass."""
        self.mark("start")

    def on_before_zero_grad(self, *_: Any) -> None:
        """End it."""
        self.mark("forward")

    def on_after_backward(self, *_: Any) -> None:
        """End the backward pass."""
        self.mark("backward")

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Begin the optimiser's step."""
        self.mark("ready")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the memory of one more step, while the model is on its device."""
        module: Any = pl_module
        batches: Any = trainer.train_dataloader
        batch = trainer.strategy.batch_to_device(batches.batch)
        optimizer = trainer.optimizers[0]

        def passes() -> None:
            raw, images, index = module.inputs(batch, 0)
            mask, keys = module.draw_mask(raw, index, validation=False)
            with trainer.precision_plugin.forward_context():
                loss, _ = module.loss_of(images, mask, keys, module.hidden_count)
            loss.backward()

        optimizer.zero_grad()
        self.peak_bytes = peak_bytes(passes, self._device, held(module, optimizer))
        self.peak_bytes -= self.others_bytes
        optimizer.zero_grad()


class Batches:
    """Batches of noise for the Trainer, and other work between two steps.

    Args:
        batch: The batch, the same at every step.
        steps: How many.
        watch: Measures the steps, but for the warm-up.
        between: Work that is done before each step, off the clock; it gets the step's number.
    """

    def __init__(
        self,
        batch: dict[str, Tensor],
        steps: int,
        watch: Stopwatch,
        between: Callable[[int], None],
    ) -> None:
        self.batch, self.steps, self.watch, self.between = batch, steps, watch, between
        self.batch_size = len(batch["image"])

    def __len__(self) -> int:
        return WARM_UP + self.steps + 1  # nobody comes back behind the last one

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for i in range(len(self)):
            self.between(i)
            self.watch.mark("begin")
            yield self.batch
            if i >= WARM_UP:
                self.watch.end_step()


class Bare:
    """The floor: timm's encoder, a linear layer, L1 and fused AdamW, and nothing else.

    Args:
        model: The model whose encoder it is, with new weights.
        device: Where it runs.
        precision: Lightning's name of it.
        images: Normalised, (B, C, H, W).
        compiled: Whether to compile the encoder.
    """

    def __init__(
        self, model: SimMIM, device: torch.device, precision: str, images: Tensor, compiled: bool
    ) -> None:
        hp: Any = model.hparams
        rates = {name: hp[name] for name in ("drop_rate", "drop_path_rate", "grad_checkpointing")}
        # mask_fill "zero" leaves timm's model as it is: no hook, no token.
        built = Encoder(
            hp["encoder"],
            hp["img_size"],
            hp["in_chans"],
            mask_patch_size=None,
            mask_fill="zero",
            **rates,
            **(hp["encoder_kwargs"] or {}),
        )
        dtype = dtype_of(precision)
        weights = dtype if precision.endswith("true") else torch.float32
        self.autocast = torch.autocast(device.type, dtype, enabled=weights != dtype)
        self.model = built.model.to(device, weights)
        chans = hp["in_chans"] * built.stride**2
        self.head = nn.Sequential(
            nn.Conv2d(built.num_features, chans, kernel_size=1), nn.PixelShuffle(built.stride)
        ).to(device, weights)
        self.grid = built.grid_size
        self.images = images.to(device, weights)
        parameters = [*self.model.parameters(), *self.head.parameters()]
        self.optimizer = AdamW([p for p in parameters if p.requires_grad], fused=True)
        self.seconds: list[float] = []
        self.features = self.model.forward_features
        if compiled:
            self.features = torch.compile(self.features)

    def step(self) -> None:
        """One step, under the clock."""
        synchronize(self.images.device)
        began = time.perf_counter()
        with self.autocast:
            prediction = self.head(self._to_nchw(self.features(self.images)))
            loss = F.l1_loss(prediction.float(), self.images.float())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.images.device)
        self.seconds.append(time.perf_counter() - began)

    def _to_nchw(self, features: Tensor) -> Tensor:
        if features.ndim == 3:  # NLC, class tokens first
            cells = features[:, -self.grid[0] * self.grid[1] :].transpose(1, 2)
            return cells.unflatten(2, self.grid)
        return features if features.shape[2:] == self.grid else features.permute(0, 3, 1, 2)


class Matmul:
    """The rate of a large matrix product, which a step cannot exceed.

    Args:
        device: Where.
        dtype: Of the numbers.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        side, largest = (256, 2048) if device.type == "cpu" else (8192, 8192)
        self._set_side(side, device, dtype)
        while side < largest:  # a processor without bf16 multiplies it a thousand times as slowly
            self.run()
            if 8 * self.seconds[-1] > SECONDS_A_PRODUCT:
                break
            side *= 2
            self._set_side(side, device, dtype)
        self.seconds.clear()

    def _set_side(self, side: int, device: torch.device, dtype: torch.dtype) -> None:
        self.factors = torch.rand(2, side, side, device=device).to(dtype)
        self.flop, self.seconds = 2 * side**3, list[float]()

    def run(self) -> None:
        """One product, under the clock."""
        synchronize(self.factors.device)
        began = time.perf_counter()
        torch.mm(*self.factors)
        synchronize(self.factors.device)
        self.seconds.append(time.perf_counter() - began)


def count_flop(model: SimMIM, img_size: tuple[int, int]) -> int:
    """Floating-point operations of one image, forward and backward, by torch's own counter.

    They are the model's: without what recomputed activations or a kernel's way of going about it
    cost. Counted on a copy without numbers, on torch's meta device.
    """
    copy = deepcopy(model).to("meta")
    if model.hparams["grad_checkpointing"]:
        copy.encoder.model.set_grad_checkpointing(False)
    index = torch.zeros(1, dtype=torch.long, device="meta")
    images = torch.empty(1, model.hparams["in_chans"], *img_size, device="meta")
    mask, keys = copy.draw_mask(images, index, validation=True)
    with FlopCounterMode(display=False) as counter:
        copy.loss_of(images, mask, keys, copy.hidden_count)[0].backward()
    return int(counter.get_total_flops())


def run_trainer(model: SimMIM, batches: Batches, options: dict[str, Any], folder: Path) -> None:
    """Train on noise as `simmim pretrain fit` does: its callbacks, its loggers.

    Args:
        model: The model.
        batches: What it is trained on.
        options: Of the Trainer.
        folder: For what the loggers write. W&B's is an offline run that stays there.
    """
    loggers = run_loggers(folder, [board(folder, offline=True)], "fit", None)
    folder.mkdir(parents=True)
    interval = min(options.get("log_every_n_steps") or 50, batches.steps)
    for logger in loggers:  # the first row costs more than all others: files are made
        logger.log_metrics({"train/loss": 0.0}, step=0)
        logger.save()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # the run's own bar
        warnings.filterwarnings("ignore", "You defined a `validation_step`")
        trainer = L.Trainer(
            **{**options, "log_every_n_steps": interval},
            devices=1,
            max_epochs=1,
            logger=loggers,
            # Checkpoints are written between steps.
            callbacks=[*(kind() for kind in callbacks.PRETRAINING.values()), batches.watch],
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        try:
            trainer.fit(model, batches)
        finally:
            finish_board(loggers, failed=False)


def dtype_of(precision: str) -> torch.dtype:
    """The type that a precision of Lightning's multiplies matrices in."""
    types = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return types.get(precision.split("-")[0], torch.float32)


def held(module: nn.Module, optimizer: Optimizer) -> int:
    """Bytes of weights, buffers, gradients and optimiser state."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [p.grad for p in module.parameters() if p.grad is not None]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def peak_bytes(work: Callable[[], None], device: torch.device, before: int) -> int:
    """Largest memory while something runs.

    Args:
        work: What runs.
        device: Where.
        before: Bytes that are there when it begins, for devices that do not count.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it says that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    assert profiled.profiler is not None
    results = profiled.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return before + most


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
