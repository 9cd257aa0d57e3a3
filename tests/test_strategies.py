"""More than one process: the same training as one process with the same global batch."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.accelerators.xla import XLAAccelerator
from PIL import Image

from simmim import load_encoder
from simmim.checkpoints import BEFORE, put_in_place, there_is
from simmim.cli import main
from simmim.durable import UNFINISHED
from simmim.pretrain import SimMIM
from simmim.run import clean_up
from simmim.strategies import FullyShard
from simmim.weights.files import read_checkpoint
from simmim.weights.shards import META
from simmim.xla import wake_xla
from test_exact import TINY


def _start(name: str, *args: str) -> None:
    script = Path(__file__).with_name(name)
    # A seed that an earlier test left there would be set again in several processes, not in one.
    env = {key: value for key, value in os.environ.items() if key != "PL_GLOBAL_SEED"}
    done = subprocess.run(
        [sys.executable, str(script), *args],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=script.parent,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-2000:]


# What training comes to -------------------------------------------------------------------------


class Runs:
    """Trains with `ddp_step.py`, each way once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, {}  # type: ignore[var-annotated]

    def __call__(self, processes: int, **options: Any) -> dict[str, Any]:
        """What a run gave, and the `file` of its last checkpoint."""
        return self.together(processes, options)[0]

    def together(self, processes: int, *options: dict[str, Any]) -> list[dict[str, Any]]:
        """What several runs gave, one after the other in the same processes."""
        keys = [(processes, *(f"{k}={value}" for k, value in run.items())) for run in options]
        new = [key for key in keys if key not in self.made]
        files = [
            [self.folder / f"{len(self.made) + i}.{end}" for end in ("pt", "ckpt")]
            for i in range(len(new))
        ]
        words = [
            word
            for key, (out, file) in zip(new, files, strict=True)
            for word in ("--", str(out), *key[1:], f"save={file}")
        ]
        if new:
            _start("ddp_step.py", str(processes), *words[1:])
        for key, (out, file) in zip(new, files, strict=True):
            self.made[key] = {**torch.load(out, weights_only=True), "file": file}
        return [self.made[key] for key in keys]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def close(a: Any, b: Any, atol: float = 1e-6) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-5, atol=atol)


def assert_same_training(one: dict[str, Any], many: dict[str, Any], optimizer: bool = True) -> None:
    """Losses, learning rates, weights, and the optimiser's state of each parameter."""
    for key in ("losses", "norms"):
        close(many[key], one[key])
    assert many["rates"] == one["rates"]
    a, b = (read_checkpoint(run["file"]) for run in (one, many))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name in a["state_dict"]:
        close(b["state_dict"][name], a["state_dict"][name], atol=1e-5)
    (a,), (b,) = a["optimizer_states"], b["optimizer_states"]
    kept = [json.dumps([{**g, "fused": None} for g in s["param_groups"]]) for s in (a, b)]
    assert json.loads(kept[0]) == json.loads(kept[1])  # a tuple may have become a list
    for i in a["state"] if optimizer else ():
        for name in a["state"][i]:
            close(b["state"][i][name], a["state"][i][name], atol=1e-8)


SHARDED = ("fully_shard", "fully_shard_sharded", "fsdp", "fsdp_sharded")
# Where there is no GPU to copy from, torch's FSDP gives the moments of all names one buffer.
WHOLE = {"fsdp": False, "fsdp_no_shard": False}


def test_two_processes_learn_what_one_learns(runs: Runs) -> None:
    assert_same_training(runs(1), runs(2))


@pytest.mark.exhaustive
def test_four_processes_learn_what_one_learns(runs: Runs) -> None:
    assert_same_training(runs(1), runs(4))


