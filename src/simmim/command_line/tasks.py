"""The tasks: which model, which data and which callbacks a command trains with."""

import logging
import os
import re
import sys
import warnings
from dataclasses import replace
from importlib import import_module
from inspect import signature

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from simmim.base.errors import explain, one_line
from simmim.base.files import read_config
from simmim.command_line.configuration import Request, default_experiment, read_request
from simmim.command_line.lightning import TaskCLI
from simmim.command_line.task import Begun, Link, Task
from simmim.command_line.trust import admit, needs_trust, with_own_data
from simmim.runs.checkpoints import CHECKPOINTS, LAST, signals_put_back
from simmim.runs.folder import (
    CONFIG,
    Start,
    find_start,
    hold_run,
    is_first_process,
    is_launched,
    leave_run,
    let_go,
    locate,
    requeued_run,
    run_that_goes_on,
    slurm_job,
)
from simmim.runs.loggers import finish_board

TERMINATED = 128 + 15  # as a shell says of a process that SIGTERM has ended


def pretrain(args: list[str]) -> None:
    """`simmim pretrain {fit,validate,test,predict}`."""
    from simmim import callbacks
    from simmim.data import ImageFolderData
    from simmim.pretrain import SimMIM

    run_task(
        Task(
            name="pretrain",
            model=SimMIM,
            data=ImageFolderData,
            default=default_experiment("pretrain", args),
            callbacks=callbacks.PRETRAINING,
            writers=(callbacks.PredictionWriter,),
        ),
        args,
    )


def classify(args: list[str]) -> None:
    """`simmim classify {fit,validate,test,predict}`."""
    from simmim.callbacks import EVERY_RUN
    from simmim.callbacks.classification import ConfusionMatrix, PredictionTable
    from simmim.callbacks.predictions import BoardPredictions
    from simmim.classify import Classifier
    from simmim.data.classification import ClassificationData

    run_task(
        Task(
            name="classify",
            model=Classifier,
            data=ClassificationData,
            default=default_experiment("classify", args),
            callbacks={
                "confusion": ConfusionMatrix,
                "board_predictions": BoardPredictions,
                **EVERY_RUN,
            },
            writers=(PredictionTable,),
            links={
                **_as_the_weights(),
                "data.multi_label": Link("model.multi_label"),
            },
            monitor=lambda model: "val/mean_ap" if model.multi_label else "val/top1",
        ),
        args,
    )


def segment(args: list[str]) -> None:
    """`simmim segment {fit,validate,test,predict}`."""
    from simmim.callbacks import EVERY_RUN
    from simmim.callbacks.segmentation import MaskWriter, Segmentations
    from simmim.data import SegmentationData
    from simmim.segment import Segmenter

    run_task(
        Task(
            name="segment",
            model=Segmenter,
            data=SegmentationData,
            default=default_experiment("segment", args),
            callbacks={
                "segmentations": Segmentations,
                **EVERY_RUN,
            },
            writers=(MaskWriter,),
            links=_as_the_weights(),
        ),
        args,
    )


def detect(args: list[str]) -> None:
    """`simmim detect {fit,validate,test,predict}`."""
    from simmim.callbacks import EVERY_RUN
    from simmim.callbacks.detections import Detections, DetectionWriter
    from simmim.data import DetectionData
    from simmim.detect import Detector

    run_task(
        Task(
            name="detect",
            model=Detector,
            data=DetectionData,
            default=default_experiment("detect", args),
            callbacks={
                "detections": Detections,
                "predictions": DetectionWriter,
                **EVERY_RUN,
            },
            links={
                **_as_the_weights(),
                "data.masks": Link("model.masks"),
            },
            monitor="val/map",
        ),
        args,
    )


def _as_the_weights() -> dict[str, Link]:
    """Size and channels of the images, where a task begins with weights: theirs by default."""
    from simmim.weights.backbone import channels, image_size

    weights = ("model.weights", "model.encoder", "model.encoder_kwargs")
    return {
        "data.img_size": Link(("model.img_size", *weights), image_size),
        "data.in_chans": Link(("model.in_chans", *weights), channels),
    }


