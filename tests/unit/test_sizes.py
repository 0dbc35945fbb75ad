"""Sizes by genes are those of the lowered networks, to the byte."""

from __future__ import annotations

import numpy as np
import pytest

from ofa_deploy.families import mbv3
from ofa_deploy.plan import lower
from ofa_deploy.predict.sizes import network_sizes
from ofa_deploy.search.exhaustive import enumerate_genomes
from ofa_deploy.space import Genomes, SearchSpace
from tests.support import tiny


def some_of(space: SearchSpace) -> Genomes:
    return space.sample(20, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("space", "genomes"),
    [
        (tiny.SPACE, enumerate_genomes(tiny.SPACE)),
        (mbv3.small(), some_of(mbv3.small())),
    ],
    ids=["all of a tiny space", "some of a real one"],
)
def test_sizes_are_those_of_the_lowered_network(
    space: SearchSpace, genomes: Genomes
) -> None:
    plans = [lower(space, space.decode(row)) for row in genomes]
    weights = np.array([4 * plan.parameter_count for plan in plans])
    peaks = np.array([plan.peak_activation_bytes for plan in plans])
    sizes = network_sizes(space)
    np.testing.assert_array_equal(sizes.weight_bytes(genomes), weights)
    np.testing.assert_array_equal(sizes.peak_activation_bytes(genomes), peaks)
    np.testing.assert_array_equal(sizes.memory_bytes(genomes), weights + peaks)
