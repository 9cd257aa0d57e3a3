"""What a person sees while it runs: pictures, probes, speed and alarms, each a Lightning callback.

None of them changes the weights that come out.
"""

from simmim.callbacks.alarms import CollapseAlarm, NonFiniteLoss, StopOnNonFinite
from simmim.callbacks.probe import OnlineProbe
from simmim.callbacks.progress import ProgressBar, Throughput
from simmim.callbacks.reconstructions import PredictionWriter, Reconstructions
from simmim.callbacks.vitals import Vitals

__all__ = [
    "CollapseAlarm",
    "NonFiniteLoss",
    "OnlineProbe",
    "PredictionWriter",
    "ProgressBar",
    "Reconstructions",
    "StopOnNonFinite",
    "Throughput",
    "Vitals",
]
