"""How many weights may stay, so that the compressed file keeps its limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ofa_deploy.errors import InfeasibleBudget

# A file within these shares of the limit will do: fine-tuning changes the weights, and
# with them by a little how well they compress.
NEAR_LIMIT = (0.98, 0.997)
AIMED_SHARE = 0.99
# Files written before the nearest must do.
MAX_FILES = 8
# Fewer weights than this share are no network any more.
LEAST_SHARE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeFitting:
    """Fits the number of weights to a limit on the compressed file.

    Args:
        limit_bytes: Of the compressed file.
        weight_count: Of the whole network.
        full_bytes: Of the whole network's compressed file.
    """

    limit_bytes: int
    weight_count: int
    full_bytes: int

    def most(self, compressed: Callable[[int], int]) -> int:
        """Weights that may stay.

        Bytes rise with the number of weights, nearly in proportion: the last two files
        tell by how much.

        Args:
            compressed: Writes the network with so many weights; bytes of its
                compressed file.

        Raises:
            InfeasibleBudget: Even the least number makes a larger file.
        """
        low, high = (share * self.limit_bytes for share in NEAR_LIMIT)
        aim = AIMED_SHARE * self.limit_bytes
        least = max(1, round(LEAST_SHARE * self.weight_count))
        known = {self.weight_count: self.full_bytes, least: compressed(least)}
        if known[least] > self.limit_bytes:
            raise InfeasibleBudget(
                f"with {least} of its {self.weight_count} weights the compressed file "
                f"still takes {known[least]:,} bytes, more than the "
                f"{self.limit_bytes:,} that are asked for: what is left are names, "
                f"biases and norms. Ask for at least {known[least]:,}",
                budget_ms=None,
                fastest_ms=None,
            )
        while len(known) < MAX_FILES:
            below = max((n for n, size in known.items() if size <= high), default=least)
            if known[below] >= low or below == self.weight_count:
                break
            above = min(n for n, size in known.items() if size > high)
            slope = (known[above] - known[below]) / (above - below)
            count = below + int((aim - known[below]) / slope)
            if count in known:
                break
            known[count] = compressed(count)
        return max((n for n, size in known.items() if size <= high), default=least)
