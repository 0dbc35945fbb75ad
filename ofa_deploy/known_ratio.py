"""What certifying finds over what confirming found, by the calls before.

Candidates are timed side by side in one process, the file that is handed out alone in
several. By how much the two differ is a matter of the machine, the runtime and the
hour: some percent, whatever the network.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from profilers.files import write_atomically

# As many as an hour's work leaves; the machine changes from day to day.
REMEMBERED, FRESH_S = 12, 24 * 3600.0
# Fewer say too little.
LEAST_KNOWN = 3
# What misses takes less time than what is tried again, better; and most shall not miss.
QUANTILE = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownRatio:
    """The last ratios of one runtime on one machine.

    Args:
        path: Of the file that keeps them.
        now_s: Tells seconds since the epoch.
    """

    path: Path
    now_s: Callable[[], float] = time.time

    @property
    def expected(self) -> float | None:
        """Of the next network; None where too little is known."""
        ratios = [ratio for _, ratio in self._fresh()]
        if len(ratios) < LEAST_KNOWN:
            return None
        return float(np.quantile(ratios, QUANTILE))

    def note(self, ratio: float) -> None:
        """Remember one more."""
        last = [*self._fresh(), (self.now_s(), ratio)][-REMEMBERED:]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(last).encode())

    def _fresh(self) -> list[tuple[float, float]]:
        """Times and ratios; none of a file that is damaged, which nobody misses."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            pairs = [(float(at_s), float(ratio)) for at_s, ratio in content]
        except (OSError, ValueError, TypeError):
            return []
        return [
            (at_s, ratio)
            for at_s, ratio in pairs
            if abs(self.now_s() - at_s) <= FRESH_S
            and math.isfinite(ratio)
            and ratio > 0
        ]
