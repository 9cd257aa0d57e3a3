"""The table of commands: `simmim COMMAND ...`.

Nothing here imports torch, so that help and typing errors are answered at once.
"""

import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from io import TextIOWrapper

import simmim
from simmim.base.errors import explain, is_ours, nearest, word_warnings
from simmim.command_line.configuration import EXPERIMENTS
from simmim.command_line.help import (
    HELP,
    asked,
    fill,
    groups_of,
    page_of_function,
    page_of_task,
    table,
)

SUBCOMMANDS = {
    "fit": "train",
    "validate": "score a checkpoint on the validation images",
    "test": "score a checkpoint on the test images",
    "predict": "write pictures for the images of a folder",
}


MEASURES = {
    "data": "the loader: images/s, where the time goes, and whether training will starve",
    "step": "the training step: images/s, and where the time goes",
}
SCRIPTS = {"startup": "startup", "store": "object_store", "formats": "storage_formats"}


@dataclass(frozen=True)
class Command:
    """A line of the table: what it does, and the function that gets its arguments."""

    summary: str
    target: str  # "module:function"
    subcommands: Mapping[str, str] = field(default_factory=dict)  # and what they do
    alone: str = ""  # what it does without a subcommand; nothing: it needs one

    def load(self) -> Callable[[list[str]], None]:
        """Import the function, and torch with it."""
        module, _, function = self.target.partition(":")
        return getattr(import_module(module), function)


COMMANDS = {
    "pretrain": Command(
        "learn an encoder from unlabelled images by masked image modelling",
        "simmim.command_line.tasks:pretrain",
        SUBCOMMANDS,
    ),
    "classify": Command(
        "fine-tune an encoder to classify, or probe what its features are worth",
        "simmim.command_line.tasks:classify",
        SUBCOMMANDS,
    ),
    "segment": Command(
        "fine-tune an encoder to give every pixel a class",
        "simmim.command_line.tasks:segment",
        SUBCOMMANDS,
    ),
    "detect": Command(
        "train an encoder to find objects: boxes, and masks where there are outlines",
        "simmim.command_line.tasks:detect",
        SUBCOMMANDS,
    ),
    "embed": Command(
        "write the features of a folder's images, score and draw them",
        "simmim.commands.functions:embed",
    ),
    "compare": Command(
        "say whether pretraining was worth it: against scratch, with few labels and with all",
        "simmim.commands.functions:compare",
    ),
    "export": Command(
        "write an encoder or a classifier for timm, Hugging Face, ONNX or torch.export",
        "simmim.commands.functions:export",
    ),
    "convert": Command(
        "turn an official SimMIM release (.pth) into a checkpoint of ours",
        "simmim.commands.functions:convert",
    ),
    "doctor": Command(
        "look a folder over before hours are spent on it",
        "simmim.commands.functions:doctor",
    ),
    "pack": Command(
        "turn an image folder into shards that are read several times as fast",
        "simmim.commands.functions:pack",
    ),
    "benchmark": Command(
        "measure images/s of the loader, of the training step and of both on this machine",
        "simmim.commands.functions:benchmark",
        MEASURES,
        alone="both apart, and then together",
    ),
}

