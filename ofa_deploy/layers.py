"""What a plan is made of: layers with all their sizes known.

A layer names the stored supernet tensors it is cut from (`name`) and how large the cut
is; nothing else in the product decides a size. Spatial sizes are square, in pixels; a
`Window` goes over any map, as networks that have no plan need it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayerActivation = Literal["none", "relu", "hswish"]
# Height and width.
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How a convolution goes over a map of any height and width.

    Args:
        kernel: Places that it reads.
        stride: Places that it moves by.
        dilation: Between two places that it reads, 1 for neighbours.
        pads: Rows and columns of zeros: above, left, below, right.
    """

    kernel: Pair
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def extent(self) -> Pair:
        """Rows and columns from the first place that it reads to the last."""
        height, width = (
            dilation * (kernel - 1) + 1
            for kernel, dilation in zip(self.kernel, self.dilation, strict=True)
        )
        return height, width

    def out_size(self, in_size: Pair) -> Pair:
        """Height and width of what it writes of such a map."""
        height, width = (
            (size + self.pads[axis] + self.pads[axis + 2] - extent) // stride + 1
            for axis, (size, extent, stride) in enumerate(
                zip(in_size, self.extent, self.stride, strict=True)
            )
        )
        return height, width


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvLayer:
    """A convolution with the batch norm (or bias) and activation behind it.

    Args:
        name: Prefix of its stored tensors.
        in_channels: Width of its input; a prefix of the stored one.
        out_channels: Width of its output; a prefix of the stored one.
        kernel: Active kernel size; padding is `kernel // 2`.
        kernels: All kernel sizes the stored weight serves, ascending; the last one is
            the stored size. Smaller ones are reached by the chained transforms.
        stride: 1 or 2.
        depthwise: Whether each channel is filtered alone (then in == out channels).
        batch_norm: Whether batch norm follows. Without one there is no bias either.
        activation: What follows.
        in_size: Height and width of the input.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    kernels: tuple[int, ...]
    stride: int
    depthwise: bool
    batch_norm: bool
    activation: LayerActivation
    in_size: int

    @property
    def groups(self) -> int:
        """Convolution groups."""
        return self.out_channels if self.depthwise else 1

    @property
    def out_size(self) -> int:
        """Height and width of the output."""
        return (self.in_size - 1) // self.stride + 1

    @property
    def window(self) -> Window:
        """How it goes over its input."""
        border = self.kernel // 2
        return Window(
            kernel=(self.kernel, self.kernel),
            stride=(self.stride, self.stride),
            pads=(border, border, border, border),
        )

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the active weight, `(out, in / groups, kernel, kernel)`."""
        inputs = 1 if self.depthwise else self.in_channels
        return (self.out_channels, inputs, self.kernel, self.kernel)

    @property
    def mac_count(self) -> int:
        """Multiply-accumulates of one image."""
        out, inputs, height, width = self.weight_shape
        return out * inputs * height * width * self.out_size**2

    @property
    def parameter_count(self) -> int:
        """Weights, and the biases that a folded batch norm leaves."""
        out, inputs, height, width = self.weight_shape
        return out * inputs * height * width + (out if self.batch_norm else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RepConvLayer:
    """A 3×3 convolution that is trained as the sum of branches, and run as one.

    The branches, each with a batch norm of its own: a 3×3 convolution, a 1×1
    convolution, and the input itself where its size is kept. Of input and output of
    different widths the narrower one's channels are handed on.

    Source: X. Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021,
    section 3.2.

    Args:
        name: Prefix of its stored tensors.
        in_channels: Width of its input.
        out_channels: Width of its output.
        stride: 1 or 2.
        activation: What follows the sum.
        in_size: Height and width of the input.
    """

    name: str
    in_channels: int
    out_channels: int
    stride: int
    activation: LayerActivation
    in_size: int

    @property
    def branches(self) -> tuple[ConvLayer, ConvLayer]:
        """The 3×3 and the 1×1 convolution."""
        return self._branch("dense", kernel=3), self._branch("point", kernel=1)

    @property
    def identity_channels(self) -> int:
        """Channels that the identity branch hands on; 0 for no such branch."""
        narrower = min(self.in_channels, self.out_channels)
        return narrower if self.stride == 1 else 0

    @property
    def identity_name(self) -> str:
        """Prefix of the identity branch's tensors."""
        return f"{self.name}.identity"

    @property
    def norms(self) -> dict[str, int]:
        """Channels of each branch's batch norm, by the branch's name."""
        found = {branch.name: branch.out_channels for branch in self.branches}
        if self.identity_channels:
            found[self.identity_name] = self.identity_channels
        return found

    @property
    def merged(self) -> ConvLayer:
        """The one convolution that it is once its branches are merged."""
        return ConvLayer(
            name=self.name,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            kernel=3,
            kernels=(3,),
            stride=self.stride,
            depthwise=False,
            batch_norm=True,
            activation=self.activation,
            in_size=self.in_size,
        )

    def _branch(self, part: str, *, kernel: int) -> ConvLayer:
        return ConvLayer(
            name=f"{self.name}.{part}",
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            kernel=kernel,
            kernels=(kernel,),
            stride=self.stride,
            depthwise=False,
            batch_norm=True,
            activation="none",
            in_size=self.in_size,
        )

    @property
    def out_size(self) -> int:
        """Height and width of the output."""
        return self.merged.out_size

    @property
    def mac_count(self) -> int:
        """Multiply-accumulates of one image, branches merged."""
        return self.merged.mac_count

    @property
    def parameter_count(self) -> int:
        """Weights and biases, branches merged."""
        return self.merged.parameter_count


@dataclass(frozen=True, slots=True, kw_only=True)
class SqueezeExciteLayer:
    """Scale channels by a gate computed from their means: two 1×1 convs with bias."""

    name: str
    channels: int
    middle_channels: int
    in_size: int

    @property
    def out_size(self) -> int:
        """Height and width of the output: unchanged."""
        return self.in_size

    @property
    def mac_count(self) -> int:
        """Multiply-accumulates of one image: the two 1×1 convolutions."""
        return 2 * self.channels * self.middle_channels

    @property
    def parameter_count(self) -> int:
        """Weights and biases."""
        return self.mac_count + self.channels + self.middle_channels


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLayer:
    """Mean over height and width, kept as 1×1."""

    name: str
    channels: int
    in_size: int
    mac_count: int = 0
    parameter_count: int = 0

    @property
    def out_size(self) -> int:
        """Height and width of the output: 1."""
        return 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLayer:
    """The classifier: flatten, then a linear layer with bias."""

    name: str
    in_channels: int
    out_channels: int

    @property
    def in_size(self) -> int:
        """Height and width of the input: 1."""
        return 1

    @property
    def out_size(self) -> int:
        """Height and width of the output: 1."""
        return 1

    @property
    def mac_count(self) -> int:
        """Multiply-accumulates of one image."""
        return self.in_channels * self.out_channels

    @property
    def parameter_count(self) -> int:
        """Weights and biases."""
        return self.mac_count + self.out_channels


Layer = ConvLayer | RepConvLayer | SqueezeExciteLayer | PoolLayer | LinearLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlan:
    """The unit that is timed: layers in sequence, with or without a shortcut around.

    Args:
        name: Where it stands, such as `stage2.block1`.
        in_channels: Width of its input.
        out_channels: Width of its output.
        in_size: Height and width of its input.
        layers: In order; one's output is the next one's input.
        residual: Whether the input is added to the output.
        stage: Number of its stage, from 1; None outside of stages.
    """

    name: str
    in_channels: int
    out_channels: int
    in_size: int
    layers: tuple[Layer, ...]
    residual: bool
    stage: int | None = None

    @property
    def out_size(self) -> int:
        """Height and width of its output."""
        return self.layers[-1].out_size

    @property
    def key(self) -> str:
        """Everything its latency depends on; blocks with one key are timed once."""
        parts = [f"in{self.in_channels}x{self.in_size}"]
        parts += [_layer_key(layer) for layer in self.layers]
        if self.residual:
            parts.append("add")
        return "_".join(parts)

    @property
    def mac_count(self) -> int:
        """Multiply-accumulates of one image."""
        return sum(layer.mac_count for layer in self.layers)

    @property
    def parameter_count(self) -> int:
        """Weights and biases once batch norms are folded."""
        return sum(layer.parameter_count for layer in self.layers)

    @property
    def activation_count(self) -> int:
        """Values that its layers write, of one image."""
        channels, total = self.in_channels, 0
        for layer in self.layers:
            channels = getattr(layer, "out_channels", channels)
            total += channels * layer.out_size**2
        return total

    @property
    def peak_activation_count(self) -> int:
        """Most values alive at once, of one image.

        A layer's input, its output, and the shortcut that waits for the block's end.
        """
        shortcut = self.in_channels * self.in_size**2 if self.residual else 0
        channels, peak = self.in_channels, 0
        for index, layer in enumerate(self.layers):
            out_channels = getattr(layer, "out_channels", channels)
            alive = channels * layer.in_size**2 + out_channels * layer.out_size**2
            # The first layer reads the shortcut itself: it is alive once, not twice.
            peak = max(peak, alive + (shortcut if index else 0))
            channels = out_channels
        return peak


def _layer_key(layer: Layer) -> str:
    if isinstance(layer, RepConvLayer):
        layer = layer.merged  # as it is run
    if isinstance(layer, ConvLayer):
        kind = "dw" if layer.depthwise else "conv"
        act = "" if layer.activation == "none" else f"-{layer.activation}"
        return f"{kind}{layer.out_channels}k{layer.kernel}s{layer.stride}{act}"
    if isinstance(layer, SqueezeExciteLayer):
        return f"se{layer.middle_channels}"
    if isinstance(layer, PoolLayer):
        return "pool"
    return f"fc{layer.out_channels}"
