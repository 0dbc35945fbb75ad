"""Networks as people bring them, at the sizes that papers on CIFAR-10 prune."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASS_COUNT = 10
WIDTHS = (16, 32, 64)
Shortcut = Literal["projection", "padding"]


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut.

    Source: K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016,
    section 4.2.

    Args:
        channels: Of the input.
        out: Of the output.
        stride: Of the first convolution.
        shortcut: Where shapes change: 1×1 convolution, or zeros for new channels.
    """

    def __init__(
        self, channels: int, out: int, stride: int, shortcut: Shortcut
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.stride, self.missing = stride, out - channels
        self.shortcut = (
            nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )
            if shortcut == "projection" and (stride != 1 or channels != out)
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply to `(N, channels, H, W)`."""
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        if self.missing and isinstance(self.shortcut, nn.Identity):
            half = self.missing // 2
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, half, self.missing - half))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """The residual network for CIFAR.

    Args:
        depth: 6n + 2.
        shortcut: Where shapes change.
    """

    def __init__(self, depth: int, *, shortcut: Shortcut = "projection") -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTHS[0])
        blocks, before = [], WIDTHS[0]
        for stage, channels in enumerate(WIDTHS):
            for place in range((depth - 2) // 6):
                stride = 2 if stage and not place else 1
                blocks.append(ResidualBlock(before, channels, stride, shortcut))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, CLASS_COUNT)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, 10)` of images `(N, 3, 32, 32)`."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return cast(Tensor, self.head(x.mean((2, 3))))


def _conv(
    channels: int,
    out: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> list[nn.Module]:
    """Convolution, batch norm, activation."""
    return [
        nn.Conv2d(
            channels, out, kernel, stride, kernel // 2, groups=groups, bias=False
        ),
        nn.BatchNorm2d(out),
        activation(),
    ]


class Vgg(nn.Sequential):
    """Thirteen 3×3 convolutions in a chain with pools between, and one linear layer.

    Source: K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale
    Image Recognition", ICLR 2015, configuration D; for 32×32 images with batch norms,
    and half as wide before the last stage.
    """

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        before = 3
        for width, count in ((32, 2), (64, 2), (128, 3), (256, 3), (512, 3)):
            for _ in range(count):
                layers += _conv(before, width)
                before = width
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.Flatten(), nn.Linear(before, CLASS_COUNT))


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, project; with a skip where shapes are kept."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * channels
        expand = _conv(channels, wide, 1, activation=nn.ReLU6) if expansion > 1 else []
        self.layers = nn.Sequential(
            *expand,
            *_conv(wide, wide, stride=stride, groups=wide, activation=nn.ReLU6),
            nn.Conv2d(wide, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.skips = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """Apply to `(N, channels, H, W)`."""
        y = self.layers(x)
        return cast(Tensor, x + y if self.skips else y)


class MobileNetV2(nn.Sequential):
    """As published, with the strides of 32×32 images.

    Source: M. Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    CVPR 2018, table 2.
    """

    def __init__(self) -> None:
        layers: list[nn.Module] = _conv(3, 32, activation=nn.ReLU6)
        before = 32
        for expansion, channels, count, stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 1),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            for place in range(count):
                layers.append(
                    InvertedResidual(
                        before, channels, 1 if place else stride, expansion
                    )
                )
                before = channels
        super().__init__(
            *layers,
            *_conv(before, 1280, 1, activation=nn.ReLU6),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(1280, CLASS_COUNT),
        )


class DenseLayer(nn.Module):
    """Adds some channels to all that are there."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to `(N, channels, H, W)`."""
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class DenseNet(nn.Sequential):
    """Everything before is read by everything after.

    Source: G. Huang et al., "Densely Connected Convolutional Networks", CVPR 2017,
    section 4: depth 40, growth 12.
    """

    def __init__(self, depth: int = 40, growth: int = 12) -> None:
        channels = 16
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
        for stage in range(3):
            for _ in range((depth - 4) // 3):
                layers.append(DenseLayer(channels, growth))
                channels += growth
            layers += [nn.BatchNorm2d(channels), nn.ReLU()]
            if stage < 2:
                layers += [
                    nn.Conv2d(channels, channels, 1, bias=False),
                    nn.AvgPool2d(2),
                ]
        super().__init__(
            *layers,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, CLASS_COUNT),
        )


class GatedBlock(nn.Module):
    """A grouped convolution between two of 1×1, a gate, and a skip.

    Sources: S. Xie et al., "Aggregated Residual Transformations for Deep Neural
    Networks", CVPR 2017; J. Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        middle = out // 2
        self.layers = nn.Sequential(
            *_conv(channels, middle, 1),
            *_conv(middle, middle, stride=stride, groups=8),
            nn.Conv2d(middle, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.reduce = nn.Conv2d(out, out // 8, 1)
        self.expand = nn.Conv2d(out // 8, out, 1)
        self.shortcut = (
            nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )
            if stride != 1 or channels != out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply to `(N, channels, H, W)`."""
        y = self.layers(x)
        gate = self.expand(F.relu(self.reduce(y.mean((2, 3), keepdim=True))))
        return F.relu(y * torch.sigmoid(gate) + self.shortcut(x))


class GatedResNeXt(nn.Sequential):
    """Squeeze-and-excite, and grouped convolutions, in nine blocks."""

    def __init__(self) -> None:
        layers: list[nn.Module] = _conv(3, 64)
        before = 64
        for stage, channels in enumerate((64, 128, 256)):
            for place in range(3):
                stride = 2 if stage and not place else 1
                layers.append(GatedBlock(before, channels, stride))
                before = channels
        super().__init__(
            *layers,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(before, CLASS_COUNT),
        )


ALL: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20, projections": lambda: ResNet(20),
    "ResNet-20, padding": lambda: ResNet(20, shortcut="padding"),
    "ResNet-56, projections": lambda: ResNet(56),
    "ResNet-56, padding": lambda: ResNet(56, shortcut="padding"),
    "VGG-like": Vgg,
    "MobileNetV2": MobileNetV2,
    "DenseNet-40": DenseNet,
    "SE-ResNeXt": GatedResNeXt,
}
