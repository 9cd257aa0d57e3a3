"""What many tests use: command lines, processes, folders of data."""

from collections.abc import Iterable
from typing import Any

import pytest


def beyond(n: int, values: Iterable[Any]) -> list[Any]:
    """Values of a parametrised test: all but the first n are for `make test-all` alone."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [*(pytest.param(*row) for row in rows[:n]), *(exhaustive(*row) for row in rows[n:])]


def exhaustive(*values: Any) -> Any:
    """Values of a parametrised test that only `make test-all` tries."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)
