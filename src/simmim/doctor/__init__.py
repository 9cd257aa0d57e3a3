"""Look a folder over before hours are spent on it.

`record` looks at one file, `workers` has it done in processes that a bad file may kill, `likeness`
finds images that show the same, `findings` draws the conclusions, `estimate` tries the config's
model, `diagnosis` is all of it as plain data, and `report`, `sheet` and `pictures` show it.
"""

from simmim.doctor.command import doctor
from simmim.doctor.diagnosis import Diagnosis

__all__ = ["Diagnosis", "doctor"]
