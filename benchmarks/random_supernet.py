"""A supernet that nobody trained, for timing what does not depend on values."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.export.onnx import random_weights
from ofa_deploy.layers import ConvLayer
from ofa_deploy.plan import lower
from ofa_deploy.space import SearchSpace


def random_supernet_weights(
    space: SearchSpace, rng: np.random.Generator
) -> dict[str, NDArray[np.float32]]:
    """Weights as `materialise` takes them: with batch norms and kernel transforms."""
    layers = list(lower(space, space.largest()).layers)
    weights = random_weights(layers, rng=rng)
    for layer in layers:
        if not isinstance(layer, ConvLayer):
            continue
        for smaller, larger in pairwise(layer.kernels):
            matrix = np.eye(smaller**2, dtype=np.float32)
            weights[f"{layer.name}.transform_{larger}to{smaller}"] = matrix
        if layer.batch_norm:
            del weights[f"{layer.name}.bias"]
            channels = layer.out_channels
            norm = f"{layer.name}.norm"
            # Not 0 and 1: those would hide a mistake in folding them.
            weights[f"{norm}.gamma"] = rng.uniform(0.5, 1.5, channels).astype("f4")
            weights[f"{norm}.beta"] = rng.normal(0, 0.2, channels).astype("f4")
            weights[f"{norm}.mean"] = rng.normal(0, 0.2, channels).astype("f4")
            weights[f"{norm}.variance"] = rng.uniform(0.5, 2, channels).astype("f4")
    return weights
