"""Processes that tests wait for the end of."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def waited_for(found: Callable[[], Any], *, limit_s: float = 30.0) -> Any:
    """What is found, once there is something."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        if value := found():
            return value
        time.sleep(0.05)
    return found()


def is_running(pid: int) -> bool:
    """Whether a process is there, and no mere entry of one that has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    if not Path("/proc/self/stat").is_file():
        return True
    try:  # one that nobody waits for stays in the list
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
