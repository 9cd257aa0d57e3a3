"""The long help: what the docstrings say of all options of a task, of a group or of one."""

import re
from argparse import Action, ArgumentError, ArgumentParser

from simmim.base.errors import nearest

ALL = "all"
ROLE = re.compile(r":(?:\w+:)+`~?(?:[\w.]+\.)?(\w+)`")  # Sphinx's, in Lightning's docstrings


def page_of_options(parser: ArgumentParser, about: str) -> str:
    """The help of a parser's options.

    Args:
        parser: Of a subcommand. Its help is what is asked for from here on.
        about: "all"; a group, the part before the point: "model"; or a part of names: "mask".

    Raises:
        ArgumentError: If there is no such option.
    """
    groups = parser._action_groups
    actions = [action for group in groups for action in group._group_actions if action.dest]
    chosen = _choose(actions, about)
    if not chosen:
        names = {part for action in actions for part in action.dest.split(".")}
        hint = nearest(about, names) or f"use {ALL}, model, data, trainer, or a part of a name"
        raise ArgumentError(None, f"--help {about}: no option has that in its name: {hint}")
    for group in groups:
        group._group_actions = [action for action in group._group_actions if action in chosen]
    for action in chosen:
        action.help = action.help and ROLE.sub(r"\1", action.help).replace("``", "`")
    return parser.format_help().rstrip()


def _choose(actions: list[Action], about: str) -> list[Action]:
    about = about.lstrip("-")
    if about == ALL:
        return actions
    inside = [action for action in actions if f"{action.dest}.".startswith(f"{about}.")]
    return inside or [action for action in actions if about in action.dest]
