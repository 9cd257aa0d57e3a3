"""The step on an XLA device: `make test-xla`, in an environment of its own.

torch_xla is built for one release of torch, older than the one of the other tests; its CPU device
compiles and runs the same graphs as a TPU's would be.
"""

import os
import subprocess
import sys

os.environ.setdefault("PJRT_DEVICE", "CPU")

import pytest
import torch

torch_xla = pytest.importorskip("torch_xla")

from torch_xla.debug import metrics  # noqa: E402

from simmim import SimMIM  # noqa: E402
from simmim.cli import main  # noqa: E402

# Autograd counts the devices at its first backward pass: XLA's must be there by then.
XLA = torch_xla.device()

VIT = {"patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 2}
SWIN = {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
STEPS = 6

MODELS = {
    "vit": {"encoder": "vit_tiny_patch16_224", "encoder_kwargs": VIT},
    "swin": {
        "encoder": "swin_tiny_patch4_window7_224",
        "encoder_kwargs": {**SWIN, "window_size": 4},
        "img_size": 64,
        "mask_patch_size": 32,
    },
    "resnet": {"encoder": "resnet10t", "mask_fill": "mean", "mask_patch_size": 16},
    "block": {"encoder": "vit_tiny_patch16_224", "encoder_kwargs": VIT, "masking": "block"},
    "square": {"encoder": "vit_tiny_patch16_224", "encoder_kwargs": VIT, "masking": "square"},
    "foreground": {
        "encoder": "vit_tiny_patch16_224",
        "encoder_kwargs": VIT,
        "masking": "foreground",
        "masking_kwargs": {"nodata": 0},
    },
    "range": {"encoder": "vit_tiny_patch16_224", "encoder_kwargs": VIT, "mask_ratio": [0.5, 0.8]},
    "noise": {"encoder": "vit_tiny_patch16_224", "encoder_kwargs": VIT, "mask_fill": "noise"},
    "hog": {
        "encoder": "vit_tiny_patch16_224",
        "encoder_kwargs": VIT,
        "target": "hog",
        "target_kwargs": {"cell": 4},
        "loss": "l2",
    },
    "normalized": {
        "encoder": "vit_tiny_patch16_224",
        "encoder_kwargs": VIT,
        "target": "normalized_pixels",
        "target_kwargs": {"window": 7},
    },
    "skip": {
        "encoder": "vit_tiny_patch16_224",
        "encoder_kwargs": VIT,
        "hidden_tokens": "skip",
        "head": "transformer",
    },
    "swin_skip": {
        "encoder": "swin_tiny_patch4_window7_224",
        "encoder_kwargs": {**SWIN, "window_size": 4},
        "img_size": 128,
        "mask_patch_size": 32,
        "hidden_tokens": "skip",
        "head": "transformer",
    },
}


def losses_on(device: torch.device, options: dict) -> tuple[list[float], list[int]]:
    """The loss of each step, and how many graphs had been compiled after it."""
    torch.manual_seed(0)
    # Without drop path, whose draws differ between devices.
    model = SimMIM(**{"img_size": 32, "mask_patch_size": 8, **options}).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    size = model.encoder.img_size
    images = torch.randint(0, 256, (STEPS, 4, 3, *size), generator=torch.Generator().manual_seed(1))
    losses, compiled = [], []
    for step in range(STEPS):
        batch = {
            "image": images[step].to(torch.uint8).to(device),
            "index": (torch.arange(4) + 4 * step).to(device),
        }
        raw, normalized, index = model.inputs(batch, step)
        mask, keys = model.draw_mask(raw, index, validation=False)
        loss, _ = model.loss_of(normalized, mask, keys, model.hidden_count)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "xla":
            torch_xla.sync()
            assert not _fallbacks(), f"operations that XLA handed back to the CPU: {_fallbacks()}"
            compiled.append((metrics.metric_data("CompileTime") or (0,))[0])
        losses.append(loss.detach())
    return [float(loss) for loss in losses], compiled


def _fallbacks() -> dict[str, int]:
    """Operations that had no XLA version, or read a value back to decide on it."""
    names = [name for name in metrics.counter_names() if name.startswith("aten::")]
    return {name: metrics.counter_value(name) for name in names}


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_the_cpu_and_nothing_compiles_after_the_second_step(name: str) -> None:
    metrics.clear_all()
    on_cpu, _ = losses_on(torch.device("cpu"), MODELS[name])
    on_xla, compiled = losses_on(XLA, MODELS[name])
    assert on_xla == pytest.approx(on_cpu, abs=1e-5)
    assert on_cpu[0] != on_cpu[-1]  # it trained
    assert compiled[1] == compiled[-1], f"graphs compiled after each step: {compiled}"


def test_masks_are_those_of_the_cpu() -> None:
    model = SimMIM(**{"img_size": 32, "mask_patch_size": 8, **MODELS["range"]})
    index = torch.arange(64)
    raw = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    mask, _ = model.draw_mask(raw, index, validation=True)
    there, _ = model.draw_mask(raw.to(XLA), index.to(XLA), validation=True)
    assert torch.equal(there.cpu(), mask)


def test_the_overlay_reaches_for_the_hardware(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "fit", "-c", "digits", "-c", "tpu", "--trainer.logger", "false"]) == 1
    said = capfd.readouterr().err
    assert "XLAAccelerator" in said
    assert "Traceback" not in said


FIT = """
import sys
from lightning.fabric.accelerators.xla import XLAAccelerator
XLAAccelerator.is_available = staticmethod(lambda: True)
XLAAccelerator.auto_device_count = staticmethod(lambda: 1)
from simmim.cli import main
sys.exit(main(sys.argv[1:]))
"""

SMALL = [  # a TPU's compiler is quicker
    *("--model.encoder_kwargs.depth", "1", "--model.encoder_kwargs.embed_dim", "32"),
    *("--probe.layer", "1", "--inside.every_n_epochs", "0"),
]


@pytest.mark.parametrize("more", [[], ["--model.compile", "true"]], ids=["eager", "compile"])
def test_a_run_passes_through_lightnings_strategy(tmp_path, more) -> None:
    """The overlay with XLA's CPU device in a TPU's place, as a process of its own."""
    words = ["pretrain", "fit", "-c", "digits", "-c", "tpu", "--trainer.max_epochs", "2", *more]
    words += ["--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"]
    words += ["--data.batch_size", "16", "--trainer.logger", "false", *SMALL]
    done = subprocess.run(
        [sys.executable, "-c", FIT, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "TPU available: True, using: 1" in done.stderr
    content = torch.load(
        tmp_path / "runs/digits/version_0/checkpoints/last.ckpt", weights_only=True
    )
    assert content["global_step"] == 6
    weights = content["state_dict"].values()
    assert all(w.device.type == "cpu" and w.isfinite().all() for w in weights)
