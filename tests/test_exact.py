"""A run that was killed, at any moment and as often as you like, ends as if it had not been."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from support import exhaustive
from support.commands import state, table, write_tiny
from support.folders import make_classes
from support.processes import end, kill, program, run_command, said, start, start_command

OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"encoder_kwargs": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 1}},
    "data": {"val_fraction": 0.2},
    "probe": {"every_n_epochs": 2},
    "worst": {"every_n_epochs": 0},
}
OPTIONS["model"]["drop_path_rate"] = 0.1
# What is about the time and the machine, and not about the run.
CLOCK = {"throughput/images_per_s", "throughput/data_wait", "memory/max_gib"}

FIT = ["pretrain", "fit", "-c", "tiny.yaml"]
OFTEN = [*FIT, "--checkpoint.every_n_minutes=0"]  # a checkpoint at each step
LONGER = [*FIT, "--trainer.max_epochs=10"]

OTHER_DISK = "/dev/shm" if os.path.isdir("/dev/shm") else "/tmp"  # another file system on Linux

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks on Windows")


@pytest.fixture
def place(workdir: Path) -> Path:
    """A working folder with images/ of two classes (48 to train on) and tiny.yaml."""
    make_classes(Path("images"), 30)
    write_tiny(workdir, **OPTIONS)
    return workdir


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Compare two checkpoints to the bit, apart from the paths of their runs."""
    assert type(a) is type(b) or isinstance(a, int | float), where  # warmup_epochs 20 or 20.0
    if isinstance(a, dict):
        assert len(a) == len(b), where
        for (key, x), (other, y) in zip(a.items(), b.items(), strict=True):
            assert_equal(key, other, where)
            assert_equal(x, y, f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, str):
        assert a.replace("/whole/", "/parts/") == b, where
    else:
        assert a == b, where


def rows(run: Path) -> list[dict[str, str]]:
    found = table(run / "metrics.csv")
    return [{k: v for k, v in sorted(row.items()) if k not in CLOCK} for row in found]


def pictures(run: Path) -> dict[str, bytes]:
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*.png")}


def assert_same_run(whole: Path, parts: Path) -> None:
    """Weights, optimiser, schedule, counters, callbacks, best checkpoint, and every row."""
    assert rows(whole) == rows(parts)
    assert_equal(state(whole), state(parts))
    assert_equal(*(state(run, "best")["state_dict"] for run in (whole, parts)))
    assert pictures(whole) == pictures(parts)
    left = {path.name for path in parts.rglob("*") if path.is_file() and path.suffix != ".png"}
    assert left == {"config.yaml", "metrics.csv", "report.html", "last.ckpt", "best.ckpt"}
    assert [path.name for path in parts.parent.iterdir()] == [parts.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "options"),
    [
        exhaustive(20, ["--trainer.val_check_interval=3", "--trainer.max_epochs=10"]),
        exhaustive(4, ["--data.num_workers=2", "--trainer.max_epochs=10"]),
        (4, ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=5"]),
    ],
)
def test_a_run_that_is_killed_at_random_ends_as_if_it_was_not(
    place: Path, kills: int, options: list[str]
) -> None:
    """A quarter of the kills wait for a checkpoint that is being written; TMPDIR lies elsewhere."""
    options = [*OFTEN, *options]
    run_command(*options, "--name=whole")
    whole, parts = Path("runs/whole/version_0"), Path("runs/parts/version_0")
    began, ended = (whole / name for name in ("config.yaml", "checkpoints/last.ckpt"))
    seconds = ended.stat().st_mtime - began.stat().st_mtime
    draw, steps = random.Random(0), [0]
    for i in range(kills):
        go_on = ["--ckpt_path=last"] if i else []
        process = start_command(*options, "--name=parts", *go_on, TMPDIR=OTHER_DISK)
        wait_for_a_step(process, parts)
        if i % 4 == 3:
            while process.is_alive() and not list(parts.glob("checkpoints/.*.unfinished")):
                pass
        else:
            time.sleep(draw.uniform(0, seconds / kills / 3))  # the machine may be quicker by now
        assert kill(process) == -signal.SIGKILL
        steps.append(state(parts)["global_step"])  # it is whole, whenever it was killed
    assert steps == sorted(steps)
    assert steps[-1] < state(whole)["global_step"]  # each kill met a run
    assert len(set(steps)) > kills // 2
    run_command(*options, "--name=parts", "--ckpt_path=last")
    assert_same_run(whole, parts)


def wait_for_a_step(process: BaseProcess, run: Path) -> None:
    """Wait until a run that has been started has written a checkpoint."""
    last, began = run / "checkpoints/last.ckpt", time.time()
    while process.is_alive() and not (last.exists() and last.stat().st_mtime > began):
        time.sleep(0.002)


CLASSIFY = """
model:
  encoder: vit_tiny_patch16_224
  img_size: 32
  encoder_kwargs: {patch_size: 8, embed_dim: 16, depth: 2, num_heads: 1}
  drop_path_rate: 0.1
  base_lr: 0.1
  mixup: 0.8
  cutmix: 1.0
  random_erasing: 0.25
  ema_decay: 0.9
data: {randaugment: rand-m9-mstd0.5-inc1}
"""


