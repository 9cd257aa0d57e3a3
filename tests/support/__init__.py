"""What many tests use: command lines, processes, folders of data."""

from typing import Any

import pytest


def exhaustive(*values: Any) -> Any:
    """Values of a parametrised test that only `make test-all` tries."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)