@pytest.mark.exhaustive
def test_clipping_and_accumulation_mean_the_same(runs: Runs) -> None:
    """What is clipped is the norm of the whole gradient: otherwise the weights would differ."""
    options = {"clip": 0.05, "batches": 2}
    one, free = runs.together(1, options, {"batches": 2})
    assert max(abs(a - b) for a, b in zip(one["losses"], free["losses"], strict=True)) > 1e-4
    ways = ("ddp", *SHARDED, "fsdp_no_shard")  # the last has the whole norm in every process
    of_two = runs.together(2, *({"strategy": way, **options} for way in ways))
    for way, many in zip(ways, of_two, strict=True):
        assert_same_training(one, many, WHOLE.get(way, True))


@pytest.mark.exhaustive
def test_clipping_by_value_means_the_same(runs: Runs) -> None:
    """Gradients are averaged over processes before each value is cut off, in shards too."""
    options: dict[str, Any] = {"clip": 1e-3, "clip_by": "value", "batches": 2}
    one, free = runs.together(1, options, {"batches": 2})
    assert max(abs(a - b) for a, b in zip(one["losses"], free["losses"], strict=True)) > 1e-4
    ways = ("ddp", "fully_shard", "fsdp")
    of_two = runs.together(2, *({**options, "strategy": way} for way in ways))
    for way, many in zip(ways, of_two, strict=True):
        assert_same_training(one, many, WHOLE.get(way, True))
    assert_same_training(one, runs(4, **options, strategy="fully_shard"))


@pytest.mark.exhaustive
def test_layer_decay_and_frozen_parameters_mean_the_same(runs: Runs) -> None:
    models = ("finetune", "probe")
    ways = ("ddp", "fully_shard", "fsdp")
    singles = runs.together(1, *({"model": model, "clip": 0.05} for model in models))
    cases = [(model, way) for model in models for way in ways]
    of_two = runs.together(2, *({"model": m, "clip": 0.05, "strategy": w} for m, w in cases))
    for (model, way), many in zip(cases, of_two, strict=True):
        one = singles[models.index(model)]
        assert_same_training(one, many, WHOLE.get(way, True))
    groups = read_checkpoint(singles[0]["file"])["optimizer_states"][0]["param_groups"]
    assert {group["lr_scale"] for group in groups} == {0.125, 0.5, 1.0}  # 0.25: the frozen block


def test_shards_learn_what_one_process_learns(runs: Runs) -> None:
    assert_same_training(runs(1), runs(2, strategy="fully_shard"))


