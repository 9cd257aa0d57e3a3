"""Where a run lives, `runs/<name>/version_<n>`, what is kept there, and how it goes on."""

import os
import re
import shlex
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryFile
from typing import Any
from zipfile import is_zipfile

import torch
import yaml
from filelock import BaseFileLock, FileLock, Timeout
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from simmim.base.files import UNFINISHED, read_config, write_whole
from simmim.runs.checkpoints import BEFORE, CHECKPOINTS, LAST, remove, there_is

CONFIG = "config.yaml"
SLURM_JOB = ".slurm_job"  # the job that works on a run
FOLDER_VARIABLE = "SIMMIM_RUN_FOLDER"  # tells the processes that we start where we write
LOCK = ".lock"  # of the process that trains there
LOCK_SECONDS = 10.0  # workers of a run that was killed hold its lock until they notice


# The folder --------------------------------------------------------------------------------------


def new_run(run_dir: Path, name: str) -> Path:
    """Make the folder of a new run: the first process makes it, the others are told.

    Args:
        run_dir: The folder of all runs.
        name: The run's name.

    Returns:
        `run_dir/name/version_<n>`, with a number that no earlier run has. In a process that was
        not started by the first one (torchrun, SLURM) only `run_dir/name`: there the trainer's
        `log_dir` asks the first process.
    """
    if not is_first_process():
        return Path(os.environ.get(FOLDER_VARIABLE, run_dir / name))
    (run_dir / name).mkdir(parents=True, exist_ok=True)
    number = max(_versions(run_dir / name), default=-1) + 1
    while True:
        folder = run_dir / name / f"version_{number}"
        with suppress(FileExistsError):  # another process was quicker
            folder.mkdir()
            break
        number += 1
    os.environ[FOLDER_VARIABLE] = str(folder)
    return folder


def can_be_written(folder: Path) -> bool:
    """Whether files can be made in a folder; rights do not tell of mounts and network disks."""
    try:
        with TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def hold_run(folder: Path) -> BaseFileLock | None:
    """Keep a second process from training into a run's folder: each would undo what the other did.

    Args:
        folder: The run's.

    Returns:
        The lock, which a process lets go of when it ends or is killed. None where this is not the
        run's first process, or the file system knows no locks.

    Raises:
        ValueError: If another process trains there, or nothing may be written.
    """
    if not is_first_process():
        return None
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise ValueError(
            f"another process trains in {folder}: wait for it or stop it, or begin a run of its "
            "own with --model.weights"
        ) from None
    except NotImplementedError:
        return None
    except OSError as error:
        if can_be_written(folder):
            raise
        raise ValueError(
            f"{folder} cannot be written, and a run goes on in its own folder: copy it, or begin a "
            f"run with its weights: --model.weights {folder}"
        ) from error
    return lock


def let_go(lock: BaseFileLock | None) -> None:
    """Give up what `hold_run` took."""
    if lock is not None:
        path = Path(lock.lock_file)
        try:
            path.unlink()
        except OSError:  # Windows keeps what is open
            lock.release()
            with suppress(OSError):
                path.unlink()
        else:  # what has this name from here on is another process's
            lock.release()


def leave_run(folder: Path | None, failed: bool) -> None:
    """Forget a run that has ended; one that failed before it began leaves no folder."""
    if folder is None or not is_first_process():
        return
    os.environ.pop(FOLDER_VARIABLE, None)
    if failed and folder.is_dir() and {path.name for path in folder.iterdir()} <= {"wandb"}:
        shutil.rmtree(folder)
        with suppress(OSError):  # other runs
            folder.parent.rmdir()
            folder.parent.parent.rmdir()


