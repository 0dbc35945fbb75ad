"""The once-for-all MobileNetV3 family.

Source: H. Cai et al., "Once-for-All: Train One Network and Specialize it for Efficient
Deployment", ICLR 2020; geometry as in the authors' released networks.
"""

from __future__ import annotations

import math

from ofa_deploy.errors import SpaceError
from ofa_deploy.layers import (
    BlockPlan,
    ConvLayer,
    Layer,
    LayerActivation,
    SqueezeExciteLayer,
)
from ofa_deploy.space import (
    Activation,
    BlockConfig,
    HeadSpace,
    SearchSpace,
    StageSpace,
    StemSpace,
)

CHANNEL_DIVISOR = 8
_IMAGENET_WIDTHS = (16, 16, 24, 40, 80, 112, 160, 960, 1280)
# (stride, activation, squeeze-and-excite) of the five stages
_IMAGENET_STAGES: tuple[tuple[int, Activation, bool], ...] = (
    (2, "relu", False),
    (2, "relu", True),
    (2, "hswish", False),
    (1, "hswish", True),
    (2, "hswish", True),
)


def make_divisible(value: float, divisor: int = CHANNEL_DIVISOR) -> int:
    """Round to a multiple of `divisor`, never below 90 % of `value`."""
    rounded = max(divisor, math.floor((value + divisor / 2) / divisor) * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def middle_channels(in_channels: int, expand: int) -> int:
    """Width inside a block; it depends on the block's input, as published."""
    return make_divisible(round(in_channels * expand))


def imagenet(*, width: float = 1.0, class_count: int = 1000) -> SearchSpace:
    """The published geometry for 224×224 images; `width` is 1.0 or 1.2."""
    if width not in (1.0, 1.2):
        raise SpaceError(f"width={width} is not one of 1.0, 1.2")
    widths = [make_divisible(base * width) for base in _IMAGENET_WIDTHS]
    stages = tuple(
        StageSpace(
            out_channels=out_channels,
            stride=stride,
            kernels=(3, 5, 7),
            expands=(3, 4, 6),
            depths=(2, 3, 4),
            activation=activation,
            squeeze_excite=squeeze_excite,
        )
        for out_channels, (stride, activation, squeeze_excite) in zip(
            widths[2:7], _IMAGENET_STAGES, strict=True
        )
    )
    return SearchSpace(
        name=f"mbv3-imagenet-w{width}",
        resolutions=tuple(range(128, 225, 4)),
        stem=StemSpace(
            out_channels=widths[0],
            stride=2,
            activation="hswish",
            block_channels=widths[1],
        ),
        stages=stages,
        head=HeadSpace(
            expand_channels=widths[7],
            feature_channels=widths[8],
            activation="hswish",
            class_count=class_count,
        ),
    )


def small(*, class_count: int = 10) -> SearchSpace:
    """The geometry for 32×32 images: two dense stages, then a depthwise one.

    Dense convolutions train and run faster on CPUs where maps are large; on the
    smallest maps depthwise ones cost little. `benchmarks/small_geometry.py` compares it
    with others.
    """
    return SearchSpace(
        name="mbv3-small",
        resolutions=(24, 28, 32),
        stem=StemSpace(out_channels=32, stride=1, activation="hswish"),
        stages=(
            _dense_stage(64, depths=(1, 2)),
            _dense_stage(128, depths=(2, 3)),
            StageSpace(
                out_channels=192,
                stride=2,
                kernels=(3, 5, 7),
                expands=(2, 3, 4),
                depths=(2, 3),
                activation="hswish",
                squeeze_excite=True,
            ),
        ),
        head=HeadSpace(
            expand_channels=640,
            feature_channels=512,
            activation="hswish",
            class_count=class_count,
        ),
    )


def _dense_stage(out_channels: int, *, depths: tuple[int, ...]) -> StageSpace:
    return StageSpace(
        out_channels=out_channels,
        stride=2,
        kernels=(3,),
        expands=(1, 2, 3),
        depths=depths,
        activation="relu",
        squeeze_excite=False,
        block="fused_mbconv",
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
    """One inverted residual block with every size known."""
    middle = middle_channels(in_channels, config.expand)
    if stage.block == "fused_mbconv":
        layers = _dense_layers(
            name, stage, config, in_channels, middle, in_size, stride
        )
    else:
        layers = _depthwise_layers(
            name, stage, config, in_channels, middle, in_size, stride
        )
    size = layers[-1].out_size
    if stage.squeeze_excite:
        layers.append(squeeze_excite(f"{name}.se", middle, size))
    layers.append(pointwise(f"{name}.project", middle, stage.out_channels, size))
    return BlockPlan(
        name=name,
        in_channels=in_channels,
        out_channels=stage.out_channels,
        in_size=in_size,
        layers=tuple(layers),
        residual=stride == 1 and in_channels == stage.out_channels,
    )


def squeeze_excite(name: str, channels: int, size: int) -> SqueezeExciteLayer:
    """Squeeze-and-excite whose middle follows the active width."""
    return SqueezeExciteLayer(
        name=name,
        channels=channels,
        middle_channels=make_divisible(channels // 4),
        in_size=size,
    )


def pointwise(
    name: str,
    in_channels: int,
    out_channels: int,
    size: int,
    *,
    activation: LayerActivation = "none",
    batch_norm: bool = True,
) -> ConvLayer:
    """A 1×1 convolution."""
    return ConvLayer(
        name=name,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel=1,
        kernels=(1,),
        stride=1,
        depthwise=False,
        batch_norm=batch_norm,
        activation=activation,
        in_size=size,
    )


def _dense_layers(
    name: str,
    stage: StageSpace,
    config: BlockConfig,
    in_channels: int,
    middle: int,
    in_size: int,
    stride: int,
) -> list[Layer]:
    return [
        ConvLayer(
            name=f"{name}.expand",
            in_channels=in_channels,
            out_channels=middle,
            kernel=config.kernel,
            kernels=stage.kernels,
            stride=stride,
            depthwise=False,
            batch_norm=True,
            activation=stage.activation,
            in_size=in_size,
        )
    ]


def _depthwise_layers(
    name: str,
    stage: StageSpace,
    config: BlockConfig,
    in_channels: int,
    middle: int,
    in_size: int,
    stride: int,
) -> list[Layer]:
    depthwise = ConvLayer(
        name=f"{name}.depthwise",
        in_channels=middle,
        out_channels=middle,
        kernel=config.kernel,
        kernels=stage.kernels,
        stride=stride,
        depthwise=True,
        batch_norm=True,
        activation=stage.activation,
        in_size=in_size,
    )
    if config.expand == 1:  # nothing to expand: the published block 0
        if middle != in_channels:
            raise SpaceError(
                f"{name}: expand 1 of {in_channels} channels; that takes a multiple of "
                f"{CHANNEL_DIVISOR}. Give other widths, or only expands above 1"
            )
        return [depthwise]
    expand = pointwise(
        f"{name}.expand", in_channels, middle, in_size, activation=stage.activation
    )
    return [expand, depthwise]
