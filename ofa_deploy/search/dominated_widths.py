"""Widths that a wider one costs no more than: not worth having.

A runtime's kernels work in whole groups of channels, so a width in between costs as
much as the next group's edge. The wider block has every function of the narrower one
in it, and is taken to be at least as accurate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.space import Genomes, SearchSpace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Promotion:
    """The widest choice that costs no more, for every choice of a block.

    Args:
        space: Whose genomes.
        expands: Expand genes by `(resolutions, slots, kernels, expands)`.
    """

    space: SearchSpace
    expands: NDArray[np.int64]

    @property
    def dominated_share(self) -> float:
        """Share of the choices that are not worth having, 0..1."""
        stages = self.space.stages
        counts = np.array([len(s.expands) for s in stages for _ in range(s.max_depth)])
        real = np.arange(self.expands.shape[-1]) < counts[:, None]
        changed = self.expands != np.arange(self.expands.shape[-1])
        changed &= real[None, :, None, :]
        kernels = self.expands.shape[0] * self.expands.shape[2]
        return float(changed.sum() / (real.sum() * kernels))

    def apply(self, genomes: Genomes) -> Genomes:
        """The same networks `(n, genes)`, dominated widths replaced."""
        space = self.space
        promoted = genomes.copy()
        pairs = space.slot_choices(promoted).copy()
        slot = np.arange(space.slot_count)[None, :]
        wider = self.expands[genomes[:, :1], slot, pairs[..., 0], pairs[..., 1]]
        pairs[..., 1] = np.where(space.active_slots(genomes), wider, pairs[..., 1])
        promoted[:, space.first_slot_gene :] = pairs.reshape(len(genomes), -1)
        return promoted


def promotion(space: SearchSpace, slot_ms: NDArray[np.float64]) -> Promotion:
    """Compare all widths of every block.

    Args:
        space: Whose blocks.
        slot_ms: Their prices, `(resolutions, slots, kernels, expands)`.
    """
    counts = np.array(
        [len(stage.expands) for stage in space.stages for _ in range(stage.max_depth)]
    )
    choices = np.arange(slot_ms.shape[-1])
    costs_no_more = slot_ms[..., None, :] <= slot_ms[..., :, None]
    real = (choices < counts[:, None])[None, :, None, None, :]
    allowed = costs_no_more & real & (choices >= choices[:, None])
    # The last of them; a choice is always among its own.
    expands = np.where(allowed, choices, -1).max(axis=-1)
    return Promotion(space=space, expands=np.where(expands < 0, choices, expands))
