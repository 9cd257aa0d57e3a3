"""`simmim benchmark step`: what it counts is right, and what it says adds up. No time is judged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simmim import SimMIM
from simmim.commands.benchmark.step import StepReport, StepSpeed, _compare, _skipping, step
from simmim.commands.benchmark.step_timer import Bare, Stopwatch, count_flop, dtype_of, peak_bytes

pytestmark = pytest.mark.slow

VIT = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    model: dict[str, Any] = {
        "encoder": "vit_tiny_patch16_224",
        "img_size": 32,
        "mask_patch_size": 8,
    }
    model |= {"mask_patch_size": 8, "encoder_kwargs": VIT}
    text = {"model": model, "data": {"batch_size": 4}, "trainer": {"gradient_clip_val": 5.0}}
    (tmp_path / "tiny.yaml").write_text(json.dumps(text), encoding="utf-8")
    return ["tiny.yaml"]


def measure(config: list[str], **options: Any) -> StepReport:
    given = {"precision": ["32-true"], "compile": [False], "accelerator": "cpu", "steps": 3}
    return step(config, **{**given, **options})


def test_the_parts_make_the_step(config: list[str]) -> None:
    (row,) = measure(config, against="timm", out="step.json").rows
    assert set(row.ms) == {"forward", "backward", "optimizer", "logging"}
    assert all(part > 0 for part in row.ms.values())
    assert row.step_ms == pytest.approx(sum(row.ms.values()))
    assert row.images_per_s == pytest.approx(4 / (row.step_ms / 1000))
    rate = row.flop_per_image * row.images_per_s
    assert row.utilisation == pytest.approx(rate / row.matmul_flop_per_s)
    assert row.floor_ms is not None
    assert row.floor_ms > 0
    assert len(row.overheads) == 3
    assert row.overhead == (*np.percentile(row.overheads, (25, 50, 75)),)
    written = json.loads(Path("step.json").read_text(encoding="utf-8"))
    assert written["rows"][0]["step_ms"] == pytest.approx(row.step_ms)
    assert written["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"command", "date", "machine"} <= written.keys()


def test_a_machine_that_slows_down_slows_both() -> None:
    """The bare model has its turn before and after each step of ours."""
    pace = [1.0, 1.5, 2.0, 2.5, 3.0]
    found = _compare([1.1 * speed for speed in pace[1::2]], pace[::2])
    assert found == {"floor_ms": 2000.0, "overheads": [pytest.approx(0.1)] * 2}


def test_logging_is_spread_over_all_steps() -> None:
    watch = Stopwatch()
    watch.parts |= {"forward": [1.0, 2.0, 3.0], "backward": [2.0] * 3, "optimizer": [1.0] * 3}
    watch.parts["logging"] = [0.0, 0.0, 3.0]
    assert watch.seconds() == {"forward": 2, "backward": 2, "optimizer": 1, "logging": 1}
    assert watch.steps() == [5.0, 6.0, 7.0]


def test_a_line_for_each_combination(config: list[str]) -> None:
    report = measure(config, img_size=[16, 32], depth=[1, 3], steps=1)
    assert len(report.rows) == 4
    flop = {(r.img_size[0], r.depth): r.flop_per_image for r in report.rows}
    assert flop[32, 3] > flop[32, 1] > flop[16, 1]
    assert {row.cells for row in report.rows} == {4, 16}
    lines = str(report).splitlines()
    assert len(lines) == 3 + 1 + 4
    assert len({len(line) for line in lines[3:]}) == 1


@pytest.mark.exhaustive
def test_skipping_hidden_tokens_is_compared_with_encoding_them(config: list[str]) -> None:
    """The config's head is linear: skipping gets one that can look at its neighbours."""
    report = measure(config, hidden_tokens=["encode", "skip"], steps=2, against="timm")
    encode, skip = report.rows
    assert (encode.hidden_tokens, skip.hidden_tokens) == ("encode", "skip")
    assert skip.flop_per_image != encode.flop_per_image
    assert encode.overhead is not None
    assert skip.overhead is not None
    gain = (1 + encode.overhead[1]) / (1 + skip.overhead[1])
    (written,) = report.as_dict()["skipping"]
    assert written["speedup"] == pytest.approx(gain)
    assert str(report).splitlines()[-1] == (
        "hidden tokens skipped, encoder vit_tiny_patch16_224, pixels 32, cells 16, batch 4, "
        f"precision 32-true, compiled no: {gain:.2f} x as fast as encoded"
    )


