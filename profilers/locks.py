"""Files that one process has for itself; a lock goes with its process."""

from __future__ import annotations

import errno
import sys
from typing import BinaryIO

# What a lock that another process holds is refused with.
HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_LOCKED_BYTE = 2**40


def lock(file: BinaryIO) -> None:
    """Lock an open file.

    Raises:
        OSError: Another process holds it, if `errno` is among `HELD`; else the file
            system has no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        file.seek(_LOCKED_BYTE)  # far behind what is written, which stays readable
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def unlock(file: BinaryIO) -> None:
    """Give a lock back, that processes begun meanwhile would hold on to."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(_LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)
