"""Keeping freed memory in the process: a training step wants the same again."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_MOST_BYTES = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for this process; returns whether it will.

    By default glibc gives large blocks back at once, and every activation of every step
    is mapped, zeroed and faulted in anew: a tenth of the time of a step on two cores,
    and far more of it on hosts that are slow to hand out pages. Only glibc has this
    setting; elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _MOST_BYTES))
