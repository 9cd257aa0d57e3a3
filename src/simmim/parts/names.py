"""Find a part by its name: ours from a table, a user's own by its import path or as registered.

An import runs the module's code, so what a file names is imported only if the user trusts the file,
or has named the same part himself.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from inspect import Signature, signature
from typing import Any, Literal, TypeVar, cast, get_args

T = TypeVar("T")
Kind = Literal["encoder", "masking", "target", "head", "loss", "data"]
ENTRY_POINTS = "simmim.parts"  # of packages whose modules register parts

_registered: dict[str, dict[str, Any]] = {kind: {} for kind in get_args(Kind)}
_trusted: set[str] = set()  # import paths that the command line names


# A user's own ------------------------------------------------------------------------------------


def register(kind: Kind, name: str | None = None) -> Callable[[T], T]:
    """Give a part of your own a short name: `@simmim.register("masking", "checker")`.

    The module that says so must be imported before the name is used: by hand, by `imports:` in a
    config, by `--imports MODULE`, or as an entry point in the group `simmim.parts` of your package.

    Args:
        kind: encoder, masking, target, head, loss or data.
        name: What it is to be called; by default as the function or class is.

    Returns:
        What puts a function or class into the table, and gives it back as it is.

    Raises:
        ValueError: If there is no such kind, the name is no word, or another part has it.
    """
    if kind not in _registered:
        raise ValueError(f"parts of kind {kind!r} are not known: use {', '.join(_registered)}")

    def keep(part: T) -> T:
        own, path = name or str(getattr(part, "__name__", "")), _path_of(part)
        if not own.isidentifier():
            raise ValueError(f"{kind} {own!r} is no name: use letters, digits and '_'")
        earlier = _registered[kind].get(own)
        if earlier is not None and _path_of(earlier) != path:  # a cell of a notebook runs again
            raise ValueError(
                f"{kind} {own!r} is {_path_of(earlier)} already: register {path} by another name"
            )
        _registered[kind][own] = part
        return part

    return keep


def import_parts(modules: Iterable[str]) -> None:
    """Import modules that register parts.

    Raises:
        ValueError: If one cannot be imported.
    """
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise ValueError(
                f"imports: {module!r} cannot be imported ({error}): give a module, without .py, "
                "that lies in this folder or is installed"
            ) from error


def trust_paths(paths: Iterable[str]) -> None:
    """Note what the user of a command has named himself: it may be imported whoever names it.

    Nothing that was noted before counts any more.
    """
    _trusted.clear()
    _trusted.update(paths)


def is_path(name: str) -> bool:
    """Whether a name reads like an import path: package.module.attribute."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", name) is not None


def search_folder(folder: str) -> None:
    """Let modules of a folder be imported, those that are installed first.

    The console script does not look into the working folder by itself. `python -m` looks there
    first, so that any file of a known name takes the place of an installed module: here it is last.
    """
    if folder not in sys.path and (folder != os.getcwd() or "" not in sys.path):
        sys.path.append(folder)


def lies_in(folder: str, path: str) -> bool:
    """Whether an import path, or a module, begins with a module of this folder."""
    first = os.path.join(folder, path.partition(".")[0])
    return os.path.isfile(f"{first}.py") or os.path.isfile(os.path.join(first, "__init__.py"))


# Finding -----------------------------------------------------------------------------------------


def find_part(name: str, table: Mapping[str, T], what: str, *, trust: bool = True) -> T:
    """Look a part up by name.

    Args:
        name: A name in the table, one that was registered, or the import path of a user's own part
            ("package.module.attr").
        table: Our own parts by name.
        what: What is looked for, as it should read in the error ("masking", "target", ...).
        trust: Whether code outside simmim may be imported. False while a checkpoint is opened
            whose origin is unknown: an import runs the module's code. What the command line names
            may be in any case.

    Returns:
        The part: a function or a class.

    Raises:
        ValueError: If the name is unknown, cannot be imported, or is not trusted.
    """
    if (own := find_registered(name, what)) is not None:
        if name in table:
            raise ValueError(
                f"{what} {name!r} is simmim's own: register {_path_of(own)} by another name"
            )
        return cast(T, own)
    if name in table:
        return table[name]
    if not is_path(name):
        raise ValueError(_unknown(name, table, what))
    if not trust and name not in _trusted:
        raise ValueError(
            f"{what} {name!r} is code from outside simmim, which would be run: pass trust=True "
            "(--trust) if you know where it comes from"
        )
    module, _, attribute = name.rpartition(".")
    try:
        return cast(T, getattr(import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what} {name!r} cannot be imported: {error}{_where(name)}") from error


def find_registered(name: str, what: str) -> Any | None:
    """A part that was registered by this name, perhaps by an installed package; or None."""
    known = _registered.get(what, {})
    if name not in known and name.isidentifier():
        _load_entry_points()
    return known.get(name)


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
        ValueError: As `find_part`; or if the class does not have an option, or takes other
            arguments than the classes of the table.
    """
    part = find_part(name, table, what, trust=trust)
    check_call(part, name, what, *args, options=options, **given)
    return part(*args, **given, **(options or {}))


def check_call(
    part: Callable[..., Any],
    name: str,
    what: str,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    **given: Any,
) -> None:
    """Refuse options that a part does not have, and a part that does not take what it will get.

    Args:
        part: A function or class.
        name: Its name.
        what: What it is; `WHAT_kwargs` is what users call the options.
        args: What it is called with.
        options: The user's options.
        given: What it is called with, by name.

    Raises:
        ValueError: With the call that would fail.
    """
    takes = signature_of(part)
    parameters = takes.parameters
    known = [option for option in parameters if option not in given][len(args) :]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option in () if open_ended else options or ():
        if option not in known:
            raise ValueError(
                f"{what}_kwargs: {what} {name!r} has no option {option!r}, it has "
                f"{', '.join(known) or 'none'}"
            )
    try:
        takes.bind(*args, **given, **(options or {}))
    except TypeError as error:
        raise ValueError(
            f"{what} {name!r} is {getattr(part, '__name__', part)}{takes}, and cannot be "
            f"called as simmim calls a {what}: {error}"
        ) from error


def signature_of(part: Callable[..., Any]) -> Signature:
    """What a function or class takes. torch's Module says anything, and takes nothing."""
    from torch import nn  # late: the command line imports this file before it knows what it needs

    # torch.compile puts an initialiser of another name in Module's place.
    is_module = isinstance(part, type) and issubclass(part, nn.Module)
    is_bare = is_module and cast(Any, part).__init__ is nn.Module.__init__
    return Signature() if is_bare else signature(part)


@cache
def _load_entry_points() -> None:
    """Import what installed packages say registers parts, once."""
    for point in entry_points(group=ENTRY_POINTS):
        point.load()


def _path_of(part: object) -> str:
    return f"{getattr(part, '__module__', '')}.{getattr(part, '__qualname__', part)}"


def _where(name: str) -> str:
    """A hint at where modules are looked for, if this one is nowhere."""
    first = name.partition(".")[0]
    nowhere = first not in sys.modules and find_spec(first) is None
    return f"; modules are looked for in {os.getcwd()} and where packages are" if nowhere else ""


def _unknown(name: str, table: Mapping[str, object], what: str) -> str:
    names = [*table, *_registered.get(what, {})]
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    choices = f"choose from {', '.join(names)}, or " if names else ""
    remedy = ", or import what registers it (--imports MODULE)" if what in _registered else ""
    return f"{what} {name!r} is not known: {hint}{choices}give an import path{remedy}"
