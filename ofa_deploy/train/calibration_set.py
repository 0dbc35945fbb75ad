"""Calibration images that a trained network makes itself.

Images are optimised until the full network's batch-norm statistics on them match its
calibrated ones, with a small cross-entropy term so that all classes are there. Nobody
who specialises the supernet then needs its training images. After H. Yin et al.,
"Dreaming to Distill" (DeepInversion, CVPR 2020), and Y. Cai et al., "ZeroQ" (CVPR
2020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ofa_deploy.nn.elastic import ElasticBatchNorm
from ofa_deploy.nn.supernet import Supernet
from ofa_deploy.plan import lower
from ofa_deploy.preprocess import Normalisation
from ofa_deploy.train.augment import resize_bilinear
from ofa_deploy.train.evaluate import Statistics, apply_statistics

STEPS = 240
LEARNING_RATE = 0.05
CLASS_WEIGHT = 0.05
_EPS = 1e-3


def synthesise_images(
    supernet: Supernet,
    statistics: Mapping[int, Statistics],
    *,
    normalisation: Normalisation,
    count: int,
    seed: int,
    steps: int = STEPS,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.uint8]:
    """Images `(count, resolution, resolution, 3)` on which statistics match.

    Only the full network's statistics are matched: matching those of random parts of it
    as well was measured to be worse. They are matched at every resolution in turn, as
    images that suit the largest alone lose their fine noise, and with it their
    statistics, when they are resized.

    Args:
        supernet: Its running statistics are replaced.
        statistics: Means and variances of every batch norm of the largest network, at
            each resolution of the space; see `collect_statistics`.
        normalisation: Of its training images.
        count: How many; a multiple of the class count gives balanced classes.
        seed: Of the noise that the images start from.
        steps: Adam steps.
        progress: Called with (done, total).
    """
    largest = supernet.space.largest()
    plans = [
        lower(supernet.space, replace(largest, resolution=resolution))
        for resolution in sorted(statistics, reverse=True)
    ]
    supernet.eval()
    parameters = [p for p in supernet.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    images = _smooth_noise(count, largest.resolution, generator).requires_grad_(True)
    labels = torch.arange(count) % supernet.space.head.class_count
    low, high = _bounds(normalisation)
    optimizer = torch.optim.Adam([images], lr=LEARNING_RATE)
    with _StatisticsLoss(supernet) as distance:
        for step in range(steps):
            plan = plans[step % len(plans)]
            apply_statistics(supernet, statistics[plan.resolution])
            optimizer.zero_grad()
            distance.terms.clear()
            logits = supernet(resize_bilinear(images, plan.resolution), plan)
            matching = torch.stack(distance.terms).mean()
            loss = matching + CLASS_WEIGHT * F.cross_entropy(logits, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():  # only what eight bits can hold
                images.clamp_(low, high)
            if progress:
                progress(step + 1, steps)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return _to_uint8(images.detach(), normalisation)


class _StatisticsLoss:
    """Collects, per batch norm, how far a batch's statistics are from the stored."""

    def __init__(self, supernet: Supernet) -> None:
        self.terms: list[Tensor] = []
        self._norms = [m for m in supernet.modules() if isinstance(m, ElasticBatchNorm)]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _StatisticsLoss:
        self._handles = [n.register_forward_pre_hook(self._add) for n in self._norms]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not isinstance(module, ElasticBatchNorm):
            raise TypeError(f"{type(module).__name__} is not a batch norm")
        x = inputs[0]
        channels = x.shape[1]
        mean, variance = module.mean[:channels], module.variance[:channels]
        found_mean = x.mean((0, 2, 3))
        found_variance = x.var((0, 2, 3), unbiased=False)
        shift = (found_mean - mean) ** 2 / (variance + _EPS)
        # In logarithms, too small a variance counts as much as too large a one.
        spread = torch.log(found_variance + _EPS) - torch.log(variance + _EPS)
        self.terms.append(shift.mean() + (spread**2).mean())


def _smooth_noise(count: int, size: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(count, 3, size, size, generator=generator)
    smoothed = F.avg_pool2d(F.pad(noise, (1, 1, 1, 1), mode="reflect"), 3, 1)
    return smoothed * 2  # about unit variance again


def _bounds(normalisation: Normalisation) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(normalisation.mean).view(1, 3, 1, 1)
    std = torch.tensor(normalisation.std).view(1, 3, 1, 1)
    return -mean / std, (255 - mean) / std


def _to_uint8(images: Tensor, normalisation: Normalisation) -> NDArray[np.uint8]:
    mean = torch.tensor(normalisation.mean).view(1, 3, 1, 1)
    std = torch.tensor(normalisation.std).view(1, 3, 1, 1)
    grey = (images * std + mean).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(grey.permute(0, 2, 3, 1).numpy())
