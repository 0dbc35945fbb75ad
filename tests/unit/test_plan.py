from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ofa_deploy.errors import SpaceError
from ofa_deploy.families import mbv3
from ofa_deploy.families.mbv3 import make_divisible
from ofa_deploy.layers import BlockPlan, ConvLayer, Layer, SqueezeExciteLayer
from ofa_deploy.materialise import materialise
from ofa_deploy.nn.static import StaticNet
from ofa_deploy.plan import NetworkPlan, all_blocks, lower
from ofa_deploy.space import SearchSpace, SubnetConfig
from tests.support import tiny

IMAGENET = mbv3.imagenet(width=1.0)
WIDER = mbv3.imagenet(width=1.2)
SPACES = (tiny.SPACE, mbv3.small(), IMAGENET, WIDER)


def largest_at(space: SearchSpace, resolution: int) -> NetworkPlan:
    config = space.largest()
    return lower(space, SubnetConfig(resolution=resolution, stages=config.stages))


def stage_blocks(plan: NetworkPlan) -> list[list[BlockPlan]]:
    """Blocks of each stage, without stem and head."""
    stages: dict[str, list[BlockPlan]] = {}
    for block in plan.blocks:
        if block.name.startswith("stage"):
            stages.setdefault(block.name.split(".")[0], []).append(block)
    return list(stages.values())


def conv(block: BlockPlan, part: str) -> ConvLayer:
    found = next(x for x in block.layers if x.name == f"{block.name}.{part}")
    assert isinstance(found, ConvLayer)
    return found


def gates(plan: NetworkPlan) -> Iterator[SqueezeExciteLayer]:
    return (layer for layer in plan.layers if isinstance(layer, SqueezeExciteLayer))


# -- rounding --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1, 8),
        (8, 8),
        (11, 16),  # 8 would be less than 90 % of 11
        (12, 16),  # halves go up
        (19.2, 24),  # 16 would be less than 90 % of 19.2
        (28.8, 32),
        (134.4, 136),
        (67, 64),
    ],
)
def test_widths_are_multiples_of_eight_near_the_value(
    value: float, rounded: int
) -> None:
    assert make_divisible(value) == rounded


# -- the published geometry ------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "widths"),
    [
        (IMAGENET, [16, 16, 24, 40, 80, 112, 160]),
        (WIDER, [24, 24, 32, 48, 96, 136, 192]),
    ],
    ids=["w1.0", "w1.2"],
)
def test_stem_and_stages_have_the_published_widths(
    space: SearchSpace, widths: list[int]
) -> None:
    plan = lower(space, space.largest())
    stages = [blocks[-1].out_channels for blocks in stage_blocks(plan)]
    assert [b.out_channels for b in plan.blocks[:2]] + stages == widths


@pytest.mark.parametrize(
    ("space", "widths"),
    [(IMAGENET, (960, 1280)), (WIDER, (1152, 1536))],
    ids=["w1.0", "w1.2"],
)
def test_the_head_has_the_published_widths(
    space: SearchSpace, widths: tuple[int, int]
) -> None:
    head = lower(space, space.largest()).blocks[-1]
    assert (conv(head, "expand").out_channels, conv(head, "mix").out_channels) == widths


# Of the first block of a stage and of the others, per expand ratio 3, 4, 6.
MIDDLES = [
    ((48, 64, 96), (72, 96, 144)),
    ((72, 96, 144), (120, 160, 240)),
    ((120, 160, 240), (240, 320, 480)),
    ((240, 320, 480), (336, 448, 672)),
    ((336, 448, 672), (480, 640, 960)),
]


@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("choice", range(3))
def test_middle_widths_are_the_published_ones(stage: int, choice: int) -> None:
    row = IMAGENET.encode(IMAGENET.largest())
    row[IMAGENET.first_slot_gene + 1 :: 2] = choice
    blocks = stage_blocks(lower(IMAGENET, IMAGENET.decode(row)))[stage]
    first, others = MIDDLES[stage]
    expected = [first[choice]] + [others[choice]] * 3
    assert [conv(b, "depthwise").out_channels for b in blocks] == expected


def test_gates_squeeze_to_a_quarter_of_the_active_width() -> None:
    found = {
        (gate.channels, gate.middle_channels)
        for config in (IMAGENET.largest(), IMAGENET.smallest())
        for gate in gates(lower(IMAGENET, config))
    }
    assert found == {
        (72, 24),  # 18 rounds to 16, which is less than 90 % of it
        (120, 32),
        (144, 40),
        (240, 64),
        (336, 88),
        (480, 120),
        (672, 168),
        (960, 240),
    }


def test_stages_shrink_the_image_as_published() -> None:
    plan = largest_at(IMAGENET, 224)
    sizes = [blocks[0].out_size for blocks in stage_blocks(plan)]
    assert (plan.blocks[0].out_size, sizes) == (112, [56, 28, 14, 14, 7])


def test_odd_sizes_are_halved_upwards() -> None:
    # 132 -> 66 -> 33 -> 17 -> 9 -> 9 -> 5
    plan = largest_at(IMAGENET, 132)
    sizes = [blocks[0].out_size for blocks in stage_blocks(plan)]
    assert (plan.blocks[0].out_size, sizes) == (66, [33, 17, 9, 9, 5])


