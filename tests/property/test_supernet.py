"""Laws of the supernet; P1 to P10 are numbered as in the method's specification."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa_deploy.families import mbv3
from ofa_deploy.families.mbv3 import middle_channels
from ofa_deploy.layers import ConvLayer, LinearLayer, PoolLayer, SqueezeExciteLayer
from ofa_deploy.materialise import materialise
from ofa_deploy.nn.elastic import ElasticBatchNorm, ElasticConv
from ofa_deploy.nn.static import StaticNet
from ofa_deploy.nn.supernet import Supernet, new_supernet, sort_channels
from ofa_deploy.plan import NetworkPlan, lower
from ofa_deploy.space import SearchSpace, SubnetConfig
from ofa_deploy.train.evaluate import accuracy, recalibrate_supernet
from tests.support import tiny, tiny_torch
from tests.support.tiny_torch import arrays, conv, inputs, relative_error

LARGEST = lower(tiny.SPACE, tiny.SPACE.largest())
SMALLEST = lower(tiny.SPACE, tiny.SPACE.smallest())
CONFIGS = tiny.random_configs(tiny.SPACE, 24)
# Three expand ratios, so that two of them can be sorted inside.
THREE_RATIOS = replace(
    tiny.SPACE,
    stages=(
        tiny.SPACE.stages[0],
        replace(tiny.SPACE.stages[1], expands=(2, 3, 4)),
    ),
)


@torch.no_grad()
def logits(network: Supernet, plan: NetworkPlan) -> Tensor:
    result = network(inputs(plan.resolution), plan)
    assert isinstance(result, Tensor)
    return result


@torch.no_grad()
def static_logits(network: Supernet, plan: NetworkPlan) -> Tensor:
    static = StaticNet(plan, materialise(arrays(network), plan)).eval()
    result = static(inputs(plan.resolution))
    assert isinstance(result, Tensor)
    return result


# -- P1, P2: parts of the supernet are networks of their own ---------------------------


@pytest.mark.parametrize("space", [tiny.SPACE, mbv3.small()], ids=lambda s: s.name)
def test_the_largest_part_equals_the_plain_network_bit_for_bit(
    space: SearchSpace,
) -> None:
    network = tiny_torch.supernet(space)
    plan = lower(space, space.largest())
    assert torch.equal(logits(network, plan), static_logits(network, plan))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.id)
def test_every_part_equals_the_plain_network(config: SubnetConfig) -> None:
    network = tiny_torch.supernet()
    plan = lower(tiny.SPACE, config)
    calibration = inputs(plan.resolution, count=16, seed=1)
    recalibrate_supernet(network, plan, [calibration])
    found, expected = logits(network, plan), static_logits(network, plan)
    assert relative_error(found, expected) <= 1e-5


def test_a_part_is_the_same_whatever_was_called_before() -> None:
    network = tiny_torch.supernet()
    fresh = {config: logits(network, lower(tiny.SPACE, config)) for config in CONFIGS}
    for config in reversed(CONFIGS):
        assert torch.equal(logits(network, lower(tiny.SPACE, config)), fresh[config])


def test_evaluating_changes_no_tensor() -> None:
    network = tiny_torch.supernet()
    before = arrays(network)
    for config in CONFIGS:
        logits(network, lower(tiny.SPACE, config))
    after = arrays(network)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_changing_materialised_weights_does_not_touch_the_supernet() -> None:
    stored = tiny.random_supernet_weights(tiny.SPACE, np.random.default_rng(0))
    before = {name: array.copy() for name, array in stored.items()}
    static = StaticNet(SMALLEST, materialise(stored, SMALLEST))
    with torch.no_grad():
        for parameter in static.parameters():
            parameter.zero_()
    assert all(np.array_equal(before[name], stored[name]) for name in before)


def test_a_new_supernet_has_identity_transforms() -> None:
    depthwise = conv(new_supernet(tiny.SPACE), "stage2.block1.depthwise")
    assert torch.equal(depthwise.get_parameter("transform_7to5"), torch.eye(25))
    assert torch.equal(depthwise.get_parameter("transform_5to3"), torch.eye(9))


def test_the_supernet_holds_exactly_what_files_hold() -> None:
    names = tiny.random_supernet_weights(tiny.SPACE, np.random.default_rng(0)).keys()
    assert new_supernet(tiny.SPACE).state_dict().keys() == names


# -- P3, P4: sorting channels ----------------------------------------------------------


def importance(network: Supernet, block: str) -> Tensor:
    weight = conv(network, f"{block}.project").weight.detach()
    return weight.abs().sum((0, 2, 3))


def stage_block_names(space: SearchSpace) -> list[str]:
    plan = lower(space, space.largest())
    return [b.name for b in plan.blocks if b.name.startswith("stage")]


def test_sorting_does_not_change_the_largest_network() -> None:
    network = tiny_torch.supernet()
    before = logits(network, LARGEST)
    sort_channels(network, supported_expands=1)
    assert relative_error(logits(network, LARGEST), before) <= 1e-5


@pytest.mark.parametrize("block", stage_block_names(tiny.SPACE))
def test_sorting_puts_important_channels_first(block: str) -> None:
    network = tiny_torch.supernet()
    sort_channels(network, supported_expands=1)
    sorted_importance = importance(network, block)
    assert (sorted_importance.diff() <= 0).all()


def test_sorting_leaves_blocks_without_an_expansion_alone() -> None:
    # Their middle channels are the stage's input, whose order others read as well.
    stage = replace(tiny.SPACE.stages[-1], block="mbconv", expands=(1,))
    space = replace(tiny.SPACE, stages=(stage,) * 11)
    network = new_supernet(space)
    plan = lower(space, space.largest())
    before = logits(network, plan)
    sort_channels(network, supported_expands=1)
    torch.testing.assert_close(logits(network, plan), before)


def test_sorting_leaves_the_stem_alone() -> None:
    network = tiny_torch.supernet()
    before = arrays(network)
    sort_channels(network, supported_expands=1)
    after = arrays(network)
    stem = [name for name in before if name.startswith(("stem", "head"))]
    assert all(np.array_equal(before[name], after[name]) for name in stem)


@pytest.mark.parametrize("supported", [2, 3])
def test_sorting_keeps_the_channels_of_every_trained_width(supported: int) -> None:
    network = tiny_torch.supernet(THREE_RATIOS)
    before = importance(network, "stage2.block2")
    sort_channels(network, supported_expands=supported)
    after = importance(network, "stage2.block2")
    for expand in THREE_RATIOS.stages[1].expands[::-1][:supported]:
        width = middle_channels(24, expand)
        assert torch.equal(before[:width].sort().values, after[:width].sort().values)


@pytest.mark.parametrize("supported", [1, 2, 3])
def test_sorting_does_not_change_networks_of_trained_widths(supported: int) -> None:
    # Without gates: their middle is sorted whole, which no narrower prefix survives.
    plain = tuple(replace(s, squeeze_excite=False) for s in THREE_RATIOS.stages)
    space = replace(THREE_RATIOS, stages=plain)
    network = tiny_torch.supernet(space)
    gene = space.encode(space.largest())
    expands = slice(space.first_slot_gene + 1, None, 2)
    counts = space.choice_counts[expands]
    gene[expands] = counts - np.minimum(supported, counts)
    plan = lower(space, space.decode(gene))
    before = logits(network, plan)
    sort_channels(network, supported_expands=supported)
    assert relative_error(logits(network, plan), before) <= 1e-5


def test_sorting_keeps_networks_that_expand_nothing() -> None:
    """Their middle channels are the input's, as which they were trained."""
    stage = replace(
        tiny.SPACE.stages[-1], block="mbconv", expands=(1, 2), squeeze_excite=False
    )
    space = replace(tiny.SPACE, stages=(stage, stage))
    network = tiny_torch.supernet(space)
    plans = [lower(space, config) for config in (space.largest(), space.smallest())]
    before = [logits(network, plan) for plan in plans]
    sort_channels(network, supported_expands=2)
    for plan, expected in zip(plans, before, strict=True):
        assert relative_error(logits(network, plan), expected) <= 1e-5


