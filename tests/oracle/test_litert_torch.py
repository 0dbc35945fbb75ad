"""The .tflite writer against the well-kept converter, on whole networks.

The converter needs 1.2 GB and ten seconds for each network, so this has an environment
of its own: `make oracle`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip(
    "litert_torch", reason="litert-torch (1.2 GB) is not installed; see `make oracle`"
)

import torch

from ofa_deploy.export import litert
from ofa_deploy.families import mbv3
from ofa_deploy.fuse import fuse
from ofa_deploy.materialise import materialise
from ofa_deploy.nn.litert_module import convert_module
from ofa_deploy.nn.static import StaticNet
from ofa_deploy.plan import lower
from ofa_deploy.space import SearchSpace, SubnetConfig
from profilers.backends.litert_cpu import LiteRtCpu
from tests.support import tiny
from tests.support.litert_models import operators

NETWORKS_PER_SPACE = 10
SPACES = (mbv3.small(), mbv3.imagenet(), mbv3.imagenet(width=1.2))


def networks() -> list[tuple[SearchSpace, SubnetConfig]]:
    rng = np.random.default_rng(2)
    return [
        (space, space.decode(genome))
        for space in SPACES
        for genome in space.sample(NETWORKS_PER_SPACE, rng)
    ]


def name(value: SearchSpace | SubnetConfig) -> str:
    return value.name if isinstance(value, SearchSpace) else value.id


@pytest.mark.parametrize(("space", "config"), networks(), ids=name)
def test_the_writer_agrees_with_the_converter(
    space: SearchSpace, config: SubnetConfig, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    plan = lower(space, config)
    weights = materialise(tiny.random_supernet_weights(space, rng), plan)
    size = plan.resolution
    own = litert.emit_network(plan, fuse(weights, plan))
    module = StaticNet(plan, weights)
    oracle = convert_module(module, input_shape=(1, 3, size, size), cache=tmp_path)

    image = rng.standard_normal((1, size, size, 3), dtype=np.float32)
    with LiteRtCpu().load(own, threads=1) as session:
        assert session.partition_count == 1
        found = session.run({"image": image})["logits"]
    with LiteRtCpu().load(oracle, threads=1) as session:
        expected = session.run({"image": image})["logits"]
    with torch.no_grad():
        channels_first = torch.from_numpy(image.transpose(0, 3, 1, 2)).double()
        exact = module.eval().double()(channels_first).numpy()
    scale = np.abs(exact).max()
    error, its_error = (np.abs(it - exact).max() / scale for it in (found, expected))
    # Both are sums of thousands of products in float32, each in an order of its own.
    assert its_error < 1e-4
    assert error < max(1e-5, its_error)

    count = Counter(operators(own))
    assert count["TRANSPOSE"] == 0
    assert count.total() <= len(operators(oracle))


def test_what_was_converted_once_is_not_converted_again(tmp_path: Path) -> None:
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4)
    )
    first = convert_module(module, input_shape=(1, 3, 8, 8), cache=tmp_path)
    (kept,) = tmp_path.iterdir()
    marked = first + b"\0"
    kept.write_bytes(marked)
    assert convert_module(module, input_shape=(1, 3, 8, 8), cache=tmp_path) == marked
    with torch.no_grad():
        module[0].get_parameter("bias").add_(1.0)
    assert convert_module(module, input_shape=(1, 3, 8, 8), cache=tmp_path) != marked
    assert len(list(tmp_path.iterdir())) == 2