def test_lines_are_compared_that_differ_in_hidden_tokens_alone() -> None:
    def line(hidden: str, ms: float, **options: Any) -> StepSpeed:
        given = {"batch_size": 8, "depth": None, "precision": "32-true", "compiled": False}
        part = {"forward": ms, "backward": 0.0, "optimizer": 0.0, "logging": 0.0}
        return StepSpeed("a", (32, 32), 4, hidden_tokens=hidden, ms=part, **{**given, **options})

    rows = [line("encode", 6.0), line("skip", 1.0, batch_size=4), line("skip", 2.0)]
    rows += [line("skip", 3.0, compiled=True), line("encode", 1.0, compiled=True, failed="memory")]
    assert [(named["batch"], gain) for named, gain in _skipping(rows)] == [("8", 3.0)]


@pytest.mark.exhaustive
def test_a_precision_and_other_cells(config: list[str]) -> None:
    report = measure(
        config, precision=["bf16-mixed"], mask_patch_size=[4, 16], batch_size=[2], steps=1
    )
    assert [row.cells for row in report.rows] == [64, 4]
    assert {row.precision for row in report.rows} == {"bf16-mixed"}


def test_another_encoder_has_none_of_the_configs_options(config: list[str]) -> None:
    (row,) = measure(config, encoder="test_vit", img_size=[32], mask_patch_size=[16], steps=1).rows
    assert (row.encoder, row.cells) == ("test_vit", 4)


def test_what_cannot_be_measured_is_said_and_the_rest_is_there(
    config: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: Any, **__: Any) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", no_compiler)
    report = measure(config, compile=[True, False], steps=1)
    assert [row.compiled for row in report.rows] == [False, True]
    assert [row.failed for row in report.rows] == ["", "no C++ compiler"]
    assert "compiled: no C++ compiler" in str(report)
    assert json.dumps(report.as_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps 0 measures nothing"),
        ({"out": "tiny.yaml"}, "out 'tiny.yaml' exists"),
        ({"img_size": [30]}, "img_size 30 is not a multiple of mask_patch_size 8"),
    ],
)
def test_mistakes_are_sentences(config: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(config, **options)


def test_the_operations_of_a_vit_are_those_of_its_matrices() -> None:
    """A linear layer has 2 x weights operations a token forward, and twice that backward."""
    model = SimMIM("vit_tiny_patch16_224", 32, mask_patch_size=8, encoder_kwargs=VIT)
    tokens, width, pixels = 8 * 8, 32, 4 * 4 * 3
    block = (tokens + 1) * 12 * width**2 + 2 * (
        tokens + 1
    ) ** 2 * width  # qkv, proj, mlp; attention
    patches = tokens * pixels * width
    head = tokens * 10 / 16 * width * pixels  # of hidden cells alone
    # The images need no gradient: the patch embedding has one product back, not two.
    assert count_flop(model, (32, 32)) == 2 * (3 * 2 * block + 2 * patches + 3 * head)


def test_recomputed_activations_are_not_the_models_operations() -> None:
    options: dict[str, Any] = {"mask_patch_size": 8, "encoder_kwargs": VIT}
    plain = SimMIM("vit_tiny_patch16_224", 32, **options)
    recomputing = SimMIM("vit_tiny_patch16_224", 32, grad_checkpointing=True, **options)
    assert count_flop(plain, (32, 32)) == count_flop(recomputing, (32, 32))
    assert recomputing.encoder.model.grad_checkpointing


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        ("vit_tiny_patch16_224", VIT, 32),
        ("swin_tiny_patch4_window7_224", SWIN, 32),
        ("test_convnext", {}, 64),
    ],
)
def test_the_floor_is_timms_model_and_learns(name: str, kwargs: dict[str, Any], size: int) -> None:
    model = SimMIM(name, size, encoder_kwargs=kwargs)
    images = torch.randn(2, 3, size, size)
    bare = Bare(model, torch.device("cpu"), "32-true", images, compiled=False)
    assert not any(module._forward_hooks for module in bare.model.modules())
    bare.model.load_state_dict(model.encoder.model.state_dict())
    with torch.no_grad():
        features = bare._to_nchw(bare.model.eval().forward_features(images))
        assert torch.equal(features, model.encoder.eval()(images))
    before = [p.clone() for p in bare.model.parameters() if p.requires_grad]
    bare.step()
    after = [p for p in bare.model.parameters() if p.requires_grad]
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > len(after) / 2
    assert len(bare.seconds) == 1


def test_the_peak_of_memory_is_what_was_alive_at_once() -> None:
    def work() -> None:
        for _ in range(3):
            kept = torch.empty(1000, dtype=torch.uint8)
            torch.empty(500, dtype=torch.uint8)
            del kept

    peak = peak_bytes(work, torch.device("cpu"), before=100)
    assert 1600 <= peak < 1600 + 200  # blocks are rounded up


def test_types() -> None:
    assert dtype_of("bf16-mixed") is dtype_of("bf16-true") is torch.bfloat16
    assert dtype_of("32-true") is torch.float32
    assert (dtype_of("16-mixed"), dtype_of("64-true")) == (torch.float16, torch.float64)