def test_sorting_puts_important_units_of_a_gate_first() -> None:
    network = tiny_torch.supernet()
    sort_channels(network, supported_expands=1)
    expand = network.get_submodule("stage2.block1.se.expand")
    assert isinstance(expand, nn.Conv2d)
    units = expand.weight.detach().abs().sum((0, 2, 3))
    assert (units.diff() <= 0).all()


# -- P5: kernel transforms -------------------------------------------------------------


def depthwise_layer(kernel: int) -> ConvLayer:
    layer = next(x for x in LARGEST.layers if x.name == "stage2.block1.depthwise")
    assert isinstance(layer, ConvLayer)
    return replace(layer, kernel=kernel)


@pytest.mark.parametrize(("kernel", "border"), [(7, 0), (5, 1), (3, 2)])
def test_with_identity_transforms_a_smaller_kernel_is_the_centre(
    kernel: int, border: int
) -> None:
    elastic = ElasticConv(depthwise_layer(7))
    active = elastic.active_weight(depthwise_layer(kernel))
    centre = elastic.weight[..., border : 7 - border, border : 7 - border]
    assert torch.equal(active, centre)


def test_transforms_are_chained_from_seven_to_five_to_three() -> None:
    elastic = conv(tiny_torch.supernet(), "stage2.block1.depthwise")
    to_five = elastic.get_parameter("transform_7to5")
    to_three = elastic.get_parameter("transform_5to3")
    expected = []
    for channel in elastic.weight.detach()[:, 0]:
        five = (to_five @ channel[1:6, 1:6].reshape(25)).reshape(5, 5)
        expected.append((to_three @ five[1:4, 1:4].reshape(9)).reshape(1, 3, 3))
    found = elastic.active_weight(depthwise_layer(3))
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize(
    ("kernel", "reached"),
    [
        (7, set()),
        (5, {"transform_7to5"}),
        (3, {"transform_7to5", "transform_5to3"}),
    ],
)
def test_gradients_reach_exactly_the_transforms_in_the_chain(
    kernel: int, reached: set[str]
) -> None:
    elastic = conv(tiny_torch.supernet(), "stage2.block1.depthwise")
    loss = elastic.active_weight(depthwise_layer(kernel)).square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    found = {
        name
        for name, parameter in elastic.named_parameters()
        if name.startswith("transform") and parameter.grad is not None
    }
    assert found == reached


