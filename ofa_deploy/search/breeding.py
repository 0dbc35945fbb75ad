"""Children of networks: mutants and crossovers, whole generations at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ofa_deploy.search.dominated_widths import Promotion
from ofa_deploy.space import Genomes, SearchSpace, first_of_each


@dataclass(frozen=True, slots=True, kw_only=True)
class Breeding:
    """How children are made.

    Args:
        space: Whose genomes.
        promotion: Widths to leave out; None for none.
        mutant_share: Share of the children that are mutants; the rest are crossovers.
        block_mutation: Probability that a mutant's block (or depth) is redrawn.
        resolution_mutation: The same for the resolution.
    """

    space: SearchSpace
    promotion: Promotion | None
    mutant_share: float
    block_mutation: float
    resolution_mutation: float

    def children(
        self, mothers: Genomes, fathers: Genomes, rng: np.random.Generator
    ) -> Genomes:
        """A child of each pair, `(pairs, genes)`; a mutant has a mother alone."""
        mutant_count = round(len(mothers) * self.mutant_share)
        mutants = self._mutate(mothers[:mutant_count], rng)
        mother, father = mothers[mutant_count:], fathers[mutant_count:]
        crossed = np.where(rng.random(mother.shape) < 0.5, mother, father)
        return self.settle(np.concatenate([mutants, crossed]))

    def settle(self, genomes: Genomes) -> Genomes:
        """Canonical rows of the same networks, without dominated widths."""
        return promoted(self.promotion, self.space.canonical(genomes))

    def _mutate(self, genomes: Genomes, rng: np.random.Generator) -> Genomes:
        space = self.space
        redrawn = rng.integers(0, space.choice_counts[None, :], size=genomes.shape)
        changes = rng.random(genomes.shape) < self.block_mutation
        changes[:, 0] = rng.random(len(genomes)) < self.resolution_mutation
        # Kernel and expand of a block are redrawn together.
        blocks = rng.random((len(genomes), space.slot_count)) < self.block_mutation
        changes[:, space.first_slot_gene :] = np.repeat(blocks, 2, axis=1)
        return np.where(changes, redrawn, genomes)


def promoted(promotion: Promotion | None, genomes: Genomes) -> Genomes:
    """The networks without dominated widths, where these are known."""
    return genomes if promotion is None else promotion.apply(genomes)


def unlike(genomes: Genomes, known: Genomes) -> Genomes:
    """Rows that are neither known nor equal to one before them.

    Copies would take a small population over, and the search stop at a local optimum.
    """
    family = np.concatenate([known, genomes])
    different = first_of_each(family)
    return family[different[different >= len(known)]]