def is_first_process() -> bool:
    """Whether this is the only process of the run, or its rank 0, before Lightning has begun."""
    env = os.environ
    if "RANK" in env:  # torchrun
        return env["RANK"] == "0"
    if "LOCAL_RANK" in env or "NODE_RANK" in env:  # Lightning's own
        return env.get("LOCAL_RANK", "0") == env.get("NODE_RANK", "0") == "0"
    return all(env.get(key, "0") == "0" for key in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK"))


def is_launched() -> bool:
    """Whether Lightning started this process; it kills the run when one of those fails."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "RANK" not in os.environ


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in, if it does; with its name and number."""
    folder = checkpoint.absolute().parent.parent
    if checkpoint.absolute().parent.name != CHECKPOINTS or not (folder / CONFIG).is_file():
        return None
    short = checkpoint.parent.parent  # "." and "version_0" do not say the name
    return short if len(short.parts) > 1 and ".." not in short.parts else folder.resolve()


def run_that_goes_on(checkpoint: Path) -> Path | None:
    """The run in whose folder a fit goes on: from its last state, and from no earlier one."""
    return run_of(checkpoint) if checkpoint.name == LAST else None


def newest_run(run_dir: Path, name: str) -> Path:
    """The newest run of a name that has a checkpoint.

    Raises:
        ValueError: If there is none; the names that there are are listed.
    """
    numbers = sorted(_versions(run_dir / name), reverse=True)
    for number in numbers:
        folder = run_dir / name / f"version_{number}"
        if there_is(folder / CHECKPOINTS / LAST):
            if number != numbers[0]:
                rank_zero_info(f"{run_dir / name}/version_{numbers[0]} has no checkpoint: {folder}")
            return folder
    others = sorted({path.parents[2].name for path in run_dir.glob(f"*/*/{CHECKPOINTS}/{LAST}")})
    remedy = f"--name {' or --name '.join(others)}" if others else "leave --ckpt_path out to begin"
    raise ValueError(f"no run {run_dir / name}/version_* with a checkpoint to go on from: {remedy}")


def slurm_job(args: list[str]) -> str | None:
    """Tell this command, of a SLURM job, from all others: it is the same when the job starts again.

    Args:
        args: Of the command.
    """
    job = os.environ.get("SLURM_JOB_ID")
    return f"{job}.{os.environ.get('SLURM_STEP_ID', '')} {shlex.join(args)}" if job else None


def requeued_run(run_dir: Path, job: str | None) -> Path | None:
    """The run, with a checkpoint, that this command began before SLURM started its job again."""
    if job is None or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    marks = [
        mark for mark in run_dir.glob(f"*/version_*/{SLURM_JOB}") if mark.read_text("utf-8") == job
    ]
    runs = [mark for mark in marks if there_is(mark.parent / CHECKPOINTS / LAST)]
    return max(runs, key=lambda mark: mark.stat().st_mtime).parent if runs else None


def clean_up(folder: Path) -> None:
    """Remove what a process that was killed left unfinished."""
    for place in (folder, folder / CHECKPOINTS):
        for path in place.glob(f".*{BEFORE}"):
            there_is(path.with_name(path.name[1:].removesuffix(BEFORE)))
        for path in (*place.glob(f".*{UNFINISHED}"), *place.glob(f".*{BEFORE}")):
            remove(path)


def _versions(folder: Path) -> list[int]:
    found = (re.fullmatch(r"version_(\d+)", path.name) for path in folder.glob("version_*"))
    return [int(match[1]) for match in found if match]


# Going on ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """A checkpoint that a command begins with.

    Attributes:
        checkpoint: Its path.
        run: The folder of its run, where it lies in one.
        model: The options that its model was made with.
        step: Optimiser steps that it has behind it.
        has_optimizer: Whether training can go on from it.
    """

    checkpoint: Path
    run: Path | None
    model: Mapping[str, Any]
    step: int
    has_optimizer: bool

    @property
    def goes_on(self) -> bool:
        """Whether a fit goes on in the run's own folder."""
        return run_that_goes_on(self.checkpoint) is not None


def locate(ckpt_path: str, run_dir: Path, name: str) -> Path:
    """Find what `--ckpt_path` means, without reading it.

    Args:
        ckpt_path: "last", a checkpoint, or a run's folder.
        run_dir: The folder of all runs.
        name: The run's name, which says what "last" is.

    Raises:
        ValueError: If there is no such checkpoint.
    """
    from simmim.weights import find_checkpoint

    return find_checkpoint(newest_run(run_dir, name) if ckpt_path == "last" else ckpt_path)


def find_start(ckpt_path: str, run_dir: Path, name: str) -> Start:
    """Find and read what `--ckpt_path` means; arguments as in `locate`.

    Raises:
        ValueError: If there is no such checkpoint, or it is none of ours.
    """
    from simmim.weights.shards import META, safe_metadata

    path = locate(ckpt_path, run_dir, name)
    if path.is_dir():  # of shards
        safe_metadata(path)
    file = path / META if path.is_dir() else path
    content = _read(file)
    model = dict(content["hyper_parameters"])
    model.pop("_instantiator", None)
    run = run_of(path)
    if run is not None:  # the hyperparameters leave out the optimiser, which is no plain value
        model |= {k: v for k, v in read_config(run / CONFIG)["model"].items() if k == "optimizer"}
    return Start(
        checkpoint=path,
        run=run,
        model=model,
        step=int(content.get("global_step", 0)),
        has_optimizer=path.is_dir() or "optimizer_states" in content,
    )


def _read(file: Path) -> Mapping[str, Any]:
    """Read a checkpoint of ours without running code in it, or say what the file is instead."""
    from simmim.weights.files import check_archive

    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=file.suffix != ".pt")
    except Exception as error:  # whatever torch makes of bytes that are something else
        wrong = _what_is_wrong(file, error)
        raise ValueError(f"{file} is no checkpoint of simmim: {wrong}") from error
    if not isinstance(content, Mapping) or "pytorch-lightning_version" not in content:
        raise ValueError(
            f"{file} is no checkpoint of simmim: Lightning did not write it; begin a run with its "
            f"weights: --model.weights {file}"
        )
    hparams = content.get("hyper_parameters")
    if not isinstance(hparams, Mapping) or "encoder" not in hparams:
        raise ValueError(f"{file} is no checkpoint of simmim, but of another Lightning project")
    state = content.get("state_dict", {})  # none in the meta.pt of a sharded checkpoint
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{file} is damaged: its state_dict is no table of tensors")
    check_archive(file)
    return content


