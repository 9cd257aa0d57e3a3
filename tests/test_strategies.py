"""More than one process: the same training as one process with the same global batch."""

import json
import os
import pickle
import shutil
import sys
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.accelerators.xla import XLAAccelerator
from lightning.pytorch.strategies import FSDPStrategy
from PIL import Image

from simmim import load_encoder
from simmim.base.files import UNFINISHED
from simmim.pretrain import SimMIM
from simmim.runs.checkpoints import BEFORE, put_in_place, there_is
from simmim.runs.folder import clean_up
from simmim.training.strategies import FullyShard, refuse_fsdp
from simmim.training.xla import wake_xla
from simmim.weights.files import read_checkpoint
from simmim.weights.shards import META
from support import exhaustive
from support.commands import assert_same_tensors, column, refused, simmim, state, write_tiny
from support.folders import make_images
from support.processes import commands, in_processes

# What training comes to -------------------------------------------------------------------------

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
FOREGROUND = {"masking": "foreground", "masking_kwargs": {"nodata": 0}}
STEPS = {"schedule": "multistep", "milestones": [3]}  # the rates do not depend on the length
SKIP = "--model.masking=random --model.masking_kwargs=null --model.hidden_tokens=skip "
SKIP += "--model.head=transformer --model.head_kwargs='{width: 64}'"
SWIN = "--model.encoder=swin_tiny_patch4_window7_224 --model.mask_patch_size=16 "
SWIN += "--model.encoder_kwargs='{embed_dim: 8, depths: [2, 2], num_heads: [1, 2], window_size: 4}'"
BY_VALUE = "--trainer.gradient_clip_val=1e-3 --trainer.gradient_clip_algorithm=value"
WAYS: dict[str, tuple[int, str]] = {  # images in a global batch, options
    "plain": (8, "pretrain fit -c tiny.yaml"),
    "free": (4, "pretrain fit -c tiny.yaml --trainer.accumulate_grad_batches=2"),
    "clipped": (
        4,
        "pretrain fit -c tiny.yaml --trainer.accumulate_grad_batches=2 "
        "--trainer.gradient_clip_val=0.05",
    ),
    "by_value": (
        4,
        f"pretrain fit -c tiny.yaml --trainer.accumulate_grad_batches=2 {BY_VALUE}",
    ),
    "finetune": (8, "classify fit -c classes.yaml --model.layer_decay=0.5 --model.num_classes=2"),
    "probe": (8, "classify fit -c classes.yaml --model.frozen=true"),
    "skip": (8, f"pretrain fit -c tiny.yaml {SKIP}"),
    "swin_skip": (8, f"pretrain fit -c tiny.yaml {SKIP} {SWIN}"),
}
CPU = "--trainer.accelerator=cpu --trainer.precision=32-true"
STRATEGIES = {
    "auto": "",
    "ddp": "--trainer.strategy=ddp",
    "fully_shard": "--trainer.strategy=fully_shard",
    "sharded": f"-c fsdp --trainer.strategy.save_distributed_checkpoint=true {CPU}",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/ (16 to train on), tiny.yaml and classes.yaml."""
    folder = tmp_path_factory.mktemp("strategies")
    for name in "ab":
        for i, path in enumerate(sorted(make_images(folder / "images" / name, 10).iterdir())):
            pixels = np.array(Image.open(path))
            pixels[: 16 * (i % 2)] = 0  # half is nodata: uneven numbers are hidden
            Image.fromarray(pixels).save(path)
    model = {"encoder_kwargs": VIT, "drop_rate": 0.0, **STEPS}
    free, split = {"gradient_clip_val": None}, {"val_fraction": 0.2}
    write_tiny(folder, model={**model, **FOREGROUND}, data=split, trainer=free)
    content = yaml.safe_load((folder / "tiny.yaml").read_text())
    for name in ("drop_rate", "mask_patch_size", *FOREGROUND):
        del content["model"][name]
    del content["probe"], content["reconstructions"]
    (folder / "classes.yaml").write_text(yaml.safe_dump(content))
    return folder


def fit(place: Path, n: int, strategy: str, *names: str, more: str = "") -> list[Path]:
    """Train in each of these ways in the same processes, unless that is done."""
    out, lines = f"{n}_{strategy}{'_more' if more else ''}", []
    for name in names:
        batch, line = WAYS[name]
        line += f" --name={name} --run_dir={out} --data.batch_size={batch // n} {more}"
        line += f" --trainer.devices={n} {STRATEGIES[strategy]}"
        if more or not (place / out / name).exists():
            lines.append(line)
    with chdir(place):
        if lines:
            in_processes(n, commands, lines)
    return [max((place / out / name).iterdir()) for name in names]


def close(a: Any, b: Any, atol: float = 1e-6) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-5, atol=atol)


def assert_same_state(one: Path, many: Path) -> None:
    """Weights, and the optimiser's groups and state of each parameter."""
    a, b = state(one), state(many)
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name in a["state_dict"]:
        close(b["state_dict"][name], a["state_dict"][name], atol=1e-5)
    (a,), (b,) = a["optimizer_states"], b["optimizer_states"]
    groups = [
        json.dumps([{**g, "fused": None} for g in s["param_groups"]], sort_keys=True)
        for s in (a, b)
    ]
    assert groups[0] == groups[1]
    for i in a["state"]:
        for name in a["state"][i]:
            close(b["state"][i][name], a["state"][i][name], atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "strategy", "names"),
    [
        (2, "ddp", ["clipped"]),
        (2, "fully_shard", ["clipped"]),
        *(exhaustive(n, strategy, [*WAYS]) for n in (2, 4) for strategy in ("ddp", "fully_shard")),
    ],
)
def test_processes_learn_what_one_learns(
    place: Path, n: int, strategy: str, names: list[str]
) -> None:
    """Clipped by the whole gradient's norm, or by value; with layer decay, frozen, skipping."""
    several, single = fit(place, n, strategy, *names), fit(place, 1, "auto", *names)
    (free,) = fit(place, 1, "auto", "free")
    for name, one, many in zip(names, single, several, strict=True):
        curves = [column(run / "metrics.csv", "train/loss") for run in (one, many, free)]
        close(curves[1], curves[0])
        for other in ("train/grad_norm", "lr"):
            close(*(column(run / "metrics.csv", other) for run in (one, many)))
        if "skip" not in name:
            assert_same_state(one, many)
        if name in ("clipped", "by_value"):  # otherwise they would prove nothing
            assert (torch.tensor(curves[0]) - torch.tensor(curves[2])).abs().max() > 1e-4


