"""Help without torch: what is asked for, and pages of two columns as wide as the terminal."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence

HELP = ("-h", "--help")
WIDEST = 100  # columns: longer lines are hard to read
LEAST = 36  # columns of a text; where there are fewer, it stands under its name


def asked(args: Sequence[str]) -> str | None:
    """What help is asked for: a word, "" for the short page, None for none."""
    for i, word in enumerate(args):
        option, equals, about = word.partition("=")
        if option in HELP:
            after = args[i + 1] if i + 1 < len(args) else ""
            return about if equals else "" if after.startswith("-") else after
    return None


def table(rows: Mapping[str, str]) -> list[str]:
    """Lay out names and their texts in two columns, as wide as the terminal."""
    left = max(map(len, rows), default=0) + 4
    stacked = columns() - left < LEAST
    indent = " " * (6 if stacked else left)
    lines = []
    for name, text in rows.items():
        first, *rest = textwrap.wrap(text, columns() - len(indent)) or [""]
        if stacked:
            lines += [f"  {name}", indent + first]
        else:
            lines.append(f"  {name}".ljust(left) + first)
        lines += [indent + line for line in rest]
    return [line.rstrip() for line in lines]


def columns() -> int:
    """Columns of a page."""
    return max(40, min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST))


def fill(text: str) -> list[str]:
    """Break a text into lines as wide as the terminal."""
    return textwrap.wrap(text, columns())