def _what_is_wrong(file: Path, error: Exception) -> str:
    size = file.stat().st_size
    with file.open("rb") as stream:
        is_archive = stream.read(4) == b"PK\3\4"  # the zip that torch writes
    if not size:
        return "it is empty"
    if is_archive and not is_zipfile(file):
        return f"it is cut off, after {size:,} bytes: copy it again, or use an earlier one"
    if isinstance(error, UnpicklingError) and is_archive:
        return "it holds objects that could run code, and is not opened"
    return "it is damaged" if is_archive else "it is a file of another kind, or damaged"


# What is kept, and logged -------------------------------------------------------------------------


class KeepConfig(Callback):
    """Write the resolved config into the run's folder and to every logger, when the run begins."""

    def __init__(self, folder: Path, config: dict[str, Any], job: str | None = None) -> None:
        self.folder, self.config, self.job = folder, config, job

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it once data and model are known to do: a run that fails before leaves nothing."""
        write_whole(self.folder / CONFIG, yaml.safe_dump(self.config, sort_keys=False))
        if self.job:
            (self.folder / SLURM_JOB).write_text(self.job, encoding="utf-8")
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config)


class LogEachEpoch(Callback):
    """Log at least once an epoch, where that has fewer steps than lie between two logs."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower the interval."""
        steps = int(trainer.num_training_batches) // trainer.accumulate_grad_batches
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        trainer.log_every_n_steps = min(interval, max(1, steps))  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Number the rows by optimiser steps: Lightning's own count can be off after a resume."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
