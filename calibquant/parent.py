"""Ends a process when the one that started it is killed; imports nothing that takes time."""

import ctypes
import signal
import sys


def end_with_parent() -> None:
    """On Linux, end as on Ctrl-C when torchrun is killed, instead of going on without it."""
    set_parent_death_signal = 1  # prctl(2)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
