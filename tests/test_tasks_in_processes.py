"""Each task over some processes, from the command line: it trains, goes on, scores and predicts."""

import csv
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simmim import Classifier, Detector, Segmenter, load_encoder
from simmim.cli import main
from simmim.pretrain import SimMIM
from simmim.weights.files import read_checkpoint
from test_detect import blocks

pytestmark = [
    pytest.mark.exhaustive,
    # jsonargparse's own, about what LightningCLI calls
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]

VIT = "'{patch_size: 8, embed_dim: 32, depth: 4, num_heads: 2}'"
QUIET = (
    "--trainer.accelerator=cpu --trainer.precision=32-true --trainer.enable_progress_bar=false "
    "--trainer.enable_model_summary=false --data.num_workers=0"
)
WAYS = {"ddp": "-c ddp", "fsdp": "-c fsdp --trainer.strategy.save_distributed_checkpoint=true"}
NODES = {"ddp": 1, "fsdp": 2}  # of one machine
DISTANCE = "val/avg_dist"  # of each process's first batch
ON_WEIGHTS = "--model.weights=WAY/pretrain/version_0 --model.warmup_epochs=0"
TASKS = {  # 7 images validate, which neither two nor four processes can share evenly
    "pretrain": "--data.root=images --data.batch_size=4 --data.statistics=measured "
    "--model.encoder=vit_tiny_patch16_224 --model.img_size=32 --model.mask_patch_size=8 "
    f"--model.encoder_kwargs={VIT} --probe.every_n_epochs=1 "
    "--trainer.accumulate_grad_batches=2",
    "classify": f"--data.root=images --data.batch_size=4 {ON_WEIGHTS} --model.layer_decay=0.5",
    "probe": f"-c linear_probe --data.root=images --data.batch_size=4 {ON_WEIGHTS}",
    "segment": f"--data.root=masks --data.batch_size=2 {ON_WEIGHTS} --model.base_lr=0.5 "
    "--model.decoder_channels=16",
    "detect": f"--data.root=boxes --data.batch_size=2 {ON_WEIGHTS} --model.img_size='[48, 64]' "
    "--model.fpn_channels=16 --model.proposals=50 --model.rois_per_image=16 "
    "--model.anchor_sizes='[8, 12, 16, 20, 24]' --model.score_threshold=0.0 "
    "--trainer.gradient_clip_val=0.1 --trainer.gradient_clip_algorithm=value",
}


def command(task: str) -> str:
    return "classify" if task == "probe" else task