def run_task(task: Task, args: list[str]) -> None:
    """Run a task's subcommand.

    Args:
        task: What is trained.
        args: The subcommand and its options. They are passed on as they are: the processes that
            Lightning starts run the whole command again.

    Raises:
        ArgumentError: If an option is wrong.
        KeyboardInterrupt: On Ctrl+C; it says how to go on.
        SystemExit: With status 143, on SIGTERM.
    """
    _quieten_lightning()
    follows = {
        target: link.source if isinstance(link.source, str) else link.source[0]
        for target, link in task.all_links().items()
    }
    request = read_request(task.name, task.default, args, follows)
    job = slurm_job([task.name, *args]) if request.subcommand == "fit" else None
    if run_before := requeued_run(request.run_dir, job):
        rank_zero_info(f"SLURM has started this job again: it goes on with {run_before}")
        request = replace(request, ckpt_path=str(run_before))
    run = Begun(job)
    try:
        start = _find_start(task, request, run) if request.ckpt_path else None
        if start is not None and start.run is not None and (start.goes_on or not request.named):
            # What scores or shows a run writes into it, if it may: then no other run_dir is asked.
            run_dir = start.run.parent.parent if request.subcommand == "fit" else request.run_dir
            request = replace(request, name=start.run.parent.name, run_dir=run_dir)
        request = admit(request, start)
        task, request = with_own_data(task, request)
        with signals_put_back():
            TaskCLI(task, request, start, run)
        run.failed = False
    except SIGTERMException:
        rank_zero_info(f"terminated; {_how_to_go_on(request, run)}")
        raise SystemExit(0 if is_launched() else TERMINATED) from None
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt(_how_to_go_on(request, run)) from None
    finally:
        finish_board(run.loggers, run.failed)
        if request.subcommand == "fit":
            _report(run, _why_it_ended(sys.exception()))
        let_go(run.lock)
        leave_run(run.folder, run.failed)


def _find_start(task: Task, request: Request, run: Begun) -> Start:
    """Find what `--ckpt_path` means; where a fit goes on with a run, nobody else may until then."""
    fits = request.subcommand == "fit"
    checkpoint = locate(str(request.ckpt_path), request.run_dir, request.name)
    if fits and (folder := run_that_goes_on(checkpoint)):
        run.lock = hold_run(folder)
    start = find_start(str(checkpoint), request.run_dir, request.name)
    _check_task(task, start)
    if fits and not start.has_optimizer:
        raise ValueError(
            f"{start.checkpoint} holds weights, but no optimiser to go on with: "
            f"begin a run with --model.weights {start.checkpoint}"
        )
    return start


def _why_it_ended(error: BaseException | None) -> str:
    """A sentence on what has ended a run before its time, or nothing."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return ""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "Interrupted before its end."
    return f"Failed: {explain(error) or one_line(f'{type(error).__name__}: {error}')}."


def _report(run: Begun, ended: str) -> None:
    """Write the report of a run that has begun, however it ended; it is never why one fails."""
    if run.folder is None or not (run.folder / CONFIG).exists() or not is_first_process():
        return
    try:
        report_run = import_module("simmim.commands.report").report_run
        rank_zero_info(f"report: {report_run(run.folder, ended)}")
    except Exception as error:
        rank_zero_warn(f"no report of {run.folder} could be written: {one_line(str(error))}")


def _check_task(task: Task, start: Start) -> None:
    """Refuse another task's checkpoint: its options are not this one's."""
    foreign = set(start.model) - {"optimizer"} - set(signature(task.model).parameters)
    if foreign:
        raise ValueError(
            f"{start.checkpoint} is no checkpoint of simmim {task.name}, but another task's (of "
            f"its options {task.name} has no {min(foreign)}): give it as --model.weights"
        )


def _how_to_go_on(request: Request, run: Begun) -> str:
    if request.subcommand != "fit" or run.folder is None:
        return ""
    if not (run.folder / CHECKPOINTS / LAST).exists():
        return f"{run.folder} has no checkpoint yet to go on from"
    where = f" --run_dir {request.run_dir}" if str(request.run_dir) != "runs" else ""
    trust = " --trust" if needs_trust(read_config(run.folder / CONFIG)) else ""
    command = f"simmim {request.command} fit --name {request.name}{where} --ckpt_path last{trust}"
    return f"go on with: {command}"


def _quieten_lightning() -> None:
    """Leave out its tips for other products, and warnings of what is meant."""
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")  # its own
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", "The dirpath has changed")  # another run's checkpoint
    warnings.filterwarnings("ignore", "The number of training batches")  # LogEachEpoch
    # LightningCLI 2.6 calls what jsonargparse 4.53 has renamed.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not any(f is _no_tip for f in logger.filters):
        logger.addFilter(_no_tip)
    logging.getLogger("lightning.pytorch.callbacks.model_summary").addFilter(_no_flops)


def _no_tip(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return "Tip:" not in said and "Skipping setting a default `ModelSummary`" not in said


def _no_flops(record: logging.LogRecord) -> bool:
    """Cut FLOPs out of Lightning's table of the model: it counts 0 for want of an example."""
    lines = [line for line in record.getMessage().split("\n") if "Total Flops" not in line]
    record.msg = "\n".join(re.sub(r" +\| (FLOPs|0 +)$", "", line) for line in lines)
    record.args = ()
    return True
