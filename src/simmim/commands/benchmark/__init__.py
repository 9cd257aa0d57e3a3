"""How fast is it here? The loader, the training step, and both together.

`experiment` opens a config of pretraining as that command would, `data` measures its loader, `step`
its training step, `end_to_end` a run of both; `record` says on what machine that was. More is
measured by scripts of the repository, in benchmarks/.
"""

from collections.abc import Callable
from typing import Any

from simmim.commands.benchmark.data import data
from simmim.commands.benchmark.end_to_end import together
from simmim.commands.benchmark.step import step

MEASURES: dict[str, Callable[..., Any]] = {"": together, "data": data, "step": step}

__all__ = ["MEASURES", "data", "step", "together"]
