"""Accuracy of sub-networks during training, in torch."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ofa_deploy.nn.elastic import ElasticBatchNorm
from ofa_deploy.nn.supernet import Supernet
from ofa_deploy.plan import NetworkPlan

Statistics = dict[str, Tensor]


@torch.no_grad()
def recalibrate_supernet(
    supernet: Supernet, plan: NetworkPlan, batches: Iterable[Tensor]
) -> None:
    """Set the running statistics of a plan's channels from images.

    Every batch norm normalises by its batch (biased variance); the statistics kept are
    the averages over batches, weighted by images. Channels outside the plan keep
    theirs. Source: the Once-for-All code's batch-norm reset.

    Args:
        supernet: Its buffers are changed in place; left in eval mode.
        plan: The sub-network.
        batches: Network inputs, each `(N, 3, resolution, resolution)`.
    """
    sums: dict[ElasticBatchNorm, tuple[Tensor, Tensor, int]] = {}

    def accumulate(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, ElasticBatchNorm)
        x = inputs[0].float()
        mean, count = x.mean((0, 2, 3)), len(x)
        variance = x.var((0, 2, 3), unbiased=False)
        if module in sums:
            old_mean, old_variance, old_count = sums[module]
            sums[module] = (
                old_mean + mean * count,
                old_variance + variance * count,
                old_count + count,
            )
        else:
            sums[module] = (mean * count, variance * count, count)

    before = {n: b.clone() for n, b in supernet.named_buffers()}
    norms = [m for m in supernet.modules() if isinstance(m, ElasticBatchNorm)]
    with ExitStack() as stack:
        for norm in norms:
            handle = norm.register_forward_pre_hook(accumulate)
            stack.callback(handle.remove)
        supernet.train()
        for batch in batches:
            supernet(batch, plan)
    supernet.eval()
    for name, buffer in supernet.named_buffers():
        buffer.copy_(before[name])
    for norm, (mean, variance, count) in sums.items():
        norm.mean[: len(mean)] = mean / count
        norm.variance[: len(mean)] = variance / count


def collect_statistics(supernet: Supernet) -> Statistics:
    """Copies of all running means and variances, by the names of `state_dict`."""
    return {name: buffer.clone() for name, buffer in supernet.named_buffers()}


@torch.no_grad()
def apply_statistics(supernet: Supernet, statistics: Statistics) -> None:
    """Replace all running means and variances."""
    for name, buffer in supernet.named_buffers():
        buffer.copy_(statistics[name])


@torch.no_grad()
def accuracy(
    supernet: Supernet,
    plan: NetworkPlan,
    batches: Iterable[tuple[Tensor, Tensor]],
) -> float:
    """Share of correct top-1 predictions, 0..1, with the running statistics as is.

    Args:
        supernet: Left in eval mode.
        plan: The sub-network.
        batches: Network inputs with their labels.
    """
    supernet.eval()
    correct = total = 0
    for inputs, labels in batches:
        correct += int((supernet(inputs, plan).argmax(1) == labels).sum())
        total += len(labels)
    return correct / total
