"""Batch-norm statistics of one network, from a statistics graph run by a runtime.

A supernet's running statistics are shared by all its networks and right for none, so
each network's are estimated anew from images, as the Once-for-All code does: every
batch norm normalises by its batch, and the batches' means and biased variances are
averaged.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.batches import in_batches, statistics_batch
from ofa_deploy.calibration import require_enough
from ofa_deploy.export.onnx import INPUT_NAME, emit_network
from ofa_deploy.layers import ConvLayer, Layer, RepConvLayer
from ofa_deploy.materialise import Weights
from ofa_deploy.plan import NetworkPlan
from profilers.backends.base import Backend


def recalibrate(
    weights: Weights,
    plan: NetworkPlan,
    inputs: NDArray[np.float32],
    *,
    backend: Backend,
    threads: int,
    batch_size: int | None = None,
) -> dict[str, NDArray[np.float32]]:
    """The same weights with statistics that fit this network.

    Args:
        weights: Unfused, as `materialise` gives them.
        plan: The network.
        inputs: Network inputs, `(N, 3, resolution, resolution)`, N at least 2.
        backend: Runs the statistics graph.
        threads: Of the runtime.
        batch_size: Images per pass; a last batch of one image joins the one before.
            None takes what fits into memory at the network's resolution.

    Raises:
        DataError: Fewer than two images.
    """
    require_enough(inputs)
    names = [
        f"{norm}.{part}"
        for layer in plan.layers
        for norm in norm_names(layer)
        for part in ("mean", "variance")
    ]
    model = emit_network(plan, weights, form="statistics", batch=None)
    sums = {name: np.zeros(0) for name in names}
    with backend.load(model, threads=threads) as session:
        shuffled = mixed(inputs)
        size = batch_size or statistics_batch(plan.resolution)
        for batch in (shuffled[part] for part in in_batches(len(shuffled), size)):
            outputs = session.run({INPUT_NAME: batch})
            for name in names:
                value = outputs[name].astype(np.float64) * len(batch)
                sums[name] = value if not sums[name].size else sums[name] + value
    result = dict(weights)
    for name, total in sums.items():
        layer_name, part = name.rsplit(".", 1)
        result[f"{layer_name}.norm.{part}"] = (total / len(inputs)).astype(np.float32)
    return result


def mixed(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Images in an order that has nothing to do with theirs; always the same.

    A batch's spread is taken around its own mean: of images in the order of their
    classes, as folders hold them, it would be that of one class.
    """
    return inputs[np.random.default_rng(0).permutation(len(inputs))]


def norm_names(layer: Layer) -> list[str]:
    """What the batch norms of a layer stand behind: itself, or its branches."""
    if isinstance(layer, RepConvLayer):
        return list(layer.norms)
    return [layer.name] if isinstance(layer, ConvLayer) and layer.batch_norm else []