ELSEWHERE = {  # what people try first
    **{name: f"pretrain {name}" for name in SUBCOMMANDS},
    "train": "pretrain fit",
    "finetune": "classify fit",
    "probe": "classify fit --model.frozen true",
    "classification": "classify",
    "segmentation": "segment",
    "detection": "detect",
    "version": "--version",
}
EXAMPLES = {
    "simmim pretrain fit": "a demonstration: handwritten digits, minutes on a CPU",
    "simmim pretrain fit -c image_folder --data.root DIR": "your own images",
    "simmim pretrain fit --name image_folder --ckpt_path last": "go on with the newest of these",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit status: 0, 1 where the command failed, 2 where it was misused, 130 on Ctrl+C, 141
        where nobody reads what it prints any more.
    """
    word_warnings()
    _print_anything()
    try:
        _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except SystemExit as stop:  # --help, --print_config
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except KeyboardInterrupt as stop:
        print(f"simmim: stopped; {stop}" if str(stop) else "simmim: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and is_ours(error):  # a print, before `| head`
            _let_go_of_output()
            return 141  # 128 + SIGPIPE, as of other programs
        sentence = explain(error)
        if sentence is None or os.environ.get("SIMMIM_DEBUG") == "1":
            raise
        print(f"simmim: {sentence}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    return 0


def _dispatch(args: list[str]) -> None:
    _check_text(args)
    if args[:1] == ["help"] and args[1:]:  # simmim help pretrain fit
        args = [*args[1:], "--help"]
    if not args or args[0] in (*HELP, "help"):
        print(_overview())
        return
    if args[0] in ("-V", "--version"):
        print(simmim.__version__)
        return
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        near = get_close_matches(name, [*COMMANDS, *ELSEWHERE], n=1)
        hint = f"did you mean simmim {ELSEWHERE.get(near[0], near[0])}? " if near else ""
        names = ", ".join(COMMANDS)
        raise ArgumentError(None, f"unknown command {name!r}: {hint}choose from {names}")
    command = COMMANDS[name]
    if command.subcommands:
        if rest and rest[0] in (*HELP, "help"):
            print(_overview_of(name, command))
            return
        named = bool(rest) and not rest[0].startswith("-")
        if not named and not command.alone:
            _refuse(f"simmim {name} needs a subcommand first", "", command.subcommands)
        if name == "benchmark" and named and rest[0] in SCRIPTS:
            script = f"python benchmarks/{SCRIPTS[rest[0]]}.py"
            raise ArgumentError(
                None, f"benchmark {rest[0]} is a script of the repository: {script}"
            )
        if named and rest[0] not in command.subcommands:
            _refuse(f"unknown subcommand {rest[0]!r} of {name}", rest[0], command.subcommands)
    word = asked(rest)
    if word == "" or (word is not None and name not in EXPERIMENTS):
        print(_page_of(name, command, rest))
        return
    command.load()(rest)


def _check_text(args: Iterable[str]) -> None:
    """Refuse what neither a config nor a table can hold; names in a folder may be any bytes."""
    for word in args:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise ArgumentError(
                None, f"{word!r} is no text in UTF-8: rename it, or give a link to it (ln -s)"
            ) from None


def _page_of(name: str, command: Command, args: list[str]) -> str:
    which = args[0] if args[0] in command.subcommands else ""
    if name in EXPERIMENTS:
        summary = command.summary if which == "fit" else command.subcommands[which]
        return page_of_task(name, which, summary, args[1:])
    return page_of_function(f"{name} {which}".strip())


def _print_anything() -> None:
    """Escape what the output's character set does not have, such as umlauts in ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _let_go_of_output() -> None:
    """Throw away what is left to be printed, for which nobody is there."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(what: str, given: str, names: Iterable[str]) -> None:
    hint = nearest(given, names)
    raise ArgumentError(None, f"{what}: {hint + ' ' if hint else ''}choose from {', '.join(names)}")


def _overview() -> str:
    return "\n".join(
        [
            "usage: simmim COMMAND ...",
            "",
            *fill(
                "Masked image modelling (SimMIM): pretrain an image encoder on unlabelled images."
            ),
            "",
            "commands:",
            *table({name: command.summary for name, command in COMMANDS.items()}),
            "",
            "to start with:",
            *table(EXAMPLES),
            "",
            "simmim COMMAND --help says more.",
        ]
    )


def _overview_of(name: str, command: Command) -> str:
    choices = ",".join(command.subcommands)
    choices = f"[{{{choices}}}]" if command.alone else f"{{{choices}}}"
    summaries = {f"simmim {name}": command.alone} if command.alone else {}
    summaries |= {f"simmim {name} {choice}": text for choice, text in command.subcommands.items()}
    return "\n".join(
        [
            *fill(f"usage: simmim {name} {choices} [-c CONFIG ...] [--OPTION VALUE ...]"),
            "",
            *fill(f"{command.summary.capitalize()}."),
            "",
            *table(summaries),
            *(groups_of(name) if command.alone else []),
            "",
            f"simmim {name} {next(iter(command.subcommands))} --help says more.",
        ]
    )
