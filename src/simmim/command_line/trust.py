"""What a command line names of the user's own: what may be imported for it, and from where.

What the user writes himself, in options or in the configs that he names, is imported. What only a
checkpoint or its run's config names is imported if he says --trust. The working folder is searched
after everything that is installed, and only if something that is named lies there.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, get_args

from lightning.pytorch import LightningDataModule

from simmim.base.files import read_config
from simmim.command_line.configuration import Request, listed
from simmim.command_line.task import Task
from simmim.parts.names import (
    Kind,
    find_part,
    import_parts,
    is_path,
    lies_in,
    search_folder,
    trust_paths,
)
from simmim.runs.folder import CONFIG, Start

TRUST = "--trust"


def admit(request: Request, start: Start | None) -> Request:
    """Let what the user names, or trusts, be imported, and import what registers parts.

    Args:
        request: What the command line asks for.
        start: The checkpoint that it begins with.

    Returns:
        The request, with the modules and the data module that a trusted run names.

    Raises:
        ValueError: If the run's config names what lies in the working folder, and neither the user
            nor --trust does; or if a module cannot be imported.
    """
    run = start.run / CONFIG if start is not None and start.run is not None else None
    inherited = read_config(run) if run else {}
    named = set(words(request))
    if TRUST in request.options:
        named |= {*_strings(inherited), *_strings(start.model if start else {})}
        request = replace(
            request,
            imports=tuple(dict.fromkeys([*listed(inherited.get("imports")), *request.imports])),
            data_class=request.data_class or inherited.get("data_class"),
        )
    else:
        foreign = next((name for name in _foreign(inherited) if name not in named), None)
        if foreign:
            raise ValueError(
                f"{run} names {foreign}, code from outside simmim, which would be run: {TRUST} if "
                "you know where it comes from"
            )
    if TRUST in request.options:
        search_folder(os.getcwd())  # what the weights name is not known yet
    import_from_here(named)
    trust_paths(word for word in named if is_path(word))
    import_parts(request.imports)
    return request


def with_own_data(task: Task, request: Request) -> tuple[Task, Request]:
    """Put the data module that the user names in place of the task's.

    Raises:
        ValueError: If it cannot be imported, or is none.
    """
    name = request.data_class
    if name is None:
        return task, request
    found: Any = find_part(name, {}, "data", trust=False)
    if not isinstance(found, type) or not issubclass(found, LightningDataModule):
        raise ValueError(
            f"data_class {name!r} is no LightningDataModule: give the import path of a class that "
            "is derived from one"
        )
    own = replace(task, data=found)
    return own, replace(request, data_options=frozenset(own.options_of(found)))


def import_from_here(names: Iterable[str]) -> None:
    """Let modules of the working folder be imported, if one of them is named."""
    here = os.getcwd()
    if any(lies_in(here, name) for name in names if is_path(name) or name.isidentifier()):
        search_folder(here)


def words(request: Request) -> Iterator[str]:
    """Every word that the user himself has said, in options and in the configs that he names."""
    for config in request.configs:
        yield from _strings(read_config(config))
    for option in request.options:
        yield from option.split("=", 1)
    yield from request.imports
    yield from listed(request.data_class)


def needs_trust(config: Mapping[str, Any]) -> bool:
    """Whether a run of this config goes on with --trust alone, if the user names nothing again."""
    model = config.get("model") or {}
    parts = [str(model.get(kind)) for kind in get_args(Kind)]
    firsts = {part.partition(".")[0] for part in parts if is_path(part)}  # or a tag of timm's
    return bool(_foreign(config)) or any(find_spec(first) for first in firsts)


def _foreign(config: Mapping[str, Any]) -> list[str]:
    """What a config names besides parts of the model: modules, and classes in this folder."""
    found = [*listed(config.get("imports")), *listed(config.get("data_class"))]
    return found + [path for path in _class_paths(config) if lies_in(os.getcwd(), path)]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _class_paths(config: Mapping[str, Any]) -> Iterator[str]:
    """What jsonargparse would import: any class_path, and any path among the trainer's options."""
    for key, value in config.items():
        if key == "trainer":
            yield from filter(is_path, _strings(value))
        elif key == "class_path" and isinstance(value, str):
            yield value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping):
                yield from _class_paths(inner)
