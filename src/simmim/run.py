"""Where a run lives, `runs/<name>/version_<n>`, how it is written there, and how it goes on."""

import errno
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from simmim.configuration import read_config
from simmim.mistakes import FULL

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
UNFINISHED = ".unfinished"  # what a checkpoint's file ends with while it is being written
FOLDER_VARIABLE = "SIMMIM_RUN_FOLDER"  # tells the processes that we start where we write


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


def leave_run(folder: Path | None, failed: bool) -> None:
    """Forget a run that has ended; one that failed before it began leaves no folder."""
    if folder is None or not is_first_process():
        return
    os.environ.pop(FOLDER_VARIABLE, None)
    if failed and {path.name for path in folder.iterdir()} <= {"wandb"}:
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


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in, if it does."""
    folder = checkpoint.absolute().parent.parent
    inside = checkpoint.absolute().parent.name == CHECKPOINTS and (folder / CONFIG).is_file()
    return checkpoint.parent.parent if inside else None


def newest_run(run_dir: Path, name: str) -> Path:
    """The newest run of a name that has a checkpoint.

    Raises:
        ValueError: If there is none; the names that there are are listed.
    """
    numbers = sorted(_versions(run_dir / name), reverse=True)
    for number in numbers:
        folder = run_dir / name / f"version_{number}"
        if (folder / CHECKPOINTS / LAST).exists():
            if number != numbers[0]:
                rank_zero_info(f"{run_dir / name}/version_{numbers[0]} has no checkpoint: {folder}")
            return folder
    others = sorted({path.parents[2].name for path in run_dir.glob(f"*/*/{CHECKPOINTS}/{LAST}")})
    remedy = f"--name {' or --name '.join(others)}" if others else "leave --ckpt_path out to begin"
    raise ValueError(f"no run {run_dir / name}/version_* with a checkpoint to go on from: {remedy}")


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
        """Whether a fit goes on in the run's own folder: from its last state, no earlier one."""
        return self.run is not None and self.checkpoint.name == LAST


def find_start(ckpt_path: str, run_dir: Path, name: str) -> Start:
    """Find and read what `--ckpt_path` means.

    Args:
        ckpt_path: "last", a checkpoint, or a run's folder.
        run_dir: The folder of all runs.
        name: The run's name, which says what "last" is.

    Raises:
        ValueError: If there is no such checkpoint, or it is none of ours.
    """
    from simmim.weights import find_checkpoint

    given = str(newest_run(run_dir, name)) if ckpt_path == "last" else ckpt_path
    # A sharded checkpoint is a folder that keeps what is no tensor in meta.pt.
    path = Path(given) if Path(given, "meta.pt").is_file() else find_checkpoint(given)
    file = path / "meta.pt" if path.is_dir() else path
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=path.is_file())
        model = dict(content["hyper_parameters"])
    except Exception as error:  # whatever torch makes of bytes that are something else
        raise ValueError(f"{path} is no checkpoint of a run of simmim, or a damaged one") from error
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


# Checkpoints -------------------------------------------------------------------------------------


def checkpoint_callbacks(folder: Path, monitor: str, mode: str) -> list[ModelCheckpoint]:
    """Keep the last state of each epoch, and the best.

    Args:
        folder: Of the run.
        monitor: The metric that tells the best.
        mode: Whether its least is best, or its greatest: min or max.
    """
    place: dict[str, Any] = {"dirpath": folder / CHECKPOINTS, "enable_version_counter": False}
    last = ModelCheckpoint(filename=Path(LAST).stem, save_on_train_epoch_end=True, **place)
    best = ModelCheckpoint(
        filename="best", monitor=monitor, mode=mode, save_on_train_epoch_end=False, **place
    )
    return [best, last]


class KeepConfig(Callback):
    """Write the resolved config into the run's folder and to every logger, when the run begins."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.config = folder, config

    @rank_zero_only
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it once the data are known to be there."""
        beside = self.folder / f".{CONFIG}"
        beside.write_text(yaml.safe_dump(self.config, sort_keys=False), encoding="utf-8")
        beside.replace(self.folder / CONFIG)
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config)


class LogEachEpoch(Callback):
    """Log at least once an epoch, where that has fewer steps than lie between two logs."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower the interval."""
        steps = int(trainer.num_training_batches) // trainer.accumulate_grad_batches
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        trainer.log_every_n_steps = min(interval, max(1, steps))  # type: ignore[attr-defined]


class SaveWhenTerminated(Callback):
    """Save where the run stands when SIGTERM ends it, as a scheduler does with a job.

    Lightning raises it between two batches, on all processes at once.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / CHECKPOINTS / LAST

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Overwrite the last checkpoint, if training was under way."""
        if isinstance(exception, SIGTERMException) and trainer.training:
            trainer.save_checkpoint(self.path, weights_only=False)


class DurableCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, and put it there when it is safely on the disk.

    Whatever happens meanwhile (kill -9, a full disk, a power cut), the file under the final name
    is whole: the earlier one or the new one.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Save a checkpoint.

        Raises:
            OSError: If the disk is full; nothing is left behind then.
        """
        if "://" in str(path):  # a remote store has no rename
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
        try:
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException as error:
            beside.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in FULL:
                raise OSError(error.errno, "no room for a checkpoint", str(path)) from error
            raise
        _sync_folder(path.parent)


def clean_up(folder: Path) -> None:
    """Remove what a process that was killed left unfinished."""
    for path in (folder / CHECKPOINTS).glob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut (Windows cannot open folders, and need not)."""
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
                raise
        finally:
            os.close(descriptor)
