"""The one lowering: which layers, of which sizes, a config means.

Everything that needs a layer's size reads a `NetworkPlan`: the torch builder, the ONNX
emitter, the cost counters, the work order and the predictors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ofa_deploy.families import mbv3, repvgg
from ofa_deploy.layers import (
    BlockPlan,
    Layer,
    LinearLayer,
    PoolLayer,
    RepConvLayer,
)
from ofa_deploy.space import BlockConfig, SearchSpace, StageSpace, SubnetConfig

IMAGE_CHANNELS = 3
BYTES_PER_FLOAT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkCost:
    """Sizes of a network.

    Args:
        mac_count: Multiply-accumulates of one image.
        parameter_count: Weights and biases once batch norms are folded.
        peak_activation_bytes: Most bytes of float32 activations alive at once.
    """

    mac_count: int
    parameter_count: int
    peak_activation_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPlan:
    """A network as blocks in sequence; the input is `(N, 3, resolution, resolution)`.

    Args:
        space_name: The space it comes from.
        name: The id of the config that it was lowered from; of a network that was made
            from one, such as by pruning, another.
        resolution: Height and width of the input.
        blocks: In order.
        class_count: Width of the output, `(N, class_count)` logits.
    """

    space_name: str
    name: str
    resolution: int
    blocks: tuple[BlockPlan, ...]
    class_count: int

    @property
    def config(self) -> SubnetConfig:
        """The config that it was lowered from.

        Raises:
            SpaceError: It was not.
        """
        return SubnetConfig.from_id(self.name)

    @property
    def layers(self) -> Iterator[Layer]:
        """All layers, in order."""
        return (layer for block in self.blocks for layer in block.layers)

    @property
    def mac_count(self) -> int:
        """Multiply-accumulates of one image: convolutions, gates and classifier."""
        return sum(block.mac_count for block in self.blocks)

    @property
    def parameter_count(self) -> int:
        """Weights and biases once batch norms are folded."""
        return sum(block.parameter_count for block in self.blocks)

    @property
    def peak_activation_bytes(self) -> int:
        """Most bytes of float32 activations alive at once."""
        peak = max(block.peak_activation_count for block in self.blocks)
        return peak * BYTES_PER_FLOAT

    @property
    def cost(self) -> NetworkCost:
        """Its sizes."""
        return NetworkCost(
            mac_count=self.mac_count,
            parameter_count=self.parameter_count,
            peak_activation_bytes=self.peak_activation_bytes,
        )


def lower(space: SearchSpace, config: SubnetConfig) -> NetworkPlan:
    """The plan of a config.

    Raises:
        SpaceError: The config is not in the space.
    """
    space.validate(config)
    blocks = _lower_stem(space, config.resolution)
    for index, (stage, block_configs) in enumerate(
        zip(space.stages, config.stages, strict=True)
    ):
        for place, block_config in enumerate(block_configs):
            previous = blocks[-1]
            lower_block = (
                repvgg.lower_block if stage.block == "repvgg" else mbv3.lower_block
            )
            block = lower_block(
                name=f"stage{index + 1}.block{place + 1}",
                stage=stage,
                config=block_config,
                in_channels=previous.out_channels,
                in_size=previous.out_size,
                stride=stage.stride if place == 0 else 1,
            )
            blocks.append(replace(block, stage=index + 1))
    blocks.append(_lower_head(space, blocks[-1]))
    return NetworkPlan(
        space_name=space.name,
        name=config.id,
        resolution=config.resolution,
        blocks=tuple(blocks),
        class_count=space.head.class_count,
    )


def _lower_stem(space: SearchSpace, resolution: int) -> list[BlockPlan]:
    stem = space.stem
    branched = RepConvLayer(
        name="stem.conv",
        in_channels=IMAGE_CHANNELS,
        out_channels=stem.out_channels,
        stride=stem.stride,
        activation=stem.activation,
        in_size=resolution,
    )
    conv = branched if space.stages[0].block == "repvgg" else branched.merged
    blocks = [
        BlockPlan(
            name="stem",
            in_channels=IMAGE_CHANNELS,
            out_channels=stem.out_channels,
            in_size=resolution,
            layers=(conv,),
            residual=False,
        )
    ]
    if stem.block_channels is not None:
        first = StageSpace(
            out_channels=stem.block_channels,
            stride=1,
            kernels=(3,),
            expands=(1,),
            depths=(1,),
            activation="relu",
            squeeze_excite=False,
        )
        blocks.append(
            mbv3.lower_block(
                name="stem_block",
                stage=first,
                config=BlockConfig(kernel=3, expand=1),
                in_channels=stem.out_channels,
                in_size=conv.out_size,
                stride=1,
            )
        )
    return blocks


def _lower_head(space: SearchSpace, last: BlockPlan) -> BlockPlan:
    head, channels, size = space.head, last.out_channels, last.out_size
    layers: list[Layer] = []
    if head.expand_channels is not None:
        layers.append(
            mbv3.pointwise(
                "head.expand",
                channels,
                head.expand_channels,
                size,
                activation=head.activation,
            )
        )
        channels = head.expand_channels
    layers.append(PoolLayer(name="head.pool", channels=channels, in_size=size))
    if head.feature_channels is not None:
        layers.append(
            mbv3.pointwise(
                "head.mix",
                channels,
                head.feature_channels,
                1,
                activation=head.activation,
                batch_norm=False,
            )
        )
        channels = head.feature_channels
    layers.append(
        LinearLayer(
            name="head.classifier",
            in_channels=channels,
            out_channels=head.class_count,
        )
    )
    return BlockPlan(
        name="head",
        in_channels=last.out_channels,
        out_channels=head.class_count,
        in_size=size,
        layers=tuple(layers),
        residual=False,
    )


def all_blocks(space: SearchSpace) -> dict[str, BlockPlan]:
    """Every block that any network of the space can hold, by key.

    A block's input width and size depend on its place and the resolution alone, never
    on other blocks' choices, so a pass over uniform networks finds them all.
    """
    found: dict[str, BlockPlan] = {}
    for resolution in space.resolutions:
        for config in _covering_configs(space, resolution):
            for block in lower(space, config).blocks:
                found.setdefault(block.key, block)
    return found


def _covering_configs(space: SearchSpace, resolution: int) -> Iterator[SubnetConfig]:
    """Networks whose blocks, together, take every choice at every place."""
    kernel_count = max(len(stage.kernels) for stage in space.stages)
    expand_count = max(len(stage.expands) for stage in space.stages)
    for kernel, expand in product(range(kernel_count), range(expand_count)):
        yield space.uniform(resolution, kernel_index=kernel, expand_index=expand)
