"""Memory between a run and the system: kept where it is soon used again, returned where it is not.

Of host memory, elsewhere than on glibc nothing of this is done, and nothing of it is needed.
"""

import ctypes
import gc
import sys
from typing import Any

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Numbers of mallopt's parameters, as in malloc.h."""


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of large tensors instead of returning it to the system each time.

    Fresh pages cost a CPU step about a fifth of its time. What is kept lies between what is in use, in
    pieces that a larger tensor may not fit into: :func:`return_freed_memory` gives it back.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Free what only reference cycles hold, as those of compiled code do, and return all that is free.

    A fraction of a second; what is used next starts on fresh pages. Of a GPU's memory torch keeps what it
    freed apart for each stream and each CUDA graph: what calibration leaves does not serve a unit's steps,
    nor what these leave the next unit's compensation.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Any:
    """One of glibc's functions, None where the process has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
