"""How fast is it here? The loader, the training step, and both together.

`experiment` opens a config of pretraining as that command would, `data` measures its loader, `step`
its training step, `together` a run of both, `startup` the opening of large folders, `store`
the reading of an object store, `formats` what images may be kept in; `record` says on what machine
that was.
"""

from collections.abc import Callable
from typing import Any

from simmim.benchmark.data import data
from simmim.benchmark.formats import formats
from simmim.benchmark.startup import startup
from simmim.benchmark.step import step
from simmim.benchmark.store import store
from simmim.benchmark.together import together

MEASURES: dict[str, Callable[..., Any]] = {
    "": together,
    "data": data,
    "step": step,
    "startup": startup,
    "store": store,
    "formats": formats,
}

__all__ = ["MEASURES", "data", "formats", "startup", "step", "store", "together"]
