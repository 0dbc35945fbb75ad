"""Every network of a space, for spaces small enough; the oracle of search tests."""

from __future__ import annotations

import numpy as np

from ofa_deploy.errors import SpaceError
from ofa_deploy.space import Genomes, SearchSpace

MAX_NETWORKS = 1_000_000


def enumerate_genomes(space: SearchSpace) -> Genomes:
    """All different networks, `(space.count(), genes)`.

    Raises:
        SpaceError: The space holds more than `MAX_NETWORKS`, counted with the choices
            of unused slots.
    """
    counts = space.choice_counts
    total = int(np.prod(counts.astype(object)))
    if total > MAX_NETWORKS:
        raise SpaceError(
            f"space {space.name} has {total} rows of genes; at most {MAX_NETWORKS} "
            "are enumerated. Search it instead"
        )
    rows = np.stack(np.unravel_index(np.arange(total), tuple(counts)), axis=1)
    return np.unique(space.canonical(rows.astype(np.int64)), axis=0)
