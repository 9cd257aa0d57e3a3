"""The page of a command that is a function: its docstring and defaults, read from the source.

To import the function would take seconds, as torch comes with it.
"""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docstring_parser import parse

from simmim.command_line.help.layout import fill, table

PACKAGE = Path(__file__).parents[2]
SOURCES = {  # the functions whose arguments are a command's options
    "embed": ("commands/embed/command.py:embed",),
    "compare": ("commands/compare/command.py:compare",),
    "export": ("commands/export/command.py:export",),
    "convert": ("commands/convert.py:convert", "pretrain.py:load_official"),
    "doctor": ("commands/doctor/command.py:doctor",),
    "pack": ("data/pack.py:pack",),
    "benchmark": ("commands/benchmark/end_to_end.py:together",),
    "benchmark data": ("commands/benchmark/data.py:data",),
    "benchmark step": ("commands/benchmark/step.py:step",),
}
SPLIT = "val_fraction split_seed group_pattern"
GROUPS = {  # in the order of the page
    "embed": {
        "needed": "weights root out",
        "features": "layer pooling img_size in_chans encoder_kwargs val_crop percentiles window",
        "scores": f"{SPLIT} k temperature l2",
        "pictures": "map map_points query neighbours seed",
        "run": "batch_size num_workers accelerator precision overwrite trust",
    },
    "compare": {
        "needed": "weights",
        "what is compared": "root labels public budgets seeds mode",
        "training": "config epochs min_steps batch_size img_size hflip",
        "split": SPLIT,
        "run": "num_workers accelerator precision out trust",
    },
    "export": {
        "needed": "weights out",
        "file": "format output normalize overwrite trust",
        "Hugging Face Hub": "push_to_hub private",
    },
    "convert": {
        "needed": "weights out",
        "where the file does not say it": "encoder img_size patch_size num_heads window_size "
        "mask_patch_size target resize",
    },
    "doctor": {
        "needed": "root",
        "run": "config out workers sample",
        "images": "img_size in_chans labels percentiles window",
        "split": SPLIT,
        "trying the model": "estimate estimate_seconds",
    },
    "pack": {
        "needed": "root out",
        "images": "format short_side quality bad_files max_bad_share",
        "run": "shard_mb workers",
    },
    "benchmark": {
        "what is measured": "root config workers batch_size",
        "run": "seconds accelerator precision out",
    },
    "benchmark data": {
        "what is measured": "root config workers batch_size consumes",
        "run": "seconds accelerator precision out",
    },
    "benchmark step": {
        "what is measured": "config encoder img_size batch_size mask_patch_size depth precision "
        "compile hidden_tokens",
        "comparison": "against",
        "run": "steps accelerator out",
    },
}
VALUES = {  # what stands for a value, where its type does not say it
    "weights": "CKPT",
    "public": "CKPT",
    "root": "DIR",
    "out": "PATH",
    "config": "CONFIG",
    "labels": "FILE",
    "query": "FILE",
    "group_pattern": "REGEX",
    "push_to_hub": "USER/NAME",
    "encoder_kwargs": "{NAME: VALUE}",
    "encoder": "NAME",
    "trust": "",
}


@dataclass(frozen=True)
class Option:
    """An argument of a function.

    Attributes:
        name: As in the function.
        annotation: Its type, as it is written.
        default: Likewise; None where it must be given.
        text: What the docstring says.
    """

    name: str
    annotation: str
    default: str | None
    text: str

    @property
    def usage(self) -> str:
        """How it is given."""
        return f"--{self.name} {self._value()}".replace("--config", "-c").rstrip()

    @property
    def explained(self) -> str:
        """What it means, and its default."""
        if self.default in (None, "None", "False", "()"):
            return self.text
        return f"{self.text} [{_plain(str(self.default))}]"

    def _value(self) -> str:
        if self.name in VALUES and self.annotation != "int":
            return VALUES[self.name]
        if words := re.search(r"Literal\[(.*?)\]", self.annotation):
            return words[1].replace("'", "").replace(", ", "|")
        if "bool" in self.annotation:
            return "true|false"
        if "tuple" in self.annotation:
            return "[LOW,HIGH]"
        return "N" if "int" in self.annotation else "X" if "float" in self.annotation else "KIND"


def page_of_function(command: str) -> str:
    """The help of a command that is a function.

    Args:
        command: "embed", or "benchmark data".
    """
    summary, options = read_options(command)
    needed = "".join(f" {option.usage}" for option in options if option.default is None)
    paragraphs = [line for text in summary.split("\n\n") for line in ("", *fill(text))]
    usage = fill(f"usage: simmim {command}{needed} [--OPTION VALUE ...]")
    return "\n".join([*usage, *paragraphs, *groups_of(command)])


def groups_of(command: str) -> list[str]:
    """The lines of a command's options."""
    options = {option.name: option for option in read_options(command)[1]}
    several = " ..." if command.startswith("benchmark") else ""  # values behind one option
    lines = []
    for title, names in GROUPS[command].items():
        texts = {}
        for option in (options[name] for name in names.split()):
            more = several if option.annotation.startswith("list[") else ""
            texts[option.usage + more] = option.explained
        lines += ["", f"{title}:", *table(texts)]
    return lines


def read_options(command: str) -> tuple[str, list[Option]]:
    """What a command does, and the options that its page shows."""
    functions = [_find_function(*source.split(":")) for source in SOURCES[command]]
    found: dict[str, Option] = {}
    for function in reversed(functions):  # what the first one says counts
        found |= {option.name: option for option in _options(function)}
    doc = parse(ast.get_docstring(functions[0]) or "")
    texts = filter(None, (doc.short_description, doc.long_description))
    shown = " ".join(GROUPS[command].values()).split()
    return "\n\n".join(texts), [found[name] for name in shown]


def _find_function(file: str, name: str) -> ast.FunctionDef:
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    return next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)


def _options(function: ast.FunctionDef) -> Iterator[Option]:
    texts = {p.arg_name: p.description for p in parse(ast.get_docstring(function) or "").params}
    args, defaults = function.args.args, function.args.defaults
    required = [None] * (len(args) - len(defaults))
    pairs = [*zip(args, [*required, *defaults], strict=True)]
    pairs += zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    for arg, default in pairs:
        yield Option(
            arg.arg,
            ast.unparse(arg.annotation) if arg.annotation else "",
            ast.unparse(default) if default else None,
            " ".join((texts.get(arg.arg) or "").split()),
        )


def _plain(default: str) -> str:
    """A default as one would write it on the command line."""
    value = ast.literal_eval(default)
    return value if isinstance(value, str) else json.dumps(value)
