"""What a person sees while it runs: pictures, probes, speed and alarms, each a Lightning callback.

None of them changes the weights that come out.
"""

from simmim.callbacks.alarms import CollapseAlarm, NonFiniteLoss, StopOnNonFinite
from simmim.callbacks.inside import Inside
from simmim.callbacks.masks import Masks
from simmim.callbacks.probe import OnlineProbe
from simmim.callbacks.progress import ProgressBar, Throughput
from simmim.callbacks.reconstructions import PredictionWriter, Reconstructions
from simmim.callbacks.vitals import Vitals
from simmim.callbacks.worst import WorstImages

__all__ = [
    "CollapseAlarm",
    "Inside",
    "Masks",
    "NonFiniteLoss",
    "OnlineProbe",
    "PredictionWriter",
    "ProgressBar",
    "Reconstructions",
    "StopOnNonFinite",
    "Throughput",
    "Vitals",
    "WorstImages",
]
