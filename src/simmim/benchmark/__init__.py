"""How fast is it here? The loader, the training step, and both together.

`experiment` opens a config of pretraining as that command would, `data` measures its loader, `step`
its training step, `together` a run of both; `record` says on what machine that was.
"""

from simmim.benchmark.data import data
from simmim.benchmark.step import step
from simmim.benchmark.together import together

MEASURES = {"": together, "data": data, "step": step}

__all__ = ["MEASURES", "data", "step", "together"]