# -- P6: gradients stay inside the part ------------------------------------------------


def active_masks(plan: NetworkPlan) -> dict[str, tuple[slice, ...]]:
    """Of each tensor that a plan reads, the part that it reads."""
    masks: dict[str, tuple[slice, ...]] = {}
    for layer in plan.layers:
        if isinstance(layer, PoolLayer):
            continue
        if isinstance(layer, LinearLayer):
            masks[f"{layer.name}.weight"] = masks[f"{layer.name}.bias"] = ()
        elif isinstance(layer, SqueezeExciteLayer):
            channels, middle = slice(layer.channels), slice(layer.middle_channels)
            masks[f"{layer.name}.reduce.weight"] = (middle, channels)
            masks[f"{layer.name}.reduce.bias"] = (middle,)
            masks[f"{layer.name}.expand.weight"] = (channels, middle)
            masks[f"{layer.name}.expand.bias"] = (channels,)
        else:
            assert isinstance(layer, ConvLayer)
            border = (layer.kernels[-1] - layer.kernel) // 2
            # 7 -> 5 -> 3 reads the whole centre of 5, whatever comes after.
            border = min(border, 1)
            inner = slice(border, layer.kernels[-1] - border)
            out, inputs_read = layer.weight_shape[:2]
            masks[f"{layer.name}.weight"] = (
                slice(out),
                slice(inputs_read),
                inner,
                inner,
            )
            for name in ("gamma", "beta"):
                masks[f"{layer.name}.norm.{name}"] = (slice(out),)
            for larger, smaller in ((7, 5), (5, 3)):
                if layer.kernel <= smaller and larger in layer.kernels:
                    masks[f"{layer.name}.transform_{larger}to{smaller}"] = ()
    return masks


@pytest.mark.parametrize("config", CONFIGS[:8], ids=lambda c: c.id)
def test_gradients_are_zero_outside_the_part(config: SubnetConfig) -> None:
    network = tiny_torch.supernet().train()
    plan = lower(tiny.SPACE, config)
    network(inputs(plan.resolution), plan).square().sum().backward()
    masks = active_masks(plan)
    for name, parameter in network.named_parameters():
        if parameter.grad is None:
            continue
        outside = parameter.grad.clone()
        assert name in masks, f"{name} has a gradient and is not in the plan"
        outside[masks[name]] = 0
        assert not outside.any(), name


