"""What networks weigh: exact, by genes, for whole populations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.plan import BYTES_PER_FLOAT
from ofa_deploy.predict.block_costs import Floats, costs_by_genes
from ofa_deploy.space import Genomes, SearchSpace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NetworkSizes:
    """Bytes by gene.

    Args:
        space: Whose genomes it takes.
        fixed_weights: Stem and head, `(resolutions,)`.
        slot_weights: `(resolutions, slots, kernels, expands)`.
        fixed_peak: The larger of stem and head, `(resolutions,)`.
        slot_peak: `(resolutions, slots, kernels, expands)`.
    """

    space: SearchSpace
    fixed_weights: Floats
    slot_weights: Floats
    fixed_peak: Floats
    slot_peak: Floats

    def weight_bytes(self, genomes: Genomes) -> Floats:
        """Of the float32 weights, batch norms folded, `(n,)`."""
        found = self._of_slots(self.slot_weights, genomes).sum(axis=1)
        return np.asarray(found + self.fixed_weights[genomes[:, 0]])

    def peak_activation_bytes(self, genomes: Genomes) -> Floats:
        """Most bytes of float32 activations alive at once, `(n,)`."""
        found = self._of_slots(self.slot_peak, genomes).max(axis=1)
        return np.asarray(np.maximum(found, self.fixed_peak[genomes[:, 0]]))

    def memory_bytes(self, genomes: Genomes) -> Floats:
        """Weights and the most activations alive at once, `(n,)`.

        The least that a runtime needs; what it really takes is measured.
        """
        weights = self.weight_bytes(genomes)
        return np.asarray(weights + self.peak_activation_bytes(genomes))

    def _of_slots(self, by_gene: Floats, genomes: Genomes) -> Floats:
        """Bytes of each slot, 0 of those that are not used, `(n, slots)`."""
        space = self.space
        pairs = space.slot_choices(genomes)
        slot = np.arange(space.slot_count)[None, :]
        found: NDArray[np.float64] = by_gene[
            genomes[:, :1], slot, pairs[..., 0], pairs[..., 1]
        ]
        return np.asarray(found * space.active_slots(genomes))


def network_sizes(space: SearchSpace) -> NetworkSizes:
    """The sizes of a space's networks."""
    outside, slots = costs_by_genes(
        space, lambda block: (block.parameter_count, block.peak_activation_count)
    )
    weights, peaks = (BYTES_PER_FLOAT * outside[..., i] for i in (0, 1))
    return NetworkSizes(
        space=space,
        fixed_weights=weights.sum(axis=1),
        slot_weights=BYTES_PER_FLOAT * slots[..., 0],
        fixed_peak=peaks.max(axis=1),
        slot_peak=BYTES_PER_FLOAT * slots[..., 1],
    )
