"""Find configs by name, and read what a command line asks for before Lightning sees it."""

import json
from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from simmim.base.files import read_config

OURS = {
    "-c": "config",
    "--config": "config",
    "--ckpt_path": "ckpt_path",
    "--name": "name",
    "--run_dir": "run_dir",
    "--imports": "imports",
    "--data_class": "data_class",
}
LISTS = ("config", "imports")  # they take several words
NO_FOLDER = '<>:"|?*\\'  # Windows takes none of them in a name, and runs are copied about
OVERLAY = "overlay"  # the folder of configs that change an experiment but are none
EXPERIMENTS = {  # of the tasks, where the user names none
    "pretrain": "pretrain/digits",
    "classify": "classify/finetune_small",
    "segment": "segment/upernet_small",
    "detect": "detect/rcnn_small",
}
PROBES = {"classify": "classify/linear_probe", "segment": "segment/linear"}  # and of a frozen one


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Attributes:
        command: The task, such as "pretrain".
        subcommand: fit, validate, test or predict.
        default: The embedded config, where the user names no experiment.
        configs: The user's config files, in the order in which they overrule each other.
        name: The run's name.
        named: Whether the user said it, or an experiment that it follows from.
        run_dir: The folder of all runs.
        placed: Whether the command line says it.
        ckpt_path: "last", a checkpoint, a run's folder, or None.
        options: The other arguments, as they came.
        imports: Modules of the user's own that register parts.
        data_class: The user's own data module, where there is one.
        data_options: Its options: what the packaged configs say of others is left out.
    """

    command: str
    subcommand: str
    default: Path | None
    configs: tuple[Path, ...]
    name: str
    named: bool
    run_dir: Path
    placed: bool
    ckpt_path: str | None
    options: tuple[str, ...]
    imports: tuple[str, ...] = ()
    data_class: str | None = None
    data_options: frozenset[str] | None = None

    def arguments(
        self, base: Path | None = None, checkpoint: Mapping[str, Any] | None = None
    ) -> list[str]:
        """The arguments for the parser, where later ones overrule earlier ones.

        Args:
            base: What comes first in place of the default: the config of the run that goes on.
            checkpoint: What the checkpoint says of its model, as a config.
        """
        first = base or self.default
        said = [json.dumps(checkpoint)] if checkpoint else []
        # To be scored or shown, a model is what its checkpoint says, whatever config is named for
        # the data. fit takes what it is asked for first, so as to name what it must ignore.
        configs: list[Path | str] = [first] if first else []
        fits = self.subcommand == "fit"
        configs += [*said, *self.configs] if fits else [*self.configs, *said]
        run = [f"--name={self.name}", f"--run_dir={self.run_dir}"]
        run += [f"--imports={json.dumps(self.imports)}"] * bool(self.imports)
        run += [f"--data_class={self.data_class}"] * bool(self.data_class)
        layers = [f"--config={self._text(config)}" for config in configs]
        return [self.subcommand, *layers, *self.options, *run]

    def _text(self, config: Path | str) -> str:
        """What a config says; a packaged one only what the user's own data module has options for.

        jsonargparse would read the file in the system's encoding; this is ASCII, which any can say.
        """
        if isinstance(config, str):
            return config
        if self.data_options is None or config_folder() not in config.parents:
            node = yaml.compose(config.read_text(encoding="utf-8"), yaml.SafeLoader)
            return yaml.serialize(node) if node else "{}"
        said = read_config(config)
        data = {k: v for k, v in (said.get("data") or {}).items() if k in self.data_options}
        return json.dumps({**said, "data": data})


def read_request(
    command: str, default: str, args: list[str], follows: Mapping[str, str]
) -> Request:
    """Take apart the arguments of a task: subcommand first, then options in any order.

    Args:
        command: The task, such as "pretrain".
        default: The config that is used where no experiment is named.
        args: What stands behind the command.
        follows: Options that are copied from others, {"data.img_size": "model.img_size"}.

    Raises:
        ArgumentError: If a config is not found, is no mapping, or sets what follows another option;
            if the name is no folder's name.
    """
    given, options = _take_ours(args[1:])
    configs = [find_config(name, command) for name in given.pop("config", [])]
    experiments = [path for path in configs if path.parent.name != OVERLAY]
    embedded = None if experiments else find_config(default, command)
    layers = [embedded, *configs] if embedded else configs
    said: dict[str, Any] = {"name": (experiments or layers)[0].stem, "run_dir": "runs"}
    for path in layers:
        config = read_config(path)
        _check_follows(config, path, follows)
        said.update({k: v for k, v in config.items() if v is not None})
    said.update({key: values if key in LISTS else values[-1] for key, values in given.items()})
    _check_name(said["name"])
    return Request(
        command=command,
        subcommand=args[0],
        default=embedded,
        configs=tuple(configs),
        name=said["name"],
        named=bool(experiments) or "name" in given,
        run_dir=Path(said["run_dir"]),
        placed="run_dir" in given,
        ckpt_path=said.get("ckpt_path") or None,
        options=tuple(options),
        imports=tuple(listed(said.get("imports"))),
        data_class=said.get("data_class") or None,
    )


def default_experiment(command: str, args: list[str]) -> str:
    """The config of a task where none is named; a probe's recipe is another.

    Args:
        command: The task, such as "classify".
        args: What the command line holds.
    """
    words = [part for arg in args for part in arg.split("=", 1)]
    frozen = [value for option, value in pairwise(words) if option == "--model.frozen"][-1:]
    probes = frozen and frozen[0].lower() == "true" and command in PROBES
    return PROBES[command] if probes else EXPERIMENTS[command]


def read_layers(command: str, args: list[str]) -> tuple[str, dict[str, Any]]:
    """What the configs of a command line say together, and the name of the experiment.

    Args:
        command: The task, such as "pretrain".
        args: What stands behind the subcommand.

    Raises:
        ArgumentError: If a config is not found, or is no mapping.
    """
    paths = [find_config(name, command) for name in _take_ours(args)[0].get("config", [])]
    if all(path.parent.name == OVERLAY for path in paths):
        paths.insert(0, find_config(default_experiment(command, args), command))
    merged: dict[str, Any] = {}
    for path in paths:
        merged = _laid_over(merged, read_config(path))
    return next(path for path in paths if path.parent.name != OVERLAY).stem, merged


def _laid_over(config: Any, other: Any) -> Any:
    """A config with what another says instead, or besides."""
    if not (isinstance(config, Mapping) and isinstance(other, Mapping)):
        return other
    return {**config, **{k: _laid_over(config.get(k), v) for k, v in other.items()}}


def _take_ours(args: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Take out what is read before Lightning's parser is built, and leave the rest as it is.

    argparse cannot do that: it takes an option that it does not know, with a space in its value,
    for a positional argument.
    """
    ours: dict[str, list[str]] = {}
    rest: list[str] = []
    words = [*args]
    while words:
        option, equals, value = words.pop(0).partition("=")
        key = OURS.get(option)
        if option.startswith("-c") and key is None:
            raise ArgumentError(None, f"unknown option {option}: did you mean -c or --config?")
        if key is None:
            rest.append(option + equals + value)
            continue
        values = [value] if equals else []
        while words and not words[0].startswith("-") and (key in LISTS or not values):
            values.append(words.pop(0))
        if not values:
            raise ArgumentError(None, f"{option} needs a value")
        ours.setdefault(key, []).extend(values)
    return ours, rest


