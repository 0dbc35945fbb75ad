"""The RepVGG family: trained as branches, run as a plain chain of 3×3 convolutions.

Source: X. Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021. Two
things are other than there, so that it is a once-for-all space as well: a block is two
convolutions, of which the first one's width is elastic while stages keep theirs, so
that a block's latency does not depend on its neighbours; and the identity branch of a
narrower layer hands on a prefix of the channels, like everything that is elastic.
"""

from __future__ import annotations

from ofa_deploy.families.mbv3 import make_divisible
from ofa_deploy.layers import BlockPlan, RepConvLayer
from ofa_deploy.space import (
    BlockConfig,
    HeadSpace,
    SearchSpace,
    StageSpace,
    StemSpace,
)

# Elastic widths are given in these parts of a block's output width.
PARTS = 4
# (width, depths) of the stages for 32×32 images.
_SMALL_STAGES = ((80, (1,)), (160, (1, 2)), (152, (1,)))


def small(*, class_count: int = 10) -> SearchSpace:
    """The geometry for 32×32 images; its largest network has 80 MMACs."""
    return SearchSpace(
        name="repvgg-small",
        resolutions=(24, 28, 32),
        stem=StemSpace(out_channels=32, stride=1, activation="relu"),
        stages=tuple(stage(width, depths=depths) for width, depths in _SMALL_STAGES),
        head=HeadSpace(
            expand_channels=None,
            feature_channels=None,
            activation="relu",
            class_count=class_count,
        ),
    )


def stage(
    out_channels: int,
    *,
    depths: tuple[int, ...],
    expands: tuple[int, ...] = (2, 3, 4),
    stride: int = 2,
) -> StageSpace:
    """A stage of blocks of two convolutions.

    Args:
        out_channels: Width of the blocks.
        depths: Allowed numbers of blocks, ascending.
        expands: Allowed widths between a block's convolutions, in quarters of
            `out_channels`, ascending.
        stride: Of the first convolution.
    """
    return StageSpace(
        out_channels=out_channels,
        stride=stride,
        kernels=(3,),
        expands=expands,
        depths=depths,
        activation="relu",
        squeeze_excite=False,
        block="repvgg",
    )


def lower_block(
    *,
    name: str,
    stage: StageSpace,
    config: BlockConfig,
    in_channels: int,
    in_size: int,
    stride: int,
) -> BlockPlan:
    """Two convolutions with every size known."""
    middle = make_divisible(stage.out_channels * config.expand / PARTS)
    first = RepConvLayer(
        name=f"{name}.first",
        in_channels=in_channels,
        out_channels=middle,
        stride=stride,
        activation=stage.activation,
        in_size=in_size,
    )
    second = RepConvLayer(
        name=f"{name}.second",
        in_channels=middle,
        out_channels=stage.out_channels,
        stride=1,
        activation=stage.activation,
        in_size=first.out_size,
    )
    return BlockPlan(
        name=name,
        in_channels=in_channels,
        out_channels=stage.out_channels,
        in_size=in_size,
        layers=(first, second),
        residual=False,
    )