@pytest.mark.exhaustive
@pytest.mark.parametrize(("strategy", "n"), [("auto", 1), ("fully_shard", 2), ("sharded", 4)])
def test_a_run_goes_on_in_any_way(place: Path, strategy: str, n: int, tmp_path: Path) -> None:
    """In shards on two processes, with one process, and from a file of `convert`."""
    (whole,) = fit(place, 1, "auto", "plain")
    (half,) = fit(place, n, strategy, "plain", more="--trainer.max_epochs=2")
    file = converted = tmp_path / "half.ckpt"
    last = half / "checkpoints/last.ckpt"
    assert last.is_dir() == (strategy == "sharded")
    (shutil.copytree if last.is_dir() else shutil.copy)(last, file)
    if last.is_dir():
        converted = tmp_path / "one.ckpt"
        simmim("convert --weights", str(file), "--out", str(converted))
    model = SimMIM.load_from_checkpoint(converted)
    assert_same_tensors(load_encoder(file).state_dict(), model.encoder.model.state_dict())
    shards = strategy if n > 1 else "fully_shard"
    for way, count, source in ((shards, 2, file), ("auto", 1, file), (shards, 2, converted)):
        (rest,) = fit(place, count, way, "plain", more=f"--ckpt_path={source}")
        assert_same_state(whole, rest)


# Checkpoints that are folders -------------------------------------------------------------------


def test_a_folder_of_shards_is_replaced_and_put_back(tmp_path: Path) -> None:
    """Wherever a kill falls between the two renames, a whole checkpoint is found."""
    path, beside = tmp_path / "last.ckpt", tmp_path / f".last.ckpt{UNFINISHED}"
    for text in ("one", "two"):
        beside.mkdir()
        (beside / META).write_text(text)
        put_in_place(beside, path)
        assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    path.rename(tmp_path / f".last.ckpt{BEFORE}")  # and killed
    assert there_is(path)
    assert (path / META).read_text() == "two"
    assert not there_is(tmp_path / "best.ckpt")
    (tmp_path / f".last.ckpt{BEFORE}").mkdir()  # killed after both
    beside.mkdir()
    (tmp_path / "checkpoints").mkdir()
    for leftover in (beside, tmp_path / f".last.ckpt{BEFORE}"):
        leftover.rename(tmp_path / "checkpoints" / leftover.name)
    path.rename(tmp_path / "checkpoints" / "last.ckpt")
    clean_up(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


def test_an_index_of_shards_runs_no_code(workdir: Path) -> None:
    torch.save({}, workdir / META)
    with pytest.raises(ValueError, match=r"is no whole checkpoint in shards: \.metadata"):
        read_checkpoint(workdir)
    (workdir / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"it asks to run (posix|nt)\.system"):
        read_checkpoint(workdir)
    assert not Path("evil").exists()


def test_other_strategies_are_refused(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(Path("images"), 4)
    line = "pretrain fit -c cpu --data.root=images --trainer.strategy=fsdp"
    assert "use its successor, --trainer.strategy fully_shard" in refused(capsys, line, status=1)
    with pytest.raises(ValueError, match="fully_shard"):
        refuse_fsdp(FSDPStrategy())
    with pytest.raises(ValueError, match="tensor_parallel_size 2 is not supported"):
        FullyShard(tensor_parallel_size=2)


def test_a_single_xla_device_is_there_before_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    fake = SimpleNamespace(device=lambda: calls.append(True))
    monkeypatch.setitem(sys.modules, "torch_xla", fake)
    for accelerator, devices, there, woken in (
        ("tpu", "auto", 1, True),
        ("auto", 1, 8, True),
        ("tpu", [3], 8, True),
        ("tpu", "auto", 8, False),  # eight processes, each of which makes its own
        ("cpu", 1, 8, False),
        ("auto", "auto", 0, False),
    ):
        calls.clear()
        monkeypatch.setattr(XLAAccelerator, "auto_device_count", lambda there=there: there)
        monkeypatch.setattr(XLAAccelerator, "is_available", lambda there=there: there > 0)
        wake_xla(accelerator, devices)
        assert calls == [True] * woken
