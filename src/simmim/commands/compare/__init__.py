"""Was pretraining worth it? The encoder against the same one from scratch, at several budgets.

`runs` trains one arm with some of the labels, `results_store` keeps what came out, so that an
interrupted comparison goes on, `significance` says what it shows, and `learning_curve` draws it.
"""

from simmim.commands.compare.command import Comparison, compare

__all__ = ["Comparison", "compare"]
