"""A task on the command line: its options, its defaults, the run's folder, and going on."""

import json
import os
from argparse import ArgumentError
from collections.abc import Mapping
from inspect import signature
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from simmim.base.errors import word_usage_error
from simmim.base.files import read_config
from simmim.command_line.configuration import Request, differences, packaged_configs, restrict
from simmim.command_line.help import asked
from simmim.command_line.help.options import page_of_options
from simmim.command_line.task import Begun, Task
from simmim.runs.checkpoints import CHECKPOINTS, DurableCheckpointIO, KeepLast, best_checkpoint
from simmim.runs.folder import (
    CONFIG,
    KeepConfig,
    LogEachEpoch,
    Start,
    can_be_written,
    clean_up,
    hold_run,
    is_first_process,
    new_run,
)
from simmim.runs.loggers import Board, board, lineage, run_loggers, tensorboard
from simmim.training.base import check_length
from simmim.training.strategies import refuse_fsdp
from simmim.training.xla import wake_xla

PRINT_SHORT = "--print_config=skip_default"
NOT_IN_A_CONFIG = ("trust", "ckpt_path", "weights_only", "verbose", "return_predictions")
IF_GIVEN = ("imports", "data_class")


class TaskCLI(LightningCLI):
    """LightningCLI with fixed classes, our defaults, and a run's folder.

    Args:
        task: What is trained.
        request: What the command line asks for.
        start: The checkpoint to begin with.
        run: Receives the run's folder and loggers.
    """

    def __init__(self, task: Task, request: Request, start: Start | None, run: Begun) -> None:
        self.task, self.request, self.start, self.run = task, request, start, run
        super().__init__(
            task.model,
            task.data,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={
                "prog": f"simmim {task.name}",
                "exit_on_error": False,
                "allow_abbrev": False,
                request.subcommand: {
                    "usage": f"simmim {task.name} {request.subcommand} [-c CONFIG ...] "
                    "[--OPTION VALUE ...]",
                    "description": "Options in full, with the sources of their defaults.",
                },
            },
            args=self._layers(start),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # our classes take plain values
        )

    # Options -------------------------------------------------------------------------------------

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Build the parser of one subcommand: four take four times as long."""
        return {self.request.subcommand: super().subcommands()[self.request.subcommand]}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs to the run as a whole."""
        super().add_default_arguments_to_parser(parser)
        parser.add_argument(
            "--name",
            type=str | None,
            help="Name of the run; that of its config by default.",
        )
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs",
            help="Folder of all runs: RUN_DIR/NAME/version_N.",
        )
        parser.add_argument(
            "--imports",
            type=str | list[str] | None,
            help="Modules of your own to import first, which register parts (simmim.register).",
        )
        parser.add_argument(
            "--data_class",
            type=str | None,
            help="Import path of a LightningDataModule of your own, whose options data.* are then.",
        )
        parser.add_argument(
            "--trust",
            action="store_true",
            help="Open a checkpoint that names parts by an import path, which runs their code. "
            "What you name yourself is imported without.",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Put what makes an experiment before Lightning's own options, in help and in configs."""
        parser.add_lightning_class_args(self.task.model, "model")
        parser.add_lightning_class_args(self.task.data, "data")
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.add_class_arguments(Board, "board")
        if hasattr(self.task.data, "batches_per_epoch"):  # our sampler deals out the ranks
            parser.set_defaults({"trainer.use_distributed_sampler": False})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our callbacks, and tie what must agree."""
        for name, callback in {**self.task.callbacks, "checkpoint": KeepLast}.items():
            parser.add_lightning_class_args(callback, name)
        for target, link in self.task.all_links().items():
            parser.link_arguments(link.source, target, compute_fn=link.compute)
        self.options = parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and let a checkpoint that is gone on with overrule the options it contradicts."""
        self._document()
        assert isinstance(args, list)
        if about := asked(args):
            print(page_of_options(self.options, about))
            raise SystemExit(0)
        if PRINT_SHORT in args:
            self._print_short([word for word in args if word != PRINT_SHORT])
        self.config = self._parse(args)
        if self.start is not None and self.request.subcommand == "fit":
            ignored = self._contradictions(self.start)
            if ignored:
                rank_zero_info(_ignored_line(ignored))
                self.config = self._parse(
                    [*args, f"--config={json.dumps(self._checkpoint_config(self.start))}"]
                )
            if changed := self._changes(self.start):
                rank_zero_info(f"goes on with other options than before: {_listed(changed, 'was')}")

    def _print_short(self, args: list[str]) -> NoReturn:
        """Print what the configs say, even if it is the default, and what else is not the default.

        jsonargparse leaves out what a recipe has in common with the defaults, such as its lr.
        """
        config = self._parse(args)[self.request.subcommand]
        whole, short = (
            yaml.safe_load(self.options.dump(config, skip_none=False, skip_default=skip)) or {}
            for skip in (False, True)
        )
        texts = [word.removeprefix("--config=") for word in args if word.startswith("--config=")]
        short = restrict(whole, short, *(yaml.safe_load(text) or {} for text in texts))
        print(yaml.safe_dump(short, sort_keys=False, default_flow_style=None), end="")
        raise SystemExit(0)

    def _layers(self, start: Start | None) -> list[str]:
        """The arguments of the parser: configs first, the user's options last."""
        if start is None:
            return self.request.arguments()
        base = start.run / CONFIG if start.run else None
        return self.request.arguments(base, self._checkpoint_config(start))

    def _checkpoint_config(self, start: Start) -> dict[str, Any]:
        """What a checkpoint says of its model, as a config."""
        known = signature(self.task.model).parameters
        model = {k: v for k, v in start.model.items() if k in known and k != "trust"}
        if "weights" in known:  # it holds them all: the file that they came from may be gone
            model["weights"] = None
        seed = {"seed_everything": model.pop("seed")} if "seed" in model else {}
        return {"model": model, **seed}

    def _parse(self, args: list[str]) -> Any:
        try:
            return self.parser.parse_args(args)
        except ArgumentError as error:
            names = [name for action in self.options._actions for name in action.option_strings]
            raise ArgumentError(None, word_usage_error(str(error), names)) from error

    def _parse_ckpt_path(self) -> None:
        """Leave out Lightning's merging, which is silent and does not know "last"."""

    def _document(self) -> None:
        """Say what our options mean where Lightning's text does not fit."""
        packaged = [
            k for k in packaged_configs() if k.startswith((f"{self.task.name}/", "overlay/"))
        ]
        texts = {
            "config": "Config files or names of packaged ones, laid over each other in the order "
            f"given: {', '.join(name.split('/')[-1] for name in packaged)}. Without an experiment "
            f"among them {self.task.default} comes first. A config can name classes to import: "
            "use only files that you trust.",
            "ckpt_path": "Checkpoint to begin with: a file, a run's folder, or `last`, the newest "
            "run of this name. fit goes on with that run, in its folder, with its config.",
            "seed_everything": "Seed of everything random: initial weights, order, crops, masks. "
            "true means 0, false seeds nothing but order, crops and masks (0).",
        }
        for action in self.options._actions:
            action.help = texts.get(action.dest, action.help)
        self.options._action_groups[-1].title = "Checkpoint"  # the method's arguments come last

    def _contradictions(self, start: Start) -> dict[str, tuple[Any, Any]]:
        """Options that differ from the checkpoint's: {name: (asked for, in the checkpoint)}."""
        asked = self.config[self.request.subcommand].model.as_dict()
        kept = {name: value for name, value in start.model.items() if name in asked}
        found = differences("model", {name: asked[name] for name in kept}, kept)
        if "model.seed" in found:
            found["seed_everything"] = found.pop("model.seed")
        return found

    def _changes(self, start: Start) -> dict[str, tuple[Any, Any]]:
        """Options of data and trainer that a run goes on with: {name: (now, before)}."""
        if not start.goes_on or start.run is None:
            return {}
        kept = read_config(start.run / CONFIG)
        now = yaml.safe_load(self.options.dump(self.config[self.request.subcommand]))
        found: dict[str, tuple[Any, Any]] = {}
        for group in ("data", "trainer"):
            before = kept.get(group) or {}
            asked = {name: value for name, value in now[group].items() if name in before}
            found |= differences(group, asked, {name: before[name] for name in asked})
        return found

    # Objects -------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Make the device that must be there before the model."""
        options = self.config[self.request.subcommand].trainer
        wake_xla(options.accelerator, options.devices)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the run's folder, and the trainer that writes there."""
        options = self.config_init[self.request.subcommand].trainer
        refuse_fsdp(options.strategy)
        if options.default_root_dir is not None:
            raise ValueError(
                f"trainer.default_root_dir {options.default_root_dir!r} would be another place "
                "than the run's folder: choose that with --run_dir"
            )
        callbacks = options.callbacks or []
        callbacks = [*callbacks] if isinstance(callbacks, list) else [callbacks]
        callbacks += [writer() for writer in self.task.writers]
        summarised = any(isinstance(callback, ModelSummary) for callback in callbacks)
        if options.enable_model_summary is not False and not summarised:
            callbacks.append(ModelSummary())  # in plain text, also where rich is installed
        for name, enabled in {
            "progress_bar": options.enable_progress_bar,
            "checkpoint": options.enable_checkpointing,
        }.items():
            if enabled is False and name in self.options.callback_keys:
                self.options.callback_keys.remove(name)
        if not options.fast_dev_run and (folder := self._folder()):
            self.run.folder = folder
            if self.request.subcommand == "fit":
                self.run.lock = self.run.lock or hold_run(folder)
                if is_first_process():
                    clean_up(folder)
            self.run.loggers = self._loggers(folder, options.logger)
            kwargs |= {"default_root_dir": folder, "logger": self.run.loggers or False}
            if self.request.subcommand == "fit":
                config = self._config_to_keep()
                callbacks += [KeepConfig(folder, config, self.run.job), LogEachEpoch()]
            if options.enable_checkpointing is not False:
                callbacks.append(best_checkpoint(folder, *self.task.best_by(self.model)))
        trainer = super().instantiate_trainer(**kwargs, callbacks=callbacks)
        _check_processes(trainer)
        if self.request.subcommand == "fit":
            check_length(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a user's own stays
            trainer.strategy.checkpoint_io = DurableCheckpointIO()
        return trainer

    def after_instantiate_classes(self) -> None:
        """Hand the checkpoint over, or say that there is none."""
        subcommand = self.request.subcommand
        if self.start is not None:
            self.config_init[subcommand]["ckpt_path"] = str(self.start.checkpoint)
        if subcommand == "predict":
            self.config_init[subcommand]["return_predictions"] = False  # they are written
        if (
            self.start is None
            and subcommand != "fit"
            and not self.config[subcommand].model.get("weights")
        ):
            rank_zero_info("No --ckpt_path and no --model.weights: this model is untrained")

    def after_fit(self) -> None:
        """Say what the best checkpoint is worth, or that the run was complete before."""
        best = self.trainer.checkpoint_callback
        if isinstance(best, ModelCheckpoint) and best.best_model_score is not None:
            score, path = float(best.best_model_score), Path(best.best_model_path)
            where = f": {self.run.folder / CHECKPOINTS / path.name}" if self.run.folder else ""
            if isfinite(score):
                rank_zero_info(f"best {best.monitor} {score:.4g}{where}")
            else:  # Lightning puts infinity in the place of what is not a number
                rank_zero_info(
                    f"{best.monitor} was never a number, so nothing tells which checkpoint is best"
                )
        if self.start is not None and self.trainer.global_step == self.start.step:
            rank_zero_info(
                f"{self.start.checkpoint} was complete, with {self.start.step} steps behind it: a "
                "larger --trainer.max_epochs goes on"
            )

    def _folder(self) -> Path | None:
        """The run's folder: the checkpoint's own, or a new one where something is written.

        What scores or shows a run writes into it, unless it must not be written to, or the user
        says another --run_dir.
        """
        request, start = self.request, self.start
        fits = request.subcommand == "fit"
        own = start.run if start is not None and (start.goes_on or not fits) else None
        elsewhere = (
            own is not None
            and not fits
            and request.placed
            and request.run_dir.resolve() != own.parent.parent.resolve()
        )
        if own is not None and not elsewhere:
            if fits or can_be_written(own):
                return own
            rank_zero_info(f"{own} cannot be written: --run_dir says where results go")
        if fits or elsewhere or request.subcommand == "predict":
            return new_run(request.run_dir, request.name)
        return None

    def _loggers(self, folder: Path, given: Any) -> list[Logger]:
        subcommand, start = self.request.subcommand, self.start
        if subcommand == "predict":
            return []
        options: dict[str, Any] = {}
        if subcommand == "fit":
            said = self.config[subcommand]
            options = Board(**said.board.as_dict()).options(self.task.name)
            options["source"] = lineage(said.model.get("weights"))
        before = start.step if subcommand == "fit" and start and start.goes_on else None
        if isinstance(given, Logger | list):
            said = self.config[subcommand].trainer.logger
            pairs = zip(given, said, strict=True) if isinstance(given, list) else [(given, said)]
            placed = [self._placed(folder, one, its, options, before) for one, its in pairs]
            given = [logger for logger in placed if logger is not None]
        return run_loggers(folder, given, subcommand, before, options)

    def _placed(
        self,
        folder: Path,
        logger: Logger,
        said: Any,
        options: Mapping[str, Any],
        before: int | None,
    ) -> Logger | None:
        """A logger of the user's: W&B and TensorBoard know the run's folder, and only fits."""
        if not isinstance(logger, WandbLogger | TensorBoardLogger):
            return logger
        if self.request.subcommand != "fit":
            return None
        known = signature(type(logger)).parameters
        given = {**said.get("init_args", {}), **said.get("dict_kwargs", {})}
        theirs = {k: v for k, v in given.items() if v != getattr(known.get(k), "default", None)}
        if isinstance(logger, TensorBoardLogger):
            return tensorboard(folder, before, **theirs)
        return board(folder, **{**options, **theirs})

    def _config_to_keep(self) -> dict[str, Any]:
        """The full resolved config, as it can be given to -c again."""
        text = self.options.dump(self.config[self.request.subcommand], skip_none=False)
        config = {k: v for k, v in yaml.safe_load(text).items() if k not in NOT_IN_A_CONFIG}
        config = {k: v for k, v in config.items() if v is not None or k not in IF_GIVEN}
        if self.start is not None and self.start.run is not None and self.start.goes_on:
            began = (read_config(self.start.run / CONFIG).get("model") or {}).get("weights")
            config["model"]["weights"] = began  # where the run came from stays on record
        run = {"name": self.request.name, "run_dir": str(self.request.run_dir)}
        return {**run, **{k: v for k, v in config.items() if k not in run}}


def _check_processes(trainer: Trainer) -> None:
    """Refuse many more processes than the machine has cores: Lightning would start them all."""
    cores = os.cpu_count() or 1
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > max(cores, 8):
        raise ValueError(
            f"trainer.devices {trainer.num_devices} is too many processes for {cores} CPU cores: "
            "use --trainer.devices 1"
        )


# What is printed ---------------------------------------------------------------------------------


def _ignored_line(ignored: Mapping[str, tuple[Any, Any]]) -> str:
    return (
        "--ckpt_path goes on with the same run; ignored, since the checkpoint says otherwise: "
        f"{_listed(ignored, 'has')}. To change them, start a new run with --model.weights CKPT"
    )


def _listed(options: Mapping[str, tuple[Any, Any]], verb: str) -> str:
    return ", ".join(
        f"--{key} {_shown(asked)} (it {verb} {_shown(kept)})"
        for key, (asked, kept) in options.items()
    )


def _shown(value: Any) -> str:
    """A value as one would write it on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
