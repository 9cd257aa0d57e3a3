"""Commands that are plain functions: their options are the function's arguments."""

from argparse import ArgumentError
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser

from simmim.mistakes import word_usage_error


def convert(args: list[str]) -> None:
    """`simmim convert --weights OFFICIAL.pth --out CKPT`."""
    from simmim import weights

    print(call("convert", weights.convert, args))


def pack(args: list[str]) -> None:
    """`simmim pack --root DIR --out DIR`."""
    from simmim.data.pack import pack

    print(call("pack", pack, args))


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
    parser.add_function_arguments(function)
    try:
        options = parser.parse_args(args)
    except ArgumentError as error:
        names = [option for action in parser._actions for option in action.option_strings]
        raise ArgumentError(None, word_usage_error(str(error), names)) from error
    return function(**options.as_dict())
