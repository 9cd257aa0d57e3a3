"""Look a folder over before hours are spent on it.

`file_stats` looks at one file, `workers` has it done in processes that a bad file may kill,
`near_duplicates` finds images that show the same, `findings` draws the conclusions, `estimate`
tries the config's model, `diagnosis` is all of it as plain data, and `report`, `contact_sheet` and
`pictures` show it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {"Diagnosis": "diagnosis", "doctor": "command"}  # not imported by its processes
__all__ = list(_HOME)

if TYPE_CHECKING:
    from simmim.commands.doctor.command import doctor as doctor
    from simmim.commands.doctor.diagnosis import Diagnosis as Diagnosis


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'simmim.commands.doctor' has no attribute {name!r}")
    return getattr(import_module(f"simmim.commands.doctor.{_HOME[name]}"), name)
