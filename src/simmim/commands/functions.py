"""Commands that are plain functions: their options are the function's arguments."""

import os
import re
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import Any

from jsonargparse import ArgumentParser

from simmim.base.errors import word_usage_error
from simmim.parts.names import import_parts, search_folder, trust_paths


def convert(args: list[str]) -> None:
    """`simmim convert --weights OFFICIAL.pth --out CKPT`."""
    from simmim.commands.convert import convert as function

    print(call("convert", function, args))


def embed(args: list[str]) -> None:
    """`simmim embed --weights CKPT --root DIR --out FILE`."""
    from simmim.commands.embed import embed

    # Given again, a list's option adds to the list instead of replacing it.
    call("embed", embed, [re.sub(r"^--query(?==|$)", "--query+", arg) for arg in args])


def compare(args: list[str]) -> None:
    """`simmim compare --weights CKPT`."""
    from simmim.commands.compare import compare

    print(call("compare", compare, _gather(_long(args), {"--budgets": "--budgets"})))


def export(args: list[str]) -> None:
    """`simmim export --weights CKPT --out DIR [--format timm|onnx|torch]`."""
    from simmim.commands.export import export

    print(call("export", export, args))


def doctor(args: list[str]) -> None:
    """`simmim doctor --root DIR`."""
    from simmim.commands.doctor import doctor

    print(call("doctor", doctor, _long(args)))


def pack(args: list[str]) -> None:
    """`simmim pack --root DIR --out DIR`."""
    from simmim.data.pack import pack

    print(call("pack", pack, args))


def benchmark(args: list[str]) -> None:
    """`simmim benchmark [{data,step}] [-c CONFIG ...]`."""
    from simmim.commands.benchmark import MEASURES

    which = args[0] if args and args[0] in MEASURES else ""
    measure = MEASURES[which]
    lists = [name for name, p in signature(measure).parameters.items() if "list[" in str(p)]
    options = {"-c": "--config", **{f"--{name}": f"--{name}" for name in lists}}
    words = _gather(args[1:] if which else args, options)
    print(call(f"benchmark {which}".strip(), measure, words))


def call(name: str, function: Callable[..., Any], args: list[str]) -> Any:
    """Call a function with its arguments from the command line.

    Args:
        name: The command.
        function: Its annotations and docstring make the options and their help.
        args: The options.

    Returns:
        What the function returns.

    Raises:
        ArgumentError: If an option is wrong or missing.
    """
    parser = ArgumentParser(prog=f"simmim {name}", exit_on_error=False, allow_abbrev=False)
    parser.usage = f"simmim {name} [--OPTION VALUE ...]"
    opens = "trust" in signature(function).parameters  # a checkpoint, which may name own code
    parser.add_function_arguments(function, skip={"trust"} if opens else set())
    if opens:
        _add_own_code(parser)
    try:
        options = parser.parse_args(args).as_dict()
    except ArgumentError as error:
        names = [option for action in parser._actions for option in action.option_strings]
        raise ArgumentError(None, word_usage_error(str(error), names)) from error
    if opens:
        _admit(options.pop("imports"), options["trust"])
    try:
        return function(**options)
    except ValueError as error:  # data.root of a task is --root here
        error.args = (_name_options(str(error), signature(function).parameters),)
        raise


def _add_own_code(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--trust",
        action="store_true",
        help="Import an encoder that the checkpoint names by its import path, which runs its code.",
    )
    parser.add_argument(
        "--imports",
        nargs="+",
        default=[],
        help="Modules of your own to import first, which register parts (simmim.register).",
    )


def _admit(imports: list[str], trust: bool) -> None:
    """Let what the user names, or trusts, be imported, from the working folder as well."""
    trust_paths([])
    if imports or trust:
        search_folder(os.getcwd())
    import_parts(imports)


def _long(args: list[str]) -> list[str]:
    """Write --config for -c."""
    return [re.sub(r"^-c(?==|$)", "--config", word) for word in args]


def _gather(args: list[str], lists: Mapping[str, str]) -> list[str]:
    """Write `-c a b -c c` as jsonargparse takes a list: `--config=[a, b, c]`."""
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    words = [*args]
    while words:
        option, equals, value = words.pop(0).partition("=")
        name = option if option in lists.values() else lists.get(option)
        if name is None:
            rest.append(option + equals + value)
            continue
        values = found.setdefault(name, [])
        values += [value] if equals else []
        while words and not equals and not words[0].startswith("-"):
            values.append(words.pop(0))
        if not values:
            raise ArgumentError(None, f"{option} needs a value")
    words_of = {
        name: " ".join(v) if v[0].startswith("[") else f"[{', '.join(v)}]"
        for name, v in found.items()
    }
    return [*rest, *(f"{name}={value}" for name, value in words_of.items())]


def _name_options(message: str, names: Iterable[str]) -> str:
    return re.sub(rf"(?<![\w./\\'\"-])data\.({'|'.join(names)})\b", r"--\1", message)
