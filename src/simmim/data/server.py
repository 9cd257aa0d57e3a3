"""Signals of the server that workers are forked from, which imports this first; nobody else does.

It ignores what tells a run to stop, as its workers do: it ends with the process that trains.
"""

import os
import signal


def _set(action: signal.Handlers) -> None:
    signal.signal(signal.SIGTERM, action)
    signal.signal(signal.SIGUSR1, action)


_set(signal.SIG_IGN)
os.register_at_fork(after_in_child=lambda: _set(signal.SIG_DFL))