@pytest.mark.exhaustive
def test_a_classifier_that_is_killed_ends_as_if_it_was_not(place: Path) -> None:
    """With all that is random about fine-tuning, and an average of the weights."""
    config, mine = yaml.safe_load(Path("tiny.yaml").read_text()), yaml.safe_load(CLASSIFY)
    config = {**mine, "data": config["data"] | mine["data"], "trainer": config["trainer"]}
    Path("classify.yaml").write_text(yaml.safe_dump(config))
    options = ["classify", "fit", "-c", "classify.yaml", "--checkpoint.every_n_minutes=0"]
    run_command(*options, "--name=whole")
    whole, parts = Path("runs/whole/version_0"), Path("runs/parts/version_0")
    for i in range(4):
        go_on = ["--ckpt_path=last"] if i else []
        process = start_command(*options, "--name=parts", *go_on)
        wait_for_a_step(process, parts)
        time.sleep(0.2)
        assert kill(process) == -signal.SIGKILL
    assert 4 < state(parts)["global_step"] < state(whole)["global_step"]
    run_command(*options, "--name=parts", "--ckpt_path=last")
    for name in ("classes.csv", "val_predictions.csv"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
        (parts / name).unlink()
    assert_same_run(whole, parts)


# Runs that are asked to stop ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, exhaustive(2)])
def test_sigterm_ends_a_run_between_two_steps(place: Path, workers: int) -> None:
    """A scheduler sends it to all of a run's processes, its workers too."""
    options = [*LONGER, "--trainer.accumulate_grad_batches=2", f"--data.num_workers={workers}"]
    run_command(*options, "--name=whole")
    whole, parts = Path("runs/whole/version_0"), Path("runs/parts/version_0")
    process = start_command(*options, "--name=parts")
    wait_for_a_step(process, parts)
    assert kill(process, signal.SIGTERM) == 143
    assert 6 <= state(parts)["global_step"] < state(whole)["global_step"]
    assert "go on with: simmim pretrain fit --name parts --ckpt_path last" in said()
    run_command(*options, "--name=parts", "--ckpt_path=last")
    assert_same_run(whole, parts)


@pytest.mark.exhaustive
def test_slurm_starts_a_job_again_and_it_goes_on(place: Path) -> None:
    (place / "bin").mkdir()
    scontrol = place / "bin" / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {place}/asked.txt\n")
    scontrol.chmod(0o755)
    job = {
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "1",
        **dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_ID"), "0"),
    }
    run_command(*LONGER, "--name=whole")
    whole, parts = Path("runs/whole/version_0"), Path("runs/parts/version_0")
    command = [*LONGER, "--name=parts"]  # the job's script is always the same
    process = start_command(*command, **job)
    wait_for_a_step(process, parts)
    assert kill(process, signal.SIGUSR1) == 143  # as `--signal=SIGUSR1@90` does before the end
    assert (place / "asked.txt").read_text() == "requeue 4711\n"
    process = start_command(*command, **job, SLURM_RESTART_COUNT="1")
    wait_for_a_step(process, parts)
    assert kill(process, signal.SIGKILL) == -signal.SIGKILL  # as when a machine fails
    process = start_command(*command, **job, SLURM_RESTART_COUNT="2")
    end(process)
    (parts / ".slurm_job").unlink()
    assert_same_run(whole, parts)


# A disk that is full -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of its own, of two megabytes."""
    (place / "runs" / "parts").mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", "runs/parts"]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield place / "runs" / "parts"
    subprocess.run(["umount", str(place / "runs" / "parts")], check=True)


@pytest.mark.exhaustive
def test_a_full_disk_ends_a_run_in_a_sentence_and_it_goes_on_later(small_disk: Path) -> None:
    options = [*OFTEN, "--trainer.max_epochs=10"]
    run_command(*options, "--name=whole")
    whole, parts = Path("runs/whole/version_0"), Path("runs/parts/version_0")
    process = start_command(*options, "--name=parts")
    wait_for_a_step(process, parts)
    with (small_disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(4096))
    process.join(60)
    assert process.exitcode == 1
    assert said().splitlines()[-1].startswith("simmim: the disk is full: ")
    assert "Traceback" not in said()
    assert 0 < state(parts)["global_step"] < state(whole)["global_step"]  # the last good one
    assert not list(parts.rglob("*.unfinished"))
    (small_disk / "filler").unlink()
    run_command(*options, "--name=parts", "--ckpt_path=last")
    assert_same_run(whole, parts)


# Several processes -------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--trainer.accumulate_grad_batches=2", "--data.num_workers=1"],
        ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=4"],  # among three
    ],
)
def test_two_processes_that_are_killed_end_as_if_they_were_not(
    place: Path, options: list[str]
) -> None:
    """Lightning starts the second one, by the command line of the first."""
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=2", *options]
    whole, parts = Path("runs/whole/version_0"), Path("runs/parts/version_0")

    def begin(*options: str) -> BaseProcess:
        return start(program, sys.executable, "-m", "simmim", *OFTEN, *two, *options)

    end(begin("--name=whole"))
    for number, go_on in ((signal.SIGKILL, []), (signal.SIGTERM, ["--ckpt_path=last"])):
        process = begin("--name=parts", *go_on)
        wait_for_a_step(process, parts)
        assert kill(process, number) == (143 if number == signal.SIGTERM else -number)
        assert state(parts)["global_step"] < state(whole)["global_step"]
    end(begin("--name=parts", "--ckpt_path=last"))
    assert_same_run(whole, parts)
