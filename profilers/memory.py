"""How much memory this process takes, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["MemoryGauge"]

_KIB = 1024
_RESET_PEAK = "5"


class MemoryGauge:
    """Growth of this process's resident memory from now to its peak.

    Args:
        process: The kernel's folder of the process.
    """

    def __init__(self, process: Path = Path("/proc/self")) -> None:
        self._status = process / "status"
        try:
            (process / "clear_refs").write_text(_RESET_PEAK)
        except OSError:
            # The peak may be that of whatever was imported before.
            self._start_bytes = None
        else:
            self._start_bytes = self._read("VmRSS")

    def peak_growth_mb(self) -> float | None:
        """Megabytes (10^6 bytes), at least 0; None where the kernel does not tell."""
        peak_bytes = self._read("VmHWM")
        if peak_bytes is None or self._start_bytes is None:
            return None
        return max(0, peak_bytes - self._start_bytes) / 1e6

    def _read(self, field: str) -> int | None:
        try:
            lines = self._status.read_text(encoding="utf-8").splitlines()
        except OSError:
            return None
        for line in lines:
            name, _, value = line.partition(":")
            number = value.removesuffix("kB").strip()
            if name == field and number.isdigit():
                return int(number) * _KIB
        return None
