"""A run that was killed, at any moment and as often as you like, ends as if it had not been."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from simmim.runs.checkpoints import there_is
from support import exhaustive
from support.commands import EXACT, QUIET, SMALL, state, table, words_of, write_tiny
from support.folders import make_classes
from support.processes import end, kill, program, run_command, said, start, start_command

# What is about the time and the machine, and not about the run.
CLOCK = {"throughput/images_per_s", "throughput/data_wait", "memory/max_gib"}
WHOLE, PARTS = (Path(f"runs/{name}/version_0") for name in ("whole", "parts"))

FIT = ["pretrain", "fit", "-c", "tiny.yaml"]
OFTEN = [*FIT, "--checkpoint.every_n_minutes=0"]  # a checkpoint at each step
LONGER = "--trainer.max_epochs=10"
OTHER_DISK = "/dev/shm" if os.path.isdir("/dev/shm") else "/tmp"  # another file system on Linux

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks on Windows")


@pytest.fixture
def place(workdir: Path) -> Path:
    """A working folder with images/ of two classes (48 to train on) and tiny.yaml."""
    make_classes(Path("images"), 30)
    write_tiny(workdir, **EXACT)
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
    else:
        assert (a.replace("/whole/", "/parts/") if isinstance(a, str) else a) == b, where


def rows(run: Path) -> list[dict[str, str]]:
    found = table(run / "metrics.csv")
    return [{k: v for k, v in sorted(row.items()) if k not in CLOCK} for row in found]


def files(run: Path, *suffixes: str) -> dict[str, bytes]:
    found = (path for path in run.rglob("*") if path.suffix in suffixes)
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in found}


def assert_same_run(*tables: str) -> None:
    """Weights, optimiser, schedule, counters, callbacks, best checkpoint, rows and pictures."""
    assert rows(WHOLE) == rows(PARTS)
    assert_equal(state(WHOLE), state(PARTS))
    assert_equal(*(state(run, "best")["state_dict"] for run in (WHOLE, PARTS)))
    assert files(WHOLE, ".png") == files(PARTS, ".png")
    for name in tables:
        assert (WHOLE / name).read_bytes() == (PARTS / name).read_bytes()
    left = {path.name for path in PARTS.iterdir() if path.is_file() and path.suffix != ".png"}
    assert left == {"config.yaml", "metrics.csv", "report.html", *tables}
    kept = {path.name for path in (PARTS / "checkpoints").iterdir()}
    assert kept == {"last.ckpt", "best.ckpt"}
    assert [path.name for path in PARTS.parent.iterdir()] == [PARTS.name]


def wait_for_a_step(process: BaseProcess) -> None:
    """Wait until a run that has been started has written a checkpoint."""
    last, began = PARTS / "checkpoints/last.ckpt", time.time()
    while process.is_alive() and not (last.exists() and last.stat().st_mtime > began):
        time.sleep(0.002)


def kill_and_go_on(
    begin: Callable[..., BaseProcess], kills: int, *tables: str, sleep: bool = True
) -> None:
    """Train whole, and in parts that are killed, then asked to stop, then go on to the end.

    A quarter of the kills wait for a checkpoint that is being written.
    """
    end(begin("--name=whole"))
    began, ended = (WHOLE / name for name in ("config.yaml", "checkpoints/last.ckpt"))
    seconds = ended.stat().st_mtime - began.stat().st_mtime
    draw, steps = random.Random(0), [0]
    for i in range(kills + 1):
        process = begin("--name=parts", *(["--ckpt_path=last"] if i else []))
        wait_for_a_step(process)
        if i % 4 == 3:
            while process.is_alive() and not list(PARTS.glob("checkpoints/.*.unfinished")):
                pass
        elif sleep and i < kills:
            time.sleep(draw.uniform(0, seconds / kills / 3))  # the machine may be quicker by now
        number = signal.SIGKILL if i < kills else signal.SIGTERM
        assert kill(process, number) == (-signal.SIGKILL if i < kills else 143), said()[-3000:]
        assert there_is(PARTS / "checkpoints/last.ckpt")
        steps.append(state(PARTS)["global_step"])  # it is whole, whenever it was killed
    assert steps == sorted(steps)
    assert steps[-1] < state(WHOLE)["global_step"]  # each kill met a run
    assert len(set(steps)) > kills // 2
    end(begin("--name=parts", "--ckpt_path=last"))
    assert_same_run(*tables)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "options"),
    [
        exhaustive(8, ["--data.num_workers=2", "--trainer.val_check_interval=3", LONGER]),
        (3, ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=5"]),
    ],
)
def test_a_run_that_is_killed_at_random_ends_as_if_it_was_not(
    place: Path, kills: int, options: list[str]
) -> None:
    """A scheduler's SIGTERM goes to all of a run's processes, its workers too."""

    def begin(*words: str) -> BaseProcess:
        return start_command(*OFTEN, *options, *words, TMPDIR=OTHER_DISK)

    kill_and_go_on(begin, kills)
    assert "go on with: simmim pretrain fit --name parts --ckpt_path last" in said()


CLASSIFY = """
classify fit --data.root=images --data.batch_size=4 --data.val_fraction=0.2 --model.mixup=0.8
--data.randaugment=rand-m9-mstd0.5-inc1 --model.cutmix=1.0 --model.random_erasing=0.25
--model.ema_decay=0.9 --model.drop_path_rate=0.1 --model.base_lr=0.1 --model.warmup_epochs=1
--trainer.max_epochs=8 --trainer.log_every_n_steps=1 --checkpoint.every_n_minutes=0
"""


@pytest.mark.exhaustive
def test_a_classifier_that_is_killed_ends_as_if_it_was_not(place: Path) -> None:
    """With all that is random about fine-tuning, and an average of the weights."""

    def begin(*words: str) -> BaseProcess:
        return start_command(*words_of(CLASSIFY, *SMALL, *QUIET, *words))

    kill_and_go_on(begin, 3, "classes.csv", "val_predictions.csv")


DDP = "--trainer.strategy=ddp --trainer.accumulate_grad_batches="
SHARDED = "{save_distributed_checkpoint: true}"
SHARDS = f"{{class_path: simmim.training.strategies.FullyShard, init_args: {SHARDED}}}"


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "options",
    [
        f"{DDP}2 --data.num_workers=1",
        f"{DDP}3 --trainer.val_check_interval=4",  # among three
        f"--trainer.strategy='{SHARDS}'",
    ],
)
def test_two_processes_that_are_killed_end_as_if_they_were_not(place: Path, options: str) -> None:
    """Lightning starts the second one, by the command line of the first."""
    two = ["--trainer.devices=2", "--data.batch_size=2", *words_of(options)]

    def begin(*words: str) -> BaseProcess:
        return start(program, sys.executable, "-m", "simmim", *OFTEN, *two, *words)

    kill_and_go_on(begin, 2, sleep=False)
    if SHARDS in options:
        run_command("export", f"--weights={PARTS}", "--out=encoder")
        run_command("pretrain", "validate", f"--ckpt_path={PARTS}", "-c", "cpu")


@pytest.mark.exhaustive
def test_slurm_starts_a_job_again_and_it_goes_on(place: Path) -> None:
    (place / "bin").mkdir()
    scontrol = place / "bin" / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {place}/asked.txt\n")
    scontrol.chmod(0o755)
    job = {"PATH": f"{scontrol.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
    job |= {"SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1"}
    job |= {f"SLURM_{name}": "0" for name in ("PROCID", "LOCALID", "NODEID", "STEP_ID")}
    run_command(*FIT, LONGER, "--name=whole")
    command = [*FIT, LONGER, "--name=parts"]  # the job's script is always the same
    process = start_command(*command, **job)
    wait_for_a_step(process)
    assert kill(process, signal.SIGUSR1) == 143  # as `--signal=SIGUSR1@90` does before the end
    assert (place / "asked.txt").read_text() == "requeue 4711\n"
    process = start_command(*command, **job, SLURM_RESTART_COUNT="1")
    wait_for_a_step(process)
    assert kill(process, signal.SIGKILL) == -signal.SIGKILL  # as when a machine fails
    end(start_command(*command, **job, SLURM_RESTART_COUNT="2"))
    (PARTS / ".slurm_job").unlink()
    assert_same_run()


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of its own, of two megabytes."""
    (place / PARTS.parent).mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(PARTS.parent)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield place / PARTS.parent
    subprocess.run(["umount", str(place / PARTS.parent)], check=True)


@pytest.mark.exhaustive
def test_a_full_disk_ends_a_run_in_a_sentence_and_it_goes_on_later(small_disk: Path) -> None:
    run_command(*OFTEN, LONGER, "--name=whole")
    process = start_command(*OFTEN, LONGER, "--name=parts")
    wait_for_a_step(process)
    with (small_disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(4096))
    process.join(60)
    assert process.exitcode == 1
    assert said().splitlines()[-1].startswith("simmim: the disk is full: ")
    assert "Traceback" not in said()
    assert 0 < state(PARTS)["global_step"] < state(WHOLE)["global_step"]  # the last good one
    assert not list(PARTS.rglob("*.unfinished"))
    (small_disk / "filler").unlink()
    run_command(*OFTEN, LONGER, "--name=parts", "--ckpt_path=last")
    assert_same_run()
