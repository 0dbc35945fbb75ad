"""An accuracy predictor for a space that nobody trained a supernet of.

Its labels are made up: they grow with the work and level off, and every choice has a
worth of its own. Fitted as real ones are, it has their shape, size and speed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.plan import lower
from ofa_deploy.predict.accuracy import (
    AccuracyPredictor,
    AccuracySample,
    fit_accuracy_predictor,
    one_hot,
)
from ofa_deploy.space import Genomes, SearchSpace

SAMPLE_COUNT = 400
# Of the labels: percent points between networks of equal work, and of one choice.
SPREAD, WORTH = 0.002, 0.001


def made_up_accuracy(
    space: SearchSpace, *, seed: int, members: int
) -> AccuracyPredictor:
    """Fit a predictor to made-up labels."""
    rng = np.random.default_rng(seed)
    genomes = space.sample(SAMPLE_COUNT, rng)
    sample = AccuracySample(
        genomes=genomes, accuracy=labels(space, genomes, rng), image_count=10_000
    )
    predictor, _ = fit_accuracy_predictor(space, sample, rng=rng, members=members)
    return predictor


def labels(
    space: SearchSpace, genomes: Genomes, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Accuracies `(n,)` that nobody measured."""
    work = np.array([lower(space, space.decode(row)).mac_count for row in genomes])
    features = one_hot(space, genomes)
    worth = features @ rng.normal(0, WORTH, features.shape[1])
    level = 0.80 - 0.15 * np.exp(-work / np.median(work))
    return np.asarray(level + worth + rng.normal(0, SPREAD, len(work)))