def test_only_the_first_block_of_a_stage_has_its_stride() -> None:
    strides = [
        [conv(b, "depthwise").stride for b in blocks]
        for blocks in stage_blocks(largest_at(IMAGENET, 224))
    ]
    assert strides == [[first, 1, 1, 1] for first in (2, 2, 2, 1, 2)]


def test_activations_and_gates_are_the_published_ones() -> None:
    found = [
        (
            conv(blocks[0], "depthwise").activation,
            any(isinstance(x, SqueezeExciteLayer) for x in blocks[0].layers),
        )
        for blocks in stage_blocks(largest_at(IMAGENET, 224))
    ]
    assert found == [
        ("relu", False),
        ("relu", True),
        ("hswish", False),
        ("hswish", True),
        ("hswish", True),
    ]


def test_nothing_is_activated_after_a_block() -> None:
    blocks = [b for s in stage_blocks(largest_at(IMAGENET, 224)) for b in s]
    assert {conv(b, "project").activation for b in blocks} == {"none"}


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)
def test_a_shortcut_is_where_size_and_width_stay(space: SearchSpace) -> None:
    for config in tiny.random_configs(space, 10):
        for block in lower(space, config).blocks:
            inner = block.name.startswith("stage") or block.name == "stem_block"
            unchanged = (block.in_channels, block.in_size) == (
                block.out_channels,
                block.out_size,
            )
            # A stride of 2 keeps a size of 1.
            strided = any(
                isinstance(x, ConvLayer) and x.stride > 1 for x in block.layers
            )
            assert block.residual == (inner and unchanged and not strided)


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)
def test_each_block_takes_what_the_one_before_gives(space: SearchSpace) -> None:
    for config in tiny.random_configs(space, 10):
        for before, after in pairwise(lower(space, config).blocks):
            assert (before.out_channels, before.out_size) == (
                after.in_channels,
                after.in_size,
            )


def test_a_config_of_another_space_is_refused() -> None:
    with pytest.raises(SpaceError) as caught:
        lower(tiny.SPACE, mbv3.small().largest())
    assert str(caught.value) == "resolution=32 is not one of (8, 12) of space tiny"


# -- costs -----------------------------------------------------------------------------


def counted_by_hooks(plan: NetworkPlan) -> int:
    """Multiply-accumulates of every convolution and linear layer that really runs."""
    weights = materialise(
        tiny.random_supernet_weights_of(plan, np.random.default_rng(0)), plan
    )
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        places = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        total += module.weight.numel() * places

    network = StaticNet(plan, weights).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, 3, plan.resolution, plan.resolution))
    return total


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)
def test_counted_work_is_what_torch_does(space: SearchSpace) -> None:
    plan = lower(space, space.largest())
    assert plan.mac_count == counted_by_hooks(plan)


def test_counted_parameters_are_those_of_the_fused_network() -> None:
    plan = lower(tiny.SPACE, tiny.SPACE.largest())
    shapes = tiny.fused_shapes(plan)
    assert plan.parameter_count == sum(int(np.prod(shape)) for shape in shapes)


def pointwise(name: str, inputs: int, outputs: int, size: int) -> ConvLayer:
    return mbv3.pointwise(name, inputs, outputs, size)


def plan_of(*layers: Layer, in_channels: int, residual: bool) -> NetworkPlan:
    block = BlockPlan(
        name="block",
        in_channels=in_channels,
        out_channels=in_channels,
        in_size=4,
        layers=layers,
        residual=residual,
    )
    return NetworkPlan(
        space_name="by hand",
        name="by hand",
        resolution=4,
        blocks=(block,),
        class_count=3,
    )


def test_peak_memory_is_the_widest_input_and_output_together() -> None:
    layers = (pointwise("a", 2, 6, 4), pointwise("b", 6, 2, 4))
    plan = plan_of(*layers, in_channels=2, residual=False)
    assert plan.peak_activation_bytes == (2 + 6) * 16 * 4


def test_a_waiting_shortcut_adds_to_peak_memory() -> None:
    layers = (pointwise("a", 2, 6, 4), pointwise("b", 6, 2, 4))
    plan = plan_of(*layers, in_channels=2, residual=True)
    # The second layer runs while the block's input waits to be added.
    assert plan.peak_activation_bytes == (6 + 2 + 2) * 16 * 4


# -- blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)
def test_all_blocks_covers_every_network(space: SearchSpace) -> None:
    known = all_blocks(space)
    for config in tiny.random_configs(space, 100):
        for block in lower(space, config).blocks:
            assert block.key in known


def test_blocks_of_one_key_are_of_one_shape() -> None:
    known = all_blocks(tiny.SPACE)
    for config in tiny.random_configs(tiny.SPACE, 200):
        for block in lower(tiny.SPACE, config).blocks:
            twin = known[block.key]
            assert (block.mac_count, block.parameter_count, block.residual) == (
                twin.mac_count,
                twin.parameter_count,
                twin.residual,
            )
