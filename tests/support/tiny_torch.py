"""The tiny supernet as a torch module."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ofa_deploy.nn.elastic import ElasticConv
from ofa_deploy.nn.supernet import Supernet
from ofa_deploy.space import SearchSpace
from tests.support import tiny


def supernet(space: SearchSpace = tiny.SPACE, *, seed: int = 3) -> Supernet:
    """With random weights, statistics and transforms, in eval mode."""
    weights = tiny.random_supernet_weights(space, np.random.default_rng(seed))
    built = Supernet(space)
    built.load_state_dict({n: torch.from_numpy(a) for n, a in weights.items()})
    return built.eval()


def arrays(network: Supernet) -> dict[str, tiny.Floats]:
    """Its tensors by name, as `materialise` takes them."""
    return {n: t.detach().numpy().copy() for n, t in network.state_dict().items()}


def inputs(resolution: int, *, count: int = 4, seed: int = 0) -> Tensor:
    """Random network inputs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, resolution, resolution, generator=generator)


def conv(network: Supernet, name: str) -> ElasticConv:
    """The convolution of a name."""
    found = network.get_submodule(name)
    assert isinstance(found, ElasticConv)
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())
