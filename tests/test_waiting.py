"""Between two logging steps nobody waits for the device: no value is read back, none is copied.

The steps run on torch's meta device, which has no numbers: to read one is an error there, and a
copy between it and the host can be told from work that stays where it is.
"""

import sys
from collections import Counter
from itertools import product
from typing import Any

import lightning as L
import pytest
import torch
import torch._meta_registrations  # of the fused optimisers' kernels
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loops import fit_loop
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from simmim import SimMIM
from simmim.callbacks import PRETRAINING, ProgressBar
from simmim.encoder import MASK_FILLS
from simmim.head import HEADS
from simmim.loss import LOSSES
from simmim.masking import MASKINGS
from simmim.target import TARGETS
from simmim.training import base as training
from support import beyond
from support.small import ByIndex
from test_speed import ENCODERS, SKIP, SKIPPING, make_model

COPIES = ("_to_copy", "copy_", "lift_fresh", "lift_fresh_copy")  # lift: what torch.tensor makes


class Crossings(TorchDispatchMode):
    """Counts what goes between host and device, but for copies that need not be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        out = func(*args, **kwargs)
        devices = {x.device.type for x in tree_leaves((args, out)) if isinstance(x, Tensor)}
        crosses = len(devices) > 1 or ("lift" in name and devices != {"cpu"})
        if name in COPIES and crosses and not kwargs.get("non_blocking"):
            self.found[name] += 1
        return out


class Heard(Exception):
    """All steps were listened to: what comes behind them may read numbers."""


class Listen(L.Callback):
    """From the end of one step to the end of the next, five times."""

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = []
        self.mode: Crossings | None = None

    def on_train_batch_end(self, *_: Any) -> None:
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.steps.append(self.mode.found)
        if len(self.steps) == 5:
            raise Heard
        self.mode = Crossings()
        self.mode.__enter__()


class Anything(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """Take the meta device."""


class OnMeta(SingleDeviceStrategy):
    def __init__(self) -> None:
        super().__init__(torch.device("meta"), accelerator=Anything())


@pytest.fixture
def _on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's start and end read numbers; AdamW does not expect this device."""
    monkeypatch.setattr(fit_loop, "has_len_all_ranks", lambda *_: True)
    monkeypatch.setattr(L.Trainer, "_teardown", lambda _: None)
    adam = sys.modules["torch.optim.adam"]
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setattr(training, "_get_fused_kernels_supported_devices", lambda: ["meta"])


def crossings(model: SimMIM, *callbacks: L.Callback, **options: Any) -> list[dict[str, int]]:
    """Train for a few steps, and say what crossed in each but the first."""
    listen = Listen()
    given = {"enable_progress_bar": False, "log_every_n_steps": 50, **options}
    trainer = L.Trainer(
        strategy=OnMeta(),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[*callbacks, listen],
        gradient_clip_val=5.0,
        max_epochs=1,
        **given,
    )
    with pytest.raises(Heard):
        trainer.fit(model, DataLoader(ByIndex(28, model.encoder.img_size[0]), batch_size=4))
    return [dict(found) for found in listen.steps]


PARTS: list[dict[str, Any]] = [
    {"masking": "block", "mask_fill": "mean"},
    {"masking": "square", "mask_fill": "zero", "loss": "l2"},
    {"masking": "token", "mask_ratio": [0.4, 0.6]},
    {"masking": "foreground", "mask_fill": "noise", "head": "mlp", "drop_path_rate": 0.1},
    {"target": "normalized_pixels", "loss": "smooth_l1", "loss_region": "all"},
    {"target": "patch_normalized_pixels", "head": "inverse", "grad_checkpointing": True},
    {"target": "hog", "loss": "l2", "fourier_weight": 0.5},
    {"target": "color_bins", "loss": "cross_entropy"},
    {
        "target": "features",
        "target_kwargs": {"teacher": "test_vit", "pretrained": False, "size": 64},
        "loss": "cosine",
    },
]


@pytest.mark.slow
@pytest.mark.usefixtures("_on_meta")
@pytest.mark.parametrize(
    ("kind", "options"),
    beyond(
        2,
        [
            ("vit", {}),
            ("vit", PARTS[3]),
            *product([kind for kind in ENCODERS if kind != "vit"], [{}]),
            *product(["vit"], [part for part in PARTS if part is not PARTS[3]]),
            *product(SKIPPING, [SKIP]),
            ("convnext", {"mask_fill": "mean", "mask_stage": 3, "fourier_weight": 0.5}),
        ],
    ),
    ids=str,
)
def test_a_step_never_waits_for_the_device(kind: str, options: dict[str, Any]) -> None:
    """With gradients that are clipped, fused AdamW and the callbacks of every run."""
    default = [make() for make in PRETRAINING.values() if make is not ProgressBar]  # see below
    assert crossings(make_model(kind, **options), *default) == [{}] * 5


def test_every_part_is_listened_to() -> None:
    tables = {"masking": MASKINGS, "mask_fill": MASK_FILLS, "target": TARGETS, "loss": LOSSES}
    usual = {"masking": "random", "mask_fill": "token", "target": "pixels", "loss": "l1"}
    for name, table in {**tables, "head": HEADS}.items():
        used = {options[name] for options in [*PARTS, SKIP] if name in options}
        assert used | {usual.get(name, "linear")} == set(table)


class Nosy(L.Callback):
    """Does once a step what must be heard."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        if self.what == "number":
            module.log("number", 1.0)
        elif self.what == "upload":
            torch.ones(3).to(module.device)
        else:
            float(module.head.proj.bias.grad.sum())


@pytest.mark.slow
@pytest.mark.usefixtures("_on_meta")
@pytest.mark.parametrize(("what", "heard"), [("number", "lift_fresh"), ("upload", "_to_copy")])
def test_a_copy_is_heard(what: str, heard: str) -> None:
    assert crossings(make_model(), Nosy(what)) == [{heard: 1}] * 5


@pytest.mark.usefixtures("_on_meta")
def test_a_value_that_is_read_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        crossings(make_model(), Nosy("read"))


@pytest.mark.slow
@pytest.mark.usefixtures("_on_meta")
def test_the_progress_bar_is_no_reason_to_wait_either() -> None:
    bar = ProgressBar(seconds=1e9)
    assert crossings(make_model(), bar, enable_progress_bar=True) == [{}] * 5
