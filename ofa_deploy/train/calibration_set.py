"""Calibration images that a trained network makes itself.

Random shapes are optimised until the full network's batch-norm statistics on them match
its calibrated ones, with a small cross-entropy term so that all classes are there.
Nobody who specialises the supernet then needs its training images. After H. Yin et
al., "Dreaming to Distill" (DeepInversion, CVPR 2020), and Y. Cai et al., "ZeroQ" (CVPR
2020); both start from noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ofa_deploy.nn.elastic import ElasticBatchNorm
from ofa_deploy.nn.supernet import Supernet
from ofa_deploy.plan import NetworkPlan, lower
from ofa_deploy.preprocess import Normalisation
from ofa_deploy.train.augment import network_input, resize_bilinear
from ofa_deploy.train.dead_leaves import dead_leaves
from ofa_deploy.train.evaluate import Statistics, apply_statistics

STEPS = 300
LEARNING_RATE = 0.05
CLASS_WEIGHT = 0.05
# What noise left behind in the first layer's statistics cost the smallest network of
# `cifar10-small` 2.4 of its 3.5 lost points, more than all later layers together.
_FIRST_LAYER_WEIGHT = 4.0
_EPS = 1e-3
# Of images that are made together; but so many images may always be.
PIXELS_AT_A_TIME, ALWAYS_TOGETHER = 2_000_000, 50


def synthesise_images(
    supernet: Supernet,
    statistics: Mapping[int, Statistics],
    *,
    normalisation: Normalisation,
    count: int,
    seed: int,
    steps: int = STEPS,
    bf16: bool = False,
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
        seed: Of the shapes that the images start from.
        steps: Adam steps.
        bf16: Use bfloat16 autocast; worth it where the CPU has it.
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
    images = _first_images(count, largest.resolution, normalisation, seed=seed)
    labels = torch.arange(count) % supernet.space.head.class_count
    # Parts that are made at a time, each with the statistics of all.
    parts = -(-count // images_at_a_time(largest.resolution))
    made = []
    for part, (some, of_some) in enumerate(
        zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
    ):
        optimised = _optimised(
            supernet,
            plans,
            statistics,
            images=some,
            labels=of_some,
            bounds=_bounds(normalisation),
            steps=steps,
            bf16=bf16,
            progress=partial(_advance, progress, part * steps, parts * steps),
        )
        made.append(_to_uint8(optimised, normalisation))
    for parameter in parameters:
        parameter.requires_grad_(True)
    return np.concatenate(made)


def images_at_a_time(resolution: int) -> int:
    """How many images are made together at most: they pass the network at once.

    The largest network of the ImageNet space keeps some 100 MB for the backward pass
    of each image of 224 pixels.

    Args:
        resolution: Of the images.
    """
    return max(ALWAYS_TOGETHER, PIXELS_AT_A_TIME // resolution**2)


def _advance(
    progress: Callable[[int, int], None] | None, before: int, total: int, done: int
) -> None:
    if progress:
        progress(before + done, total)


def _optimised(
    supernet: Supernet,
    plans: Sequence[NetworkPlan],
    statistics: Mapping[int, Statistics],
    *,
    images: Tensor,
    labels: Tensor,
    bounds: tuple[Tensor, Tensor],
    steps: int,
    bf16: bool,
    progress: Callable[[int], None],
) -> Tensor:
    """Network inputs whose statistics match, made of these."""
    images = images.clone().requires_grad_(True)
    low, high = bounds
    optimizer = torch.optim.Adam([images], lr=LEARNING_RATE)
    with _StatisticsLoss(supernet) as distance:
        for step in range(steps):
            plan = plans[step % len(plans)]
            apply_statistics(supernet, statistics[plan.resolution])
            optimizer.zero_grad()
            distance.terms.clear()
            resized = resize_bilinear(images, plan.resolution)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                logits = supernet(resized, plan)
            loss = distance.mean() + CLASS_WEIGHT * F.cross_entropy(
                logits.float(), labels
            )
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():  # only what eight bits can hold
                images.clamp_(low, high)
            progress(step + 1)
    return images.detach()


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

    def mean(self) -> Tensor:
        """Over the batch norms that ran, the first one weighing more."""
        terms = torch.stack(self.terms)
        return (terms.sum() + (_FIRST_LAYER_WEIGHT - 1) * terms[0]) / len(terms)

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not isinstance(module, ElasticBatchNorm):
            raise TypeError(f"{type(module).__name__} is not a batch norm")
        x = inputs[0].float()
        channels = x.shape[1]
        mean, variance = module.mean[:channels], module.variance[:channels]
        found_mean = x.mean((0, 2, 3))
        found_variance = x.var((0, 2, 3), unbiased=False)
        shift = (found_mean - mean) ** 2 / (variance + _EPS)
        # In logarithms, too small a variance counts as much as too large a one.
        spread = torch.log(found_variance + _EPS) - torch.log(variance + _EPS)
        self.terms.append(shift.mean() + (spread**2).mean())


def _first_images(
    count: int, size: int, normalisation: Normalisation, *, seed: int
) -> Tensor:
    """What to optimise: network inputs of dead leaves."""
    leaves = dead_leaves(count, size, np.random.default_rng(seed))
    pixels = torch.from_numpy(leaves.transpose(0, 3, 1, 2).copy())
    return network_input(pixels, resolution=size, normalisation=normalisation)


def _bounds(normalisation: Normalisation) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(normalisation.mean).view(1, 3, 1, 1)
    std = torch.tensor(normalisation.std).view(1, 3, 1, 1)
    return -mean / std, (255 - mean) / std


def _to_uint8(images: Tensor, normalisation: Normalisation) -> NDArray[np.uint8]:
    mean = torch.tensor(normalisation.mean).view(1, 3, 1, 1)
    std = torch.tensor(normalisation.std).view(1, 3, 1, 1)
    grey = (images * std + mean).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(grey.permute(0, 2, 3, 1).numpy())
