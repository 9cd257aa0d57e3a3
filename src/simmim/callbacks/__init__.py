"""What a person sees while it runs: pictures, probes, speed and alarms, each a Lightning callback.

None of them changes the weights that come out.
"""

from collections.abc import Mapping

from lightning.pytorch import Callback

from simmim.callbacks.alarms import CollapseAlarm, NonFiniteLoss, StopOnNonFinite
from simmim.callbacks.inside import Inside
from simmim.callbacks.probe import OnlineProbe
from simmim.callbacks.progress import ProgressBar, Throughput
from simmim.callbacks.reconstructions import PredictionWriter, Reconstructions
from simmim.callbacks.vitals import Vitals
from simmim.callbacks.worst import WorstImages

EVERY_RUN: Mapping[str, type[Callback]] = {  # of every task, by the name of their options
    "non_finite": StopOnNonFinite,
    "throughput": Throughput,
    "vitals": Vitals,
    "progress_bar": ProgressBar,
}
PRETRAINING: Mapping[str, type[Callback]] = {
    "reconstructions": Reconstructions,
    "probe": OnlineProbe,
    "collapse_alarm": CollapseAlarm,
    "worst": WorstImages,
    "inside": Inside,
    **EVERY_RUN,
}

__all__ = [
    "EVERY_RUN",
    "PRETRAINING",
    "CollapseAlarm",
    "Inside",
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
