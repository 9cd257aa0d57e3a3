"""Find a part of the method by its name: ours from a table, a user's own by its import path."""

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import TypeVar, cast

T = TypeVar("T")


def find_part(name: str, table: Mapping[str, T], what: str, *, trust: bool = True) -> T:
    """Look a part up by name.

    Args:
        name: A name in the table, or the import path of a user's own part ("package.module.attr").
        table: Our own parts by name.
        what: What is looked for, as it should read in the error ("masking", "target", ...).
        trust: Whether code outside simmim may be imported. False while a checkpoint is opened
            whose origin is unknown: an import runs the module's code.

    Returns:
        The part: a function or a class.

    Raises:
        ValueError: If the name is unknown, cannot be imported, or is not trusted.
    """
    if name in table:
        return table[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(_unknown(name, table, what))
    if not trust:
        raise ValueError(
            f"{what} {name!r} is code from outside simmim, which opening this file would run: "
            "pass trust=True (--trust) if you know where the file comes from"
        )
    try:
        return cast(T, getattr(import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what} {name!r} cannot be imported: {error}") from error


def _unknown(name: str, table: Mapping[str, object], what: str) -> str:
    near = get_close_matches(name, table, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{what} {name!r} is not known: {hint}choose from {', '.join(table)}, or give an import path"