def find_config(name: str, command: str) -> Path:
    """Find a config: a file, or the name of one that travels with the package.

    Args:
        name: A path, or a name with or without its folder: "swin_base_100ep",
            "pretrain/swin_base_100ep", "bf16".
        command: The task, whose own folder is looked into first.

    Raises:
        ArgumentError: If there is neither; the nearest names are proposed.
    """
    if (path := Path(name)).is_file():
        return path
    packaged = packaged_configs()
    short = name.removeprefix("configs/").removesuffix(".yaml")
    for key in (f"{command}/{short}", f"{OVERLAY}/{short}", short):
        if key in packaged:
            return packaged[key]
    usable = [key for key in packaged if key.split("/")[0] in (command, OVERLAY)]
    names = {key.split("/")[-1]: key for key in usable} | {key: key for key in usable}
    near = get_close_matches(short, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ArgumentError(
        None,
        f"config {name!r} is neither a file nor a packaged config: {hint}"
        f"packaged are {', '.join(key.split('/')[-1] for key in usable)}",
    )


def packaged_configs() -> dict[str, Path]:
    """Paths of the packaged configs by name: "pretrain/digits", "overlay/bf16", ..."""
    folder = config_folder()
    paths = {p.relative_to(folder).with_suffix("").as_posix(): p for p in folder.glob("*/*.yaml")}
    return {name: paths[name] for name in sorted(paths) if not name.startswith("sweep/")}  # W&B's


def config_folder() -> Path:
    """Where the packaged configs are: inside the wheel, or at the top of a checkout."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "configs"


def listed(value: Any) -> list[str]:
    """One word, several or none, as a list."""
    return [value] if isinstance(value, str) else list(value or ())


def restrict(config: Mapping[str, Any], *parts: Mapping[str, Any]) -> dict[str, Any]:
    """Those options of a config that one of the parts names, in the config's order."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        naming = [part[key] for part in parts if key in part]
        groups = [group for group in naming if isinstance(group, dict)]
        if isinstance(value, dict) and groups:
            kept[key] = restrict(value, *groups)
        elif naming:
            kept[key] = value
    return kept


def differences(name: str, asked: Any, kept: Any) -> dict[str, tuple[Any, Any]]:
    """Where two values of an option differ: {dotted name: (asked, kept)}."""
    asked, kept = (json.loads(json.dumps(value)) for value in (asked, kept))  # tuples are lists
    if not isinstance(asked, dict) or not isinstance(kept, dict):
        return {} if asked == kept else {name: (asked, kept)}
    if asked.get("class_path") != kept.get("class_path"):  # the options of another class are others
        return {name: (asked.get("class_path"), kept.get("class_path"))}
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**asked, **kept}:
        inner = name if key == "init_args" else f"{name}.{key}"
        found |= differences(inner, asked.get(key), kept.get(key))
    return found


def _check_follows(config: Mapping[str, Any], path: Path, follows: Mapping[str, str]) -> None:
    """Refuse what jsonargparse would silently overwrite."""
    for option, source in follows.items():
        group, _, key = option.partition(".")
        if key in (config.get(group) or {}):
            raise ArgumentError(None, f"config {path}: {option} follows {source}, set that")


def _check_name(name: object) -> None:
    text = name if isinstance(name, str) else ""
    is_one = bool(text) and text == Path(text).name and not set(text) & set(NO_FOLDER)
    if not is_one or text.startswith((".", "-")):
        raise ArgumentError(
            None, f"name {name!r} cannot be a folder: use letters, digits, dots, '-' and '_'"
        )
