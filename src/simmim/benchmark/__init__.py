"""How fast is it here? The loader, the training step, and both together.

`experiment` opens a config of pretraining as that command would, `data` measures its loader, `step`
its training step, `together` a run of both; `record` says on what machine that was. More is
measured by scripts of the repository, in benchmarks/.
"""

from collections.abc import Callable
from typing import Any

from simmim.benchmark.data import data
from simmim.benchmark.step import step
from simmim.benchmark.together import together

MEASURES: dict[str, Callable[..., Any]] = {"": together, "data": data, "step": step}

__all__ = ["MEASURES", "data", "step", "together"]
