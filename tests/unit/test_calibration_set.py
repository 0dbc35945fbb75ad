"""Images that a network makes itself, and the shapes that they start from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ofa_deploy.nn.supernet import Supernet
from ofa_deploy.plan import lower
from ofa_deploy.preprocess import Normalisation
from ofa_deploy.train import calibration_set
from ofa_deploy.train.augment import network_input
from ofa_deploy.train.calibration_set import synthesise_images
from ofa_deploy.train.dead_leaves import dead_leaves
from ofa_deploy.train.evaluate import (
    Statistics,
    collect_statistics,
    recalibrate_supernet,
)
from tests.support import tiny, tiny_torch

Images = NDArray[np.uint8]
NORMALISATION = Normalisation(mean=(120.0, 110.0, 100.0), std=(60.0, 50.0, 70.0))


def test_dead_leaves_have_the_spectrum_of_photographs() -> None:
    """Power falls with about the square of the frequency; that of noise is flat."""
    images = dead_leaves(100, 32, np.random.default_rng(0)).astype(float)
    centred = images - images.mean((1, 2), keepdims=True)
    power = (np.abs(np.fft.fft2(centred, axes=(1, 2))) ** 2).mean((0, 3))
    frequency = np.arange(1, 13)
    for line in (power[0, 1:13], power[1:13, 0]):
        slope = np.polyfit(np.log(frequency), np.log(line), 1)[0]
        assert -2.6 < slope < -1.5


def test_dead_leaves_differ_from_each_other_and_are_reproducible() -> None:
    images = dead_leaves(6, 12, np.random.default_rng(4))
    assert images.shape == (6, 12, 12, 3)
    assert images.dtype == np.uint8
    assert len(np.unique(images.reshape(6, -1), axis=0)) == 6
    assert np.array_equal(images, dead_leaves(6, 12, np.random.default_rng(4)))


def statistics_on(network: Supernet, images: Images, resolution: int) -> Statistics:
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    batch = network_input(pixels, resolution=resolution, normalisation=NORMALISATION)
    config = replace(tiny.SPACE.largest(), resolution=resolution)
    recalibrate_supernet(network, lower(tiny.SPACE, config), [batch])
    return collect_statistics(network)


def distance(found: Statistics, wanted: Statistics) -> float:
    """Mean over all channels of how far means, in standard deviations, are apart."""
    parts: list[Tensor] = [
        (found[name] - wanted[name]).abs() / wanted[_variance(name)].sqrt()
        for name in wanted
        if name.endswith("mean")
    ]
    return float(torch.cat(parts).mean())


def _variance(mean: str) -> str:
    return f"{mean.removesuffix('mean')}variance"


@pytest.fixture(scope="module")
def targets() -> dict[int, Statistics]:
    """Statistics of images darker and smoother than what the search starts from."""
    rng = np.random.default_rng(5)
    coarse = rng.integers(0, 120, (40, 4, 4, 3))
    images = coarse.repeat(3, 1).repeat(3, 2).astype(np.uint8)
    network = tiny_torch.supernet()
    return {r: statistics_on(network, images, r) for r in tiny.SPACE.resolutions}


def synthesised(targets: dict[int, Statistics], *, steps: int, bf16: bool) -> Images:
    return synthesise_images(
        tiny_torch.supernet(),
        targets,
        normalisation=NORMALISATION,
        count=16,
        seed=2,
        steps=steps,
        bf16=bf16,
    )


@pytest.mark.parametrize("bf16", [False, True])
def test_statistics_on_synthesised_images_come_closer(
    targets: dict[int, Statistics], bf16: bool
) -> None:
    first = synthesised(targets, steps=0, bf16=bf16)
    last = synthesised(targets, steps=60, bf16=bf16)
    network = tiny_torch.supernet()
    for resolution, wanted in targets.items():
        before = distance(statistics_on(network, first, resolution), wanted)
        after = distance(statistics_on(network, last, resolution), wanted)
        assert after < 0.75 * before, resolution


def test_the_same_seed_gives_the_same_images(targets: dict[int, Statistics]) -> None:
    one = synthesised(targets, steps=3, bf16=False)
    assert np.array_equal(one, synthesised(targets, steps=3, bf16=False))
    assert one.shape == (16, 12, 12, 3)
    assert one.dtype == np.uint8


def test_images_are_made_in_parts_where_all_would_not_fit(
    targets: dict[int, Statistics], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_set, "PIXELS_AT_A_TIME", 0)
    monkeypatch.setattr(calibration_set, "ALWAYS_TOGETHER", 6)
    told: list[tuple[int, int]] = []
    network, count, steps = tiny_torch.supernet(), 16, 40
    images = synthesise_images(
        network,
        targets,
        normalisation=NORMALISATION,
        count=count,
        seed=2,
        steps=steps,
        progress=lambda done, total: told.append((done, total)),
    )
    assert len(images) == count
    assert told == [(done, 3 * steps) for done in range(1, 3 * steps + 1)]
    first = synthesised(targets, steps=0, bf16=False)
    for resolution, wanted in targets.items():
        before = distance(statistics_on(network, first, resolution), wanted)
        after = distance(statistics_on(network, images, resolution), wanted)
        assert after < before, resolution


def test_synthesising_leaves_the_weights_trainable_as_they_were(
    targets: dict[int, Statistics],
) -> None:
    network = tiny_torch.supernet()
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    frozen = next(iter(network.parameters()))
    frozen.requires_grad_(False)
    synthesise_images(
        network, targets, normalisation=NORMALISATION, count=4, seed=0, steps=2
    )
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.requires_grad == (parameter is not frozen), name