# Images -----------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, for_commands: None) -> Path:
    """A working folder with images/ of three classes, masks/, boxes/; new/ and few/ to predict."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)

    def save(path: str, size: tuple[int, int], shade: int = 0) -> None:
        pixels = rng.integers(shade, shade + 150, (*size, 3), dtype=np.uint8)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    for part, counts in {"train": (8, 8, 8), "val": (3, 2, 2)}.items():
        for label, n in enumerate(counts):
            for i in range(n):
                save(f"images/{part}/{'abc'[label]}/{i}.png", (32, 32), 50 * label)
    for part, n in {"train": 8, "val": 7}.items():
        for i in range(n):
            size = (40, 50) if i % 2 else (20, 64)
            save(f"masks/{part}/images/{i}.png", size)
            mask = rng.integers(0, 3, size, dtype=np.uint8)
            mask[: i + 1] = 255  # no class: the images have uneven numbers of pixels
            Path(f"masks/{part}/masks").mkdir(exist_ok=True)
            Image.fromarray(mask).save(f"masks/{part}/masks/{i}.png")
        blocks(Path("boxes", part), n)
    for i in range(7):
        save(f"new/{i}.png", (30 + i, 64 - i))
    save("few/0.png", (32, 32))
    return tmp_path


# Processes --------------------------------------------------------------------------------------


def in_processes(n: int, nodes: int, lines: list[str]) -> str:
    """Run command lines in n processes, as torchrun starts them; what the first one said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Path("commands.txt").write_text("\n".join(lines))
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torchrun |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n // nodes)}
    script = Path(__file__).with_name("commands.py")
    processes, logs = [], [Path(f"log_{rank}.txt") for rank in range(n)]
    for rank, log in enumerate(logs):
        node, local = divmod(rank, n // nodes)
        place = {"RANK": str(rank), "LOCAL_RANK": str(local), "GROUP_RANK": str(node)}
        words, env = [sys.executable, str(script), "commands.txt"], os.environ | torchrun | place
        with log.open("wb") as file:
            processes.append(subprocess.Popen(words, stdout=file, stderr=file, env=env))
    try:
        began = time.monotonic()
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            assert time.monotonic() - began < 900, logs[0].read_text()[-3000:]
            time.sleep(0.1)
        for process, log in zip(processes, logs, strict=True):
            assert not process.poll(), log.read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return logs[0].read_text()


def in_one(line: str) -> None:
    """Run a command line in this process."""
    assert main(shlex.split(line)) == 0


def over(way: str, processes: int) -> str:
    nodes = NODES[way]
    return f"--trainer.devices={processes // nodes} --trainer.num_nodes={nodes}"


def fits(way: str) -> list[str]:
    """Each task trains for an epoch in two processes, and goes on for another."""
    lines = []
    for task, options in TASKS.items():
        of = f"--name={task} --run_dir={way} {over(way, 2)} {QUIET}"
        said = f"{options} --trainer.log_every_n_steps=1".replace("WAY", way)
        if (task, way) == ("classify", "ddp"):
            said += " --model.ema_decay=0.5"
        lines.append(f"{command(task)} fit {WAYS[way]} {of} {said} --trainer.max_epochs=1")
        lines.append(f"{command(task)} fit {of} --ckpt_path=last --trainer.max_epochs=2")
    return lines


def scores(way: str, options: str) -> list[str]:
    """Each task scores 7 images and predicts 7 others, from the same checkpoint."""
    lines = []
    for task in TASKS:
        of = f"--ckpt_path={way}/{task}/version_0 {options} {QUIET}"
        lines.append(f"{command(task)} validate {of} --data.batch_size=1")
        lines.append(f"{command(task)} predict {of} --data.root=new")
    return lines


def put_aside(way: str, name: str) -> None:
    """Keep what was predicted where the next ones do not fall upon it."""
    for run in Path(way).glob("*/version_0"):
        (run / name).mkdir()
        for path in [*run.glob("predictions*")]:
            path.rename(run / name / path.name)


# What is compared -------------------------------------------------------------------------------


def rows(file: Path) -> list[dict[str, float]]:
    with file.open(newline="") as stream:
        return [
            {k: float(v) for k, v in row.items() if v and k.startswith("val/") and k != DISTANCE}
            for row in csv.DictReader(stream)
        ]


def assert_same_scores(run: Path) -> None:
    """Some processes and one count each image once, in `fit` as in `validate`."""
    several, one = rows(run / "validate.csv")
    *_, last = [row for row in rows(run / "metrics.csv") if "val/loss" in row]
    assert len(one) > 1
    for found in (several, last):
        assert found.keys() == one.keys()
        for name, value in found.items():
            assert value == pytest.approx(one[name], rel=1e-4, abs=1e-6), (run, name)
    assert one.get("val/mar_100", 1) > 0


def assert_same_predictions(run: Path) -> None:
    for path in sorted((run / "one").rglob("*.*")):
        same = run / "several" / path.relative_to(run / "one")
        if path.suffix == ".csv":
            tables = [[r.split(",") for r in p.read_text().splitlines()] for p in (path, same)]
            assert len(tables[0]) == 8
            assert [row[:2] for row in tables[0]] == [row[:2] for row in tables[1]]
            shares = [np.array([row[2:] for row in t[1:]], float) for t in tables]
            np.testing.assert_allclose(*shares, rtol=1e-3, atol=1e-5)
        elif path.suffix == ".json":
            one, found = (json.loads(p.read_text()) for p in (path, same))
            assert [r["file_name"] for r in one] == [r["file_name"] for r in found]
            np.testing.assert_allclose(
                *([r["bbox"] for r in results] for results in (one, found)), atol=0.02
            )
            assert len({r["file_name"] for r in one}) == 7
        else:
            one, found = (Image.open(p) for p in (path, same))
            apart = np.abs(np.asarray(one).astype(int) - np.asarray(found).astype(int))
            assert (apart > (0 if one.mode == "P" else 2)).mean() < 0.005, path
    names = [sorted(p.name for p in (run / n).rglob("*.*")) for n in ("several", "one")]
    assert names[0] == names[1] != []


@pytest.mark.parametrize(("way", "processes"), [("ddp", 2), ("fsdp", 4)])
def test_every_task_is_the_same_over_processes(place: Path, way: str, processes: int) -> None:
    """Trained by two and gone on with; then scored and asked by some, and by one."""
    of = over(way, processes)
    refused = [
        f"! pretrain predict --ckpt_path={way}/pretrain/version_0 --data.root=few {of} {QUIET}"
    ]
    if way == "fsdp":
        begin = f"! classify fit -c fsdp --data.root=images --run_dir=no {of} {QUIET}"
        begin += f" {ON_WEIGHTS}".replace("WAY", way)
        refused += [f"{begin} --model.ema_decay=0.5", f"{begin} --trainer.sync_batchnorm=true"]
    lines = [*refused, *scores(way, of)]
    if processes > 2:
        in_processes(2, NODES[way], fits(way))
    else:
        lines = [*fits(way), *lines]
    said = in_processes(processes, NODES[way], lines)
    assert f"1 images to evaluate are fewer than the {processes} processes" in said
    assert "Traceback" not in said
    if way == "fsdp":
        assert "simmim: ema_decay averages whole weights" in said
        assert "simmim: trainer.sync_batchnorm does nothing with fully_shard" in said
    assert not Path("no").exists()
    put_aside(way, "several")
    for line in scores(way, "--trainer.devices=1 --trainer.num_nodes=1 --trainer.strategy=auto"):
        in_one(line)
    put_aside(way, "one")
    for task in TASKS:
        run = Path(way, task, "version_0")
        assert [path.name for path in run.parent.iterdir()] == ["version_0"]
        assert (run / "report.html").exists()
        last = run / "checkpoints/last.ckpt"
        assert last.is_dir() == (way == "fsdp")
        assert read_checkpoint(last)["epoch"] == 1
        assert_same_scores(run)
        assert_same_predictions(run)
    if way == "fsdp":
        assert_every_command_reads_shards(place)


# Shards, one file, and the commands -------------------------------------------------------------


def assert_every_command_reads_shards(place: Path) -> None:
    """As they read the one file that `convert` makes of them."""
    kinds: dict[str, Any] = {
        "pretrain": SimMIM,
        "classify": Classifier,
        "probe": Classifier,
        "segment": Segmenter,
        "detect": Detector,
    }
    for task, kind in kinds.items():
        run, one = f"fsdp/{task}/version_0", f"{task}.ckpt"
        in_one(f"convert --weights={run} --out={one}")
        model = kind.load_from_checkpoint(one)
        again = kind.load_from_checkpoint(f"{run}/checkpoints/last.ckpt")
        assert_equal(again.state_dict(), model.state_dict())
        assert_equal(load_encoder(run).state_dict(), load_encoder(one).state_dict())
        for weights, out in ((run, "shards"), (one, "file")):
            options = "--map=none --neighbours=0 --accelerator=cpu --num_workers=0"
            in_one(f"embed --weights={weights} --root=images --out={task}_{out}.npz {options}")
            in_one(f"export --weights={weights} --out={task}_{out}")
        features = [np.load(f"{task}_{out}.npz")["features"] for out in ("shards", "file")]
        np.testing.assert_array_equal(*features)
        assert features[0].std(0).min() > 0
        exported = [Path(f"{task}_{out}") for out in ("shards", "file")]
        for name in ("config.json", "model.safetensors"):
            assert (exported[0] / name).read_bytes() == (exported[1] / name).read_bytes()
        if task == "pretrain":
            measured = model.mean
        torch.testing.assert_close(model.mean, measured)  # not ImageNet's
        if task in ("classify", "segment", "detect"):  # what is on the encoder comes along
            widths = {"segment": "decoder_channels", "detect": "fpn_channels"}
            inherited = kind(weights=run, **({widths[task]: 16} if task in widths else {}))
            assert inherited.head_is_inherited
            assert inherited.classes == model.classes != []
    assert json.loads(Path("classify_shards/config.json").read_text())["label_names"] == [*"abc"]
    few = "--root=images --epochs=1 --min_steps=2 --seeds=1 --budgets=[1.0] --accelerator=cpu"
    in_one(f"compare --weights=fsdp/segment/version_0 {few} --num_workers=0 --out=compared")
    assert "scratch" in Path("compared/summary.md").read_text()
    words = f"compare --weights=fsdp/classify/version_0 {few}".split()
    assert main(words) == 1  # it knows the labels already


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