@pytest.mark.parametrize("config", CONFIGS[:8], ids=lambda c: c.id)
def test_gradients_reach_every_tensor_of_the_part(config: SubnetConfig) -> None:
    network = tiny_torch.supernet().train()
    plan = lower(tiny.SPACE, config)
    network(inputs(plan.resolution), plan).square().sum().backward()
    reached = {n for n, p in network.named_parameters() if p.grad is not None}
    named = {n for n, _ in network.named_parameters()}
    assert reached == active_masks(plan).keys() & named


# -- P7: recalibration -----------------------------------------------------------------


def first_norm(network: Supernet) -> ElasticBatchNorm:
    norm = conv(network, "stem.conv").norm
    assert norm is not None
    return norm


def stem_outputs(network: Supernet, images: Tensor) -> Tensor:
    weight = conv(network, "stem.conv").weight.detach()
    return F.conv2d(images, weight, padding=1)


def test_recalibrated_statistics_are_mean_and_biased_variance_of_the_batch() -> None:
    network = tiny_torch.supernet()
    images = inputs(12, count=8, seed=5)
    recalibrate_supernet(network, LARGEST, [images])
    values = stem_outputs(network, images).transpose(0, 1).flatten(1)
    norm = first_norm(network)
    torch.testing.assert_close(norm.mean, values.mean(1))
    torch.testing.assert_close(norm.variance, values.var(1, unbiased=False))


def test_statistics_of_batches_are_averaged_by_their_images() -> None:
    network = tiny_torch.supernet()
    batches = [inputs(12, count=6, seed=5), inputs(12, count=2, seed=6)]
    recalibrate_supernet(network, LARGEST, batches)
    expected = sum(
        len(batch) / 8 * stem_outputs(network, batch).mean((0, 2, 3))
        for batch in batches
    )
    torch.testing.assert_close(first_norm(network).mean, expected)


def test_recalibration_leaves_channels_outside_the_part_alone() -> None:
    network = tiny_torch.supernet()
    before = arrays(network)
    recalibrate_supernet(network, SMALLEST, [inputs(8, count=8)])
    after = arrays(network)
    used = {
        f"{layer.name}.norm": layer.out_channels
        for layer in SMALLEST.layers
        if isinstance(layer, ConvLayer)
    }
    for name, array in before.items():
        prefix, _, tensor = name.rpartition(".")
        kept = used.get(prefix, 0) if tensor in ("mean", "variance") else 0
        assert np.array_equal(array[kept:], after[name][kept:]), name


def test_recalibration_repeats() -> None:
    network = tiny_torch.supernet()
    batch = inputs(8, count=8)
    recalibrate_supernet(network, SMALLEST, [batch])
    once = arrays(network)
    recalibrate_supernet(network, SMALLEST, [batch])
    twice = arrays(network)
    assert all(np.array_equal(once[name], twice[name]) for name in once)


def test_recalibrating_another_part_first_makes_no_difference() -> None:
    direct, detour = tiny_torch.supernet(), tiny_torch.supernet()
    recalibrate_supernet(detour, LARGEST, [inputs(12, count=8)])
    for network in (direct, detour):
        recalibrate_supernet(network, SMALLEST, [inputs(8, count=8)])
    assert torch.equal(logits(direct, SMALLEST), logits(detour, SMALLEST))


def test_accuracy_is_the_share_of_right_answers() -> None:
    network = tiny_torch.supernet()
    answers = logits(network, LARGEST).argmax(1)
    wrong = (answers + 1) % 3
    labels = torch.cat([answers[:3], wrong[3:]])
    assert accuracy(network, LARGEST, [(inputs(12), labels)]) == 0.75


# -- P10: gradients of several parts ---------------------------------------------------


def gradients(network: Supernet, plans: list[NetworkPlan]) -> dict[str, Tensor]:
    network.zero_grad(set_to_none=True)
    for plan in plans:
        network(inputs(plan.resolution), plan).square().sum().backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in network.named_parameters()
    }


def test_gradients_of_several_parts_add_up() -> None:
    network = tiny_torch.supernet()
    plans = [lower(tiny.SPACE, config) for config in CONFIGS[:4]]
    together = gradients(network, plans)
    alone = [gradients(network, [plan]) for plan in plans]
    for name, gradient in together.items():
        expected = torch.stack([one[name] for one in alone]).sum(0)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
