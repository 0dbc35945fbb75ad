"""How alike two orders are: Spearman's rho, in numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def spearman_rho(x: Floats, y: Floats) -> float:
    """Correlation of the ranks of `(n,)` and `(n,)`, -1..1; ties share a rank."""
    ranks_x, ranks_y = _ranks(x), _ranks(y)
    spread = float(ranks_x.std() * ranks_y.std())
    if not spread:
        return float("nan")
    products = (ranks_x - ranks_x.mean()) * (ranks_y - ranks_y.mean())
    return float(products.mean()) / spread


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks
