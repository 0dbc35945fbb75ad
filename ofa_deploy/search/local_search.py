"""Polishing under limits: single changes, and pairs in which one pays for the other.

At a limit a network can hardly gain by one change: what makes it more accurate makes
it slower. Two changes can, and most of what they do together is the sum of what each
does alone; so pairs are ranked by that sum, and only the most promising ones predicted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.space import Genomes, SearchSpace

Floats = NDArray[np.float64]
Objective = Callable[[Genomes], Floats]

# Pairs predicted for each network and step.
PAIRS = 48


def changes(space: SearchSpace) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All single changes: the gene, and by how much its choice moves on, modulo."""
    counts = space.choice_counts
    gene = np.repeat(np.arange(len(counts)), counts - 1)
    step = np.concatenate([np.arange(1, count) for count in counts])
    return gene, step


def neighbours(space: SearchSpace, genomes: Genomes) -> Genomes:
    """All that differ from one of them in one gene, `(n, changes, genes)`.

    Rows of unused slots' genes differ in nothing once they are canonical.
    """
    gene, step = changes(space)
    near = np.repeat(genomes[:, None, :], len(gene), axis=1)
    place = np.arange(len(gene))
    near[:, place, gene] = (near[:, place, gene] + step) % space.choice_counts[gene]
    return near


def exchange(
    space: SearchSpace,
    starts: Genomes,
    *,
    score: Objective,
    shares: Callable[[Genomes], Floats],
    settle: Callable[[Genomes], Genomes],
    steps: int,
) -> tuple[Genomes, int]:
    """Better networks near some, each improved by itself until no step does.

    Args:
        space: Where to look.
        starts: Within the limits, `(n, genes)`.
        score: Genomes `(n, genes)` to what is to be large, `(n,)`.
        shares: Genomes `(n, genes)` to the share used of each limit, `(n, limits)`; 1
            still fits.
        settle: Genomes to the rows of the same networks that are to be taken.
        steps: At most, of each.

    Returns:
        As many networks, none worse than its start, and the number predicted.
    """
    gene, _ = changes(space)
    best, predicted = starts.copy(), 0
    best_score = score(best)
    moving = np.arange(len(best))
    for _ in range(steps):
        if not len(moving) or not len(gene):
            break
        here = best[moving]
        near = settle(neighbours(space, here).reshape(-1, here.shape[1]))
        found = score(near).reshape(len(here), -1)
        used = shares(near).reshape(len(here), len(gene), -1)
        gains = found - best_score[moving][:, None]
        pairs = _promising(gains, used, shares(here), gene)
        both = _combined(here, near.reshape(*gains.shape, -1), pairs, gene)
        both = settle(both.reshape(-1, here.shape[1]))
        together = np.where(
            (shares(both) <= 1).all(axis=1), score(both), -np.inf
        ).reshape(len(here), -1)
        alone = np.where((used <= 1).all(axis=2), found, -np.inf)
        predicted += near.shape[0] + both.shape[0]
        every = np.concatenate([alone, together], axis=1)
        rows = np.concatenate(
            [
                near.reshape(len(here), -1, here.shape[1]),
                both.reshape(len(here), -1, here.shape[1]),
            ],
            axis=1,
        )
        top, place = every.argmax(axis=1), np.arange(len(here))
        better = every[place, top] > best_score[moving]
        best[moving[better]] = rows[place, top][better]
        best_score[moving[better]] = every[place, top][better]
        moving = moving[better]
    return best, predicted


def _promising(
    gains: Floats, used: Floats, before: Floats, gene: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Pairs of changes of different genes, `(n, pairs, 2)`, by the sum of their gains.

    Those that would exceed a limit, were their costs to add up, come last.
    """
    extra = used - before[:, None, :]
    room = 1 - before[:, None, None, :]
    fits = (extra[:, :, None, :] + extra[:, None, :, :] <= room).all(axis=3)
    allowed = fits & (gene[:, None] < gene[None, :])[None]
    total = np.where(allowed, gains[:, :, None] + gains[:, None, :], -np.inf)
    flat = total.reshape(len(gains), -1)
    count = min(PAIRS, flat.shape[1])
    top = np.argpartition(-flat, count - 1, axis=1)[:, :count]
    return np.stack(np.unravel_index(top, total.shape[1:]), axis=2)


def _combined(
    here: Genomes, near: Genomes, pairs: NDArray[np.int64], gene: NDArray[np.int64]
) -> Genomes:
    """Both changes of each pair, `(n, pairs, genes)`."""
    row = np.arange(len(here))[:, None]
    first, second = pairs[..., 0], pairs[..., 1]
    both = near[row, first].copy()
    place = np.arange(pairs.shape[1])[None, :]
    changed = near[row, second, gene[second]]
    both[row, place, gene[second]] = changed
    return both
