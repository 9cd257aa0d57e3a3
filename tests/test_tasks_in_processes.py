"""Each task over some processes, from the command line: it trains, goes on, scores and predicts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simmim import Classifier, Detector, Segmenter, load_encoder
from simmim.pretrain import SimMIM
from simmim.weights.files import read_checkpoint
from support.commands import assert_same_tensors, simmim, table
from support.folders import make_boxes, save
from support.processes import commands, in_processes

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
def place(workdir: Path) -> Path:
    """A working folder with images/ of three classes, masks/, boxes/; new/ and few/ to predict."""
    rng = np.random.default_rng(0)

    def noise(path: str, size: tuple[int, int], shade: int = 0) -> None:
        save(Path(path), rng.integers(shade, shade + 150, (*size, 3)))

    for part, counts in {"train": (8, 8, 8), "val": (3, 2, 2)}.items():
        for label, n in enumerate(counts):
            for i in range(n):
                noise(f"images/{part}/{'abc'[label]}/{i}.png", (32, 32), 50 * label)
    for part, n in {"train": 8, "val": 7}.items():
        for i in range(n):
            size = (40, 50) if i % 2 else (20, 64)
            noise(f"masks/{part}/images/{i}.png", size)
            mask = rng.integers(0, 3, size)
            mask[: i + 1] = 255  # no class: the images have uneven numbers of pixels
            save(Path(f"masks/{part}/masks/{i}.png"), mask)
    make_boxes(Path("boxes"), train=8, val=7)
    for i in range(7):
        noise(f"new/{i}.png", (30 + i, 64 - i))
    noise("few/0.png", (32, 32))
    return workdir


def over(way: str, processes: int) -> str:
    nodes = NODES[way]
    return f"--trainer.devices={processes // nodes} --trainer.num_nodes={nodes}"


def fits(way: str, tasks: list[str]) -> list[str]:
    """Each task trains for an epoch in two processes, and goes on for another."""
    lines = []
    for task in tasks:
        run = f"--name={task} --run_dir={way} {over(way, 2)} {QUIET}"
        options = f"{TASKS[task]} --trainer.log_every_n_steps=1".replace("WAY", way)
        if (task, way) == ("classify", "ddp"):
            options += " --model.ema_decay=0.5"
        lines.append(f"{command(task)} fit {WAYS[way]} {run} {options} --trainer.max_epochs=1")
        lines.append(f"{command(task)} fit {run} --ckpt_path=last --trainer.max_epochs=2")
    return lines


def scores(way: str, tasks: list[str], options: str) -> list[str]:
    """Each task scores 7 images and predicts 7 others, from the same checkpoint."""
    lines = []
    for task in tasks:
        run = f"--ckpt_path={way}/{task}/version_0 {options} {QUIET}"
        lines.append(f"{command(task)} validate {run} --data.batch_size=1")
        lines.append(f"{command(task)} predict {run} --data.root=new")
    return lines


def put_aside(way: str, name: str) -> None:
    """Keep what was predicted where the next ones do not fall upon it."""
    for run in Path(way).glob("*/version_0"):
        (run / name).mkdir()
        for path in [*run.glob("predictions*")]:
            path.rename(run / name / path.name)


# What is compared -------------------------------------------------------------------------------


def rows(file: Path) -> list[dict[str, float]]:
    return [
        {k: float(v) for k, v in row.items() if v and k.startswith("val/") and k != DISTANCE}
        for row in table(file)
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
    names = [sorted(p.name for p in (run / n).rglob("*.*")) for n in ("several", "one")]
    assert names[0] == names[1] != []
    for path in sorted((run / "one").rglob("*.*")):
        same = run / "several" / path.relative_to(run / "one")
        if path.suffix == ".csv":
            one, other = (np.array([[*row.values()] for row in table(p)]) for p in (path, same))
            assert len(one) == 7
            assert (one[:, :2] == other[:, :2]).all()
            shares = (rows[:, 2:].astype(float) for rows in (one, other))
            np.testing.assert_allclose(*shares, rtol=1e-3, atol=1e-5)
        elif path.suffix == ".json":
            results = [json.loads(p.read_text()) for p in (path, same)]
            files, others = ([r["file_name"] for r in found] for found in results)
            assert files == others
            assert len(set(files)) == 7
            boxes = ([r["bbox"] for r in found] for found in results)
            np.testing.assert_allclose(*boxes, atol=0.02)
        else:
            one, other = (Image.open(p) for p in (path, same))
            apart = np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))
            assert (apart > (0 if one.mode == "P" else 2)).mean() < 0.005, path


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("way", "processes", "tasks"),
    [
        ("ddp", 2, ["pretrain", "classify", "segment"]),
        ("ddp", 2, ["pretrain", "probe", "detect"]),
        ("fsdp", 4, [*TASKS]),
    ],
)
def test_every_task_is_the_same_over_processes(
    place: Path, way: str, processes: int, tasks: list[str]
) -> None:
    """Trained by two and gone on with; then scored and asked by some, and by one."""
    of = over(way, processes)
    lines = [
        f"! pretrain predict --ckpt_path={way}/pretrain/version_0 --data.root=few {of} {QUIET}"
    ]
    if way == "fsdp":
        begin = f"! classify fit -c fsdp --data.root=images --run_dir=no {of} {QUIET}"
        begin += f" {ON_WEIGHTS}".replace("WAY", way)
        lines += [f"{begin} --model.ema_decay=0.5", f"{begin} --trainer.sync_batchnorm=true"]
    lines += scores(way, tasks, of)
    if processes > 2:
        in_processes(2, commands, fits(way, tasks), nodes=NODES[way])
    else:
        lines = [*fits(way, tasks), *lines]
    log = in_processes(processes, commands, lines, nodes=NODES[way])
    assert f"1 images to evaluate are fewer than the {processes} processes" in log
    assert "Traceback" not in log
    if way == "fsdp":
        assert "simmim: ema_decay averages whole weights" in log
        assert "simmim: trainer.sync_batchnorm does nothing with fully_shard" in log
        assert not Path("no").exists()
    put_aside(way, "several")
    alone = "--trainer.devices=1 --trainer.num_nodes=1 --trainer.strategy=auto"
    for line in scores(way, tasks, alone):
        simmim(line)
    put_aside(way, "one")
    for task in tasks:
        run = Path(way, task, "version_0")
        assert [path.name for path in run.parent.iterdir()] == ["version_0"]
        assert (run / "report.html").exists()
        last = run / "checkpoints/last.ckpt"
        assert last.is_dir() == (way == "fsdp")
        assert read_checkpoint(last)["epoch"] == 1
        assert_same_scores(run)
        assert_same_predictions(run)
    if way == "fsdp":
        assert_commands_read_shards()


# Shards, one file, and the commands -------------------------------------------------------------


def assert_commands_read_shards() -> None:
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
        simmim(f"convert --weights={run} --out={one}")
        model = kind.load_from_checkpoint(one)
        again = kind.load_from_checkpoint(f"{run}/checkpoints/last.ckpt")
        assert_same_tensors(again.state_dict(), model.state_dict())
        assert_same_tensors(load_encoder(run).state_dict(), load_encoder(one).state_dict())
        if task == "pretrain":
            measured = model.mean
        torch.testing.assert_close(model.mean, measured)  # not ImageNet's
        if task in ("classify", "segment", "detect"):  # what is on the encoder comes along
            widths = {"segment": "decoder_channels", "detect": "fpn_channels"}
            inherited = kind(weights=run, **({widths[task]: 16} if task in widths else {}))
            assert inherited.head_is_inherited
            assert inherited.classes == model.classes != []
