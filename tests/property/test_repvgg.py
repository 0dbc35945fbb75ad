"""Branched convolutions: one set of branches, one convolution, the same outputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ofa_deploy.errors import SpaceError
from ofa_deploy.export.onnx import INPUT_NAME, OUTPUT_NAME, emit_network
from ofa_deploy.families import repvgg
from ofa_deploy.fuse import BATCH_NORM_EPS, BatchNorm, fuse, merge_branches
from ofa_deploy.layers import RepConvLayer
from ofa_deploy.materialise import materialise
from ofa_deploy.nn.static import FusedNet, StaticNet
from ofa_deploy.nn.supernet import new_supernet, sort_channels
from ofa_deploy.plan import lower
from ofa_deploy.recalibrate import recalibrate
from ofa_deploy.space import SearchSpace
from ofa_deploy.train.evaluate import recalibrate_supernet
from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu
from tests.support import tiny, tiny_torch
from tests.support.tiny_torch import arrays, inputs, relative_error


def tiny_space() -> SearchSpace:
    """Stride 2 and 1, narrower and equal middles, one and two blocks."""
    space = repvgg.small(class_count=3)
    return replace(
        space,
        name="tiny-repvgg",
        resolutions=(8, 12),
        stem=replace(space.stem, out_channels=8),
        stages=(
            repvgg.stage(16, depths=(1, 2), expands=(2, 4)),
            repvgg.stage(24, depths=(1,), expands=(2, 3, 4)),
        ),
    )


SPACE = tiny_space()
CONFIGS = tiny.random_configs(SPACE, 12)


# -- merging ---------------------------------------------------------------------------


def random_norm(channels: int, rng: np.random.Generator) -> BatchNorm:
    gamma, beta, mean = (rng.standard_normal(channels, dtype=np.float32) for _ in "gbm")
    variance = rng.uniform(0.1, 3, channels).astype(np.float32)
    return BatchNorm(gamma=gamma, beta=beta, mean=mean, variance=variance)


def apply_norm(x: Tensor, norm: BatchNorm) -> Tensor:
    gamma, beta, mean, variance = (
        torch.from_numpy(array).double()
        for array in (norm.gamma, norm.beta, norm.mean, norm.variance)
    )
    return F.batch_norm(x, mean, variance, gamma, beta, False, 0.1, BATCH_NORM_EPS)


@given(
    seed=st.integers(0, 2**16),
    stride=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 4]),
    size=st.integers(3, 9),
    wider=st.sampled_from([0.5, 1, 2]),
)
@settings(max_examples=60)
def test_one_convolution_gives_what_the_branches_give(
    seed: int, stride: int, groups: int, size: int, wider: float
) -> None:
    rng = np.random.default_rng(seed)
    channels, out = 8, int(8 * wider)
    dense = rng.standard_normal((out, channels // groups, 3, 3), dtype=np.float32)
    point = rng.standard_normal((out, channels // groups, 1, 1), dtype=np.float32)
    norms = [random_norm(out, rng) for _ in range(2)]
    # Of those of the first group, where later ones would be of another on each side.
    handed_on = min(channels, out) // (groups if wider != 1 else 1)
    identity = random_norm(handed_on, rng) if stride == 1 else None
    weight, bias = merge_branches(
        dense=(dense, norms[0]),
        point=(point, norms[1]),
        identity=identity,
        groups=groups,
    )
    x = torch.from_numpy(rng.standard_normal((2, channels, size, size)))

    def convolved(kernel: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Tensor:
        return F.conv2d(
            x,
            torch.from_numpy(kernel).double(),
            stride=stride,
            padding=kernel.shape[-1] // 2,
            groups=groups,
        )

    expected = apply_norm(convolved(dense), norms[0])
    expected = expected + apply_norm(convolved(point), norms[1])
    if identity is not None:
        expected[:, :handed_on] += apply_norm(x[:, :handed_on], identity)
    found = convolved(weight) + torch.from_numpy(bias).double()[:, None, None]
    # The weights are rounded to float32 at the end, and nothing before.
    assert relative_error(found, expected) < 1e-6


def test_branches_that_do_not_fit_are_refused() -> None:
    rng = np.random.default_rng(0)
    norm = random_norm(4, rng)
    dense = np.zeros((4, 4, 3, 3), dtype=np.float32)
    with pytest.raises(ValueError, match="give a 3×3 and a 1×1 kernel"):
        merge_branches(dense=(dense, norm), point=(dense, norm), identity=None)
    with pytest.raises(ValueError, match="identity branch has 9 channels"):
        merge_branches(
            dense=(dense, norm),
            point=(dense[..., :1, :1], norm),
            identity=random_norm(9, rng),
        )
    with pytest.raises(ValueError, match="in another group than the one that reads it"):
        merge_branches(
            dense=(dense[:, :2], norm),
            point=(dense[:, :2, :1, :1], norm),
            identity=random_norm(4, rng),
            groups=4,
        )


# -- P6: a network's two forms ---------------------------------------------------------


def trained(resolution: int = 32) -> StaticNet:
    """The largest network, with statistics that are not those of new norms."""
    space = replace(repvgg.small(), resolutions=(resolution,))
    torch.manual_seed(0)
    network = StaticNet(lower(space, space.largest()))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        for _ in range(20):
            network(inputs(resolution, count=16))
    return network.eval()


def test_the_fused_form_computes_what_the_trained_one_does() -> None:
    network = trained()
    fused = FusedNet(network.plan, fuse(network.weights(), network.plan)).eval()
    with torch.no_grad():
        x = inputs(32, count=8)
        assert relative_error(fused(x), network(x)) <= 1e-5


def test_the_largest_network_is_within_eighty_million_macs() -> None:
    space = repvgg.small()
    assert 7.5e7 < lower(space, space.largest()).mac_count <= 8e7


def test_weights_go_into_a_network_and_out_again() -> None:
    network = trained()
    copy = StaticNet(network.plan, network.weights()).eval()
    with torch.no_grad():
        assert torch.equal(copy(inputs(32)), network(inputs(32)))


# -- as a once-for-all space -----------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.id)
def test_a_part_of_the_supernet_is_a_network_of_its_own(config: object) -> None:
    network = tiny_torch.supernet(SPACE)
    plan = lower(SPACE, config)  # type: ignore[arg-type]
    static = StaticNet(plan, materialise(arrays(network), plan)).eval()
    with torch.no_grad():
        x = inputs(plan.resolution)
        assert relative_error(network(x, plan), static(x)) < 1e-6


@pytest.mark.parametrize("config", CONFIGS[:6], ids=lambda c: c.id)
def test_every_form_of_the_graph_computes_the_same(config: object) -> None:
    network = tiny_torch.supernet(SPACE)
    plan = lower(SPACE, config)  # type: ignore[arg-type]
    weights = materialise(arrays(network), plan)
    x = inputs(plan.resolution)
    with torch.no_grad():
        expected = network(x, plan).numpy()
    for form, tensors in (("unfused", weights), ("fused", fuse(weights, plan))):
        model = emit_network(plan, tensors, form=form, batch=None)  # type: ignore[arg-type]
        with OnnxRuntimeCpu(optimize=False).load(model, threads=1) as session:
            found = session.run({INPUT_NAME: x.numpy()})[OUTPUT_NAME]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS[:6], ids=lambda c: c.id)
def test_statistics_are_those_that_torch_collects(config: object) -> None:
    network = tiny_torch.supernet(SPACE)
    plan = lower(SPACE, config)  # type: ignore[arg-type]
    x = inputs(plan.resolution, count=16)
    found = recalibrate(
        materialise(arrays(network), plan),
        plan,
        x.numpy(),
        backend=OnnxRuntimeCpu(optimize=False),
        threads=1,
    )
    recalibrate_supernet(network, plan, [x])
    for name, array in materialise(arrays(network), plan).items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4)


def test_sorting_leaves_branched_blocks_as_they_are() -> None:
    network = new_supernet(SPACE)
    before = arrays(network)
    sort_channels(network, supported_expands=1)
    after = arrays(network)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_an_identity_branch_hands_on_what_both_sides_have() -> None:
    layer = RepConvLayer(
        name="x",
        in_channels=24,
        out_channels=16,
        stride=1,
        activation="relu",
        in_size=8,
    )
    assert layer.identity_channels == 16
    assert replace(layer, stride=2).identity_channels == 0
    assert "x.identity" not in replace(layer, stride=2).norms


def test_blocks_with_other_kernels_are_refused() -> None:
    stage = repvgg.stage(16, depths=(1,))
    with pytest.raises(SpaceError, match="repvgg blocks have 3×3"):
        replace(stage, kernels=(3, 5))
    with pytest.raises(SpaceError, match="repvgg blocks have 3×3"):
        replace(stage, squeeze_excite=True)
