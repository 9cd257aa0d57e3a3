"""Find a part of the method by its name: ours from a table, a user's own by its import path."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from typing import Any, TypeVar, cast

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


def build_part(
    name: str,
    table: Mapping[str, Callable[..., T]],
    what: str,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    trust: bool = True,
    **given: Any,
) -> T:
    """Find a class by its name and make one.

    Args:
        name: As in `find_part`.
        table: Our own classes by name.
        what: What is looked for; `WHAT_kwargs` is what users call the options.
        args: What every class of the table takes.
        options: The user's options.
        trust: As in `find_part`.
        given: What every class of the table takes, by name.

    Raises:
        ValueError: As `find_part`; or if the class does not have an option.
    """
    part = find_part(name, table, what, trust=trust)
    parameters = signature(part).parameters
    known = [option for option in parameters if option not in given][len(args) :]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option in () if open_ended else options or ():
        if option not in known:
            raise ValueError(
                f"{what}_kwargs: {what} {name!r} has no option {option!r}, it has "
                f"{', '.join(known) or 'none'}"
            )
    return part(*args, **given, **(options or {}))


def _unknown(name: str, table: Mapping[str, object], what: str) -> str:
    near = get_close_matches(name, table, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    choices = ", ".join(table)
    return f"{what} {name!r} is not known: {hint}choose from {choices}, or give an import path"