@pytest.mark.exhaustive
def test_four_shards_learn_what_one_process_learns(runs: Runs) -> None:
    assert_same_training(runs(1), runs(4, strategy="fully_shard"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", ["fully_shard", "fsdp"])
@pytest.mark.parametrize("model", ["skip", "swin_skip"])
def test_hidden_tokens_are_skipped_in_shards(runs: Runs, model: str, strategy: str) -> None:
    """Blocks and stages are called as timm does: their weights are gathered for the call only."""
    one, many = runs(1, model=model), runs(2, model=model, strategy=strategy)
    for key in ("losses", "norms"):
        close(many[key], one[key])
    assert many["rates"] == one["rates"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "ways", [("fully_shard", 2), ("fully_shard_sharded", 4), ("fsdp_sharded", 2)]
)
def test_a_sharded_run_goes_on_in_any_way(
    runs: Runs, ways: tuple[str, int], tmp_path: Path
) -> None:
    """With the same strategy on two processes, with one process, and from a file of `convert`."""
    strategy, processes = ways
    whole = runs(1, clip=0.05)
    half = runs(processes, strategy=strategy, clip=0.05, epochs=2)["file"]
    assert half.is_dir() == strategy.endswith("sharded")
    assert {path.name for path in half.parent.glob(".*")} == set()
    converted = half
    if half.is_dir():
        converted = tmp_path / "one.ckpt"
        assert main(["convert", "--weights", str(half), "--out", str(converted)]) == 0
    for strategies, processes, file in (
        (strategy, 2, half),
        ("auto", 1, half),
        (strategy, 2, converted),
    ):
        rest = runs(processes, strategy=strategies, clip=0.05, load=file)
        rest = {**rest, **{key: whole[key][:4] + rest[key] for key in ("losses", "norms", "rates")}}
        assert_same_training(whole, rest)
    model = SimMIM.load_from_checkpoint(converted)
    assert load_encoder(half).state_dict().keys() == model.encoder.model.state_dict().keys()
    for name, tensor in load_encoder(half).state_dict().items():
        assert torch.equal(tensor, model.encoder.model.state_dict()[name])


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", SHARDED[::2])
def test_a_run_of_one_process_goes_on_in_shards(runs: Runs, strategy: str) -> None:
    whole, half = runs(1, clip=0.05), runs(1, clip=0.05, epochs=2)
    rest = runs(2, strategy=strategy, clip=0.05, load=half["file"])
    rest = {**rest, **{key: whole[key][:4] + rest[key] for key in ("losses", "norms", "rates")}}
    assert_same_training(whole, rest, WHOLE.get(strategy, True))


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


@pytest.mark.exhaustive
@pytest.mark.skipif(os.name == "nt", reason="kills a session of processes")
def test_a_run_in_shards_that_is_killed_goes_on(
    tmp_path: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kill -9, at any moment, and with every step written."""
    make_images(tmp_path / "images" / "a", 24)
    make_images(tmp_path / "images" / "b", 24)
    config = yaml.safe_load(TINY)
    strategy = {"save_distributed_checkpoint": True}
    config["trainer"] |= {
        "devices": 2,
        "max_epochs": 5,
        "strategy": {"class_path": "simmim.strategies.FullyShard", "init_args": strategy},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    fit = [sys.executable, "-m", "simmim", "pretrain", "fit", "-c", "tiny.yaml"]
    often = [*fit, "--checkpoint.every_n_minutes=0"]
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    assert subprocess.call([*often, "--name=whole"], stdout=log, stderr=log) == 0
    whole, last = (Path(f"runs/{name}/version_0/checkpoints/last.ckpt") for name in ("whole", "b"))
    steps = [0]
    for i in range(3):
        more = ["--name=b", *(["--ckpt_path=last"] if i else [])]
        run = subprocess.Popen([*often, *more], stdout=log, stderr=log, start_new_session=True)
        began, before = time.time(), last.stat().st_ino if last.exists() else None
        while run.poll() is None and (not last.exists() or last.stat().st_ino == before):
            assert time.time() - began < 120
            time.sleep(0.001)
        time.sleep(0.03 * i)
        os.killpg(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, Path("log.txt").read_text()[-3000:]
        assert there_is(last)
        steps.append(read_checkpoint(last)["global_step"])
    assert steps == sorted(steps)
    one = read_checkpoint(whole)
    assert steps[-1] < one["global_step"]
    end = subprocess.call([*often, "--name=b", "--ckpt_path=last"], stdout=log, stderr=log)
    assert end == 0, Path("log.txt").read_text()[-3000:]
    other = read_checkpoint(last)
    assert other["global_step"] == one["global_step"]
    for name, tensor in one["state_dict"].items():
        assert torch.equal(other["state_dict"][name], tensor), name
    assert {path.name for path in last.parent.iterdir()} == {"last.ckpt", "best.ckpt"}
    for command in (
        ["embed", "--weights", "runs/b/version_0", "--root", "images", "--out", "f.npz"],
        ["export", "--weights", "runs/b/version_0", "--out", "encoder"],
        ["pretrain", "validate", "--ckpt_path", "runs/b/version_0", "-c", "cpu"],
    ):
        words = [sys.executable, "-m", "simmim", *command]
        assert subprocess.call(words, stdout=log, stderr=log) == 0, Path("log.txt").read_text()[
            -3000:
        ]


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


def test_an_index_of_shards_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({}, tmp_path / META)
    with pytest.raises(ValueError, match=r"is no whole checkpoint in shards: \.metadata"):
        read_checkpoint(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"it asks to run (posix|nt)\.system"):
        read_checkpoint(tmp_path)
    assert not Path("evil").exists()


def test_tensor_parallel_is_refused() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size 2 is not supported"):
        FullyShard(tensor_parallel_size=2)


# What is scored ---------------------------------------------------------------------------------


def test_two_processes_score_what_one_scores(
    tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    """Each validation image counts once, though 13 cannot be dealt out evenly."""
    for name, n in (("a", 11), ("b", 9), ("c", 17)):
        make_images(tmp_path / "images" / name, n)
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        _start("ddp_classify.py", str(processes), str(tmp_path / "images"), str(out))
        found[processes] = torch.load(out / "found.pt", weights_only=True)
    one, two = found[1], found[2]
    assert torch.equal(one["confusion"], two["confusion"])
    assert int(one["confusion"].sum()) == 13
    for name in ("loss", "top1", "top1_balanced", "calibration_error", "top1_class/a"):
        shares = [run["metrics"][f"val/{name}"] for run in (one, two)]
        assert shares[1] == pytest.approx(shares[0], rel=1e-4), name
    tables = [(tmp_path / n / "predictions.csv").read_text().splitlines() for n in "12"]
    rows = [[line.split(",") for line in table[1:]] for table in tables]
    assert len(rows[0]) == 37
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]]
    shares = [torch.tensor([[float(x) for x in row[2:]] for row in table]) for table in rows]
    torch.testing.assert_close(shares[1], shares[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "strategy", ["ddp", pytest.param("fully_shard", marks=pytest.mark.exhaustive)]
)
def test_two_processes_segment_what_one_segments(tmp_path: Path, strategy: str) -> None:
    """Each validation image counts once, though five of two sizes cannot be dealt out evenly.

    Nor can their windows: with weights in shards no process waits for another for ever.
    """
    rng = np.random.default_rng(0)
    for part, n in (("train", 8), ("val", 5)):
        for i in range(n):
            size = (40, 50) if i % 2 else (20, 64)
            for kind, pixels in (
                ("images", rng.integers(0, 256, (*size, 3), dtype=np.uint8)),
                ("masks", rng.integers(0, 3, size, dtype=np.uint8)),
            ):
                (tmp_path / "d" / part / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / "d" / part / kind / f"{i}.png")
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        way = strategy if processes > 1 else "auto"
        _start("ddp_segment.py", str(processes), str(tmp_path / "d"), str(out), way)
        found[processes] = torch.load(out / "found.pt", weights_only=True)
    for name in ("loss", "miou", "pixel_accuracy", "iou/0", "iou/2"):
        shares = [found[n][f"val/{name}"] for n in (1, 2)]
        assert shares[1] == pytest.approx(shares[0], rel=1e-4), name
    masks = [sorted((tmp_path / n / "predictions").rglob("*.png")) for n in "12"]
    assert [len(paths) for paths in masks] == [13, 13]
    for one, two in zip(*masks, strict=True):
        assert one.relative_to(tmp_path / "1") == two.relative_to(tmp_path / "2")
        assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(two)))


@pytest.mark.parametrize(
    ("accelerator", "devices", "there", "woken"),
    [
        ("tpu", "auto", 1, True),
        ("auto", 1, 8, True),
        ("tpu", [3], 8, True),
        ("tpu", "auto", 8, False),  # eight processes, each of which makes its own
        ("cpu", 1, 8, False),
        ("auto", "auto", 0, False),
    ],
)
def test_a_single_xla_device_is_there_before_the_model(
    accelerator: str, devices: Any, there: int, woken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    fake = SimpleNamespace(device=lambda: calls.append(True))
    monkeypatch.setitem(sys.modules, "torch_xla", fake)
    monkeypatch.setattr(XLAAccelerator, "auto_device_count", lambda: there)
    monkeypatch.setattr(XLAAccelerator, "is_available", lambda: there > 0)
    wake_xla(accelerator, devices)
    assert calls == [True] * woken
