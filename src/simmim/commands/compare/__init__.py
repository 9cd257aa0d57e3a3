"""Was pretraining worth it? The encoder against the same one from scratch, at several budgets.

`trials` trains one arm with some of the labels, `ledger` keeps what came out, so that an
interrupted comparison goes on, `evidence` says what it shows, and `learning_curve` draws it.
"""

from simmim.commands.compare.command import Comparison, compare

__all__ = ["Comparison", "compare"]
