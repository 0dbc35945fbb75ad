"""Networks as users bring them: skips, concatenations, gates, groups, shared layers."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.tiny_torch import inputs

SIZE = 12
CLASS_COUNT = 5


def randomise(network: nn.Module) -> nn.Module:
    """As if trained: batch norms with statistics of images, and their own factors."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    network.train()
    with torch.no_grad():
        for _ in range(10):
            network(inputs(SIZE, count=16))
    return network.eval()


def conv(
    channels: int, out: int, kernel: int = 3, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(
            channels, out, kernel, stride, kernel // 2, groups=groups, bias=False
        ),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )


class Residual(nn.Module):
    """A skip over two convolutions; with a projection, or zeros for new channels."""

    def __init__(
        self, channels: int, out: int, stride: int, *, project: bool = True
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.stride, self.missing = stride, out - channels
        self.project = (
            nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )
            if project and (stride != 1 or channels != out)
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        if self.project is not None:
            x = self.project(x)
        elif self.missing:
            x = x[:, :, :: self.stride, :: self.stride]
            half = self.missing // 2
            x = F.pad(x, (0, 0, 0, 0, half, self.missing - half))
        return F.relu(y + x)


class ResidualNet(nn.Module):
    """Skips, a depthwise convolution, flattened maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(
            Residual(16, 16, 1), Residual(16, 24, 2), Residual(24, 24, 1)
        )
        self.depthwise = nn.Conv2d(24, 24, 3, 2, 1, groups=24)
        self.pool = nn.AvgPool2d(1)
        self.head = nn.Linear(24 * 9, CLASS_COUNT)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        x = F.relu(self.depthwise(x))
        return cast(Tensor, self.head(torch.flatten(self.pool(x), 1)))


class PaddedResidualNet(nn.Module):
    """Shortcuts without parameters, as residual networks for CIFAR have them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.blocks = nn.Sequential(
            Residual(8, 8, 1),
            Residual(8, 16, 2, project=False),
            Residual(16, 16, 1),
            Residual(16, 32, 2, project=False),
        )
        self.head = nn.Linear(32, CLASS_COUNT)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.blocks(self.stem(x)).mean((2, 3))))


class DenseNet(nn.Module):
    """Everything before is read by everything after."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, 4, 3, padding=1, bias=False),
            )
            for width in (8, 12, 16)
        )
        self.transition = conv(20, 10, 1)
        self.head = nn.Linear(10, CLASS_COUNT)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        x = F.avg_pool2d(self.transition(x), 2)
        return cast(Tensor, self.head(x.mean((2, 3))))


class SqueezeExcite(nn.Module):
    """A gate by channel means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.expand = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.expand(gate))


class GatedGroupedNet(nn.Module):
    """Squeeze-and-excite, and a grouped convolution, whose channels stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.gate = SqueezeExcite(16)
        self.wide = conv(16, 24)
        self.grouped = conv(24, 24, groups=3)
        self.last = conv(24, 20, 1)
        self.head = nn.Linear(20, CLASS_COUNT)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.wide(self.gate(self.stem(x))))
        return cast(Tensor, self.head(self.last(x).mean((2, 3))))


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, project; with a skip."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        wide = 3 * channels
        self.layers = nn.Sequential(
            *conv(channels, wide, 1),
            *conv(wide, wide, stride=stride, groups=wide),
            nn.Conv2d(wide, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.skips = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return cast(Tensor, x + y if self.skips else y)


class MobileNet(nn.Sequential):
    """As MobileNetV2 is built."""

    def __init__(self) -> None:
        super().__init__(
            *conv(3, 8),
            InvertedResidual(8, 12, 2),
            InvertedResidual(12, 12, 1),
            InvertedResidual(12, 16, 2),
            *conv(16, 32, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(32, CLASS_COUNT),
        )


class Vgg(nn.Module):
    """A chain; its maps become rows of features whose number is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *conv(3, 16), nn.MaxPool2d(2), *conv(16, 24), nn.MaxPool2d(2), *conv(24, 32)
        )
        self.classifier = nn.Sequential(
            nn.Linear(32 * 9, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, CLASS_COUNT)
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(self.features(x).view(-1, 32 * 9)))


class SharedNet(nn.Module):
    """One convolution in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = conv(3, 16), conv(16, 16)
        self.last = conv(16, 24)
        self.head = nn.Linear(24, CLASS_COUNT)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.shared(self.stem(x)))
        return cast(Tensor, self.head(self.last(x).mean((2, 3))))


class AskingNet(nn.Module):
    """One slope for all channels; asks a layer how many features it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.slope = nn.PReLU()
        self.last = nn.Conv2d(16, 24, 3, 2, 1)
        self.head = nn.Linear(24 * 36, CLASS_COUNT)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.last(self.slope(self.stem(x))))
        return cast(Tensor, self.head(x.view(-1, self.head.in_features)))


class AliasedNet(nn.Module):
    """Layers under two names, the second of which it calls them by."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16)
        self.second, self.norm2 = nn.Conv2d(16, 24, 3, 2, 1), nn.BatchNorm2d(24)
        self.features = nn.Sequential(
            self.first, self.norm1, nn.ReLU(), self.second, self.norm2, nn.ReLU()
        )
        self.head = nn.Linear(24, CLASS_COUNT)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.features(x).mean((2, 3))))


class OblongNet(nn.Module):
    """Kernels and strides that are not square, and one with places between its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.row = nn.Conv2d(16, 20, (1, 5), (1, 2), (0, 2))
        self.column = nn.Conv2d(20, 24, (3, 1), (2, 1), (1, 0), bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.far = nn.Conv2d(24, 24, 3, padding=2, dilation=2)
        self.head = nn.Linear(24, CLASS_COUNT)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.column(F.relu(self.row(self.stem(x))))))
        x = F.relu(x + self.far(x))
        return cast(Tensor, self.head(x.mean((2, 3))))


ALL: dict[str, type[nn.Module]] = {
    "residual": ResidualNet,
    "padded": PaddedResidualNet,
    "dense": DenseNet,
    "gated": GatedGroupedNet,
    "mobilenet": MobileNet,
    "vgg": Vgg,
    "shared": SharedNet,
    "asking": AskingNet,
    "aliased": AliasedNet,
    "oblong": OblongNet,
}


class CalledByName(nn.Module):
    """Hands on its input by name."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.activation = nn.Conv2d(3, 16, 3), activation or nn.ReLU()
        self.norm = nn.BatchNorm2d(16)
        self.last, self.head = nn.Conv2d(16, 12, 3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(input=self.conv(input=x))
        x = self.last(input=self.activation(x))
        return cast(Tensor, self.head(input=x.mean((2, 3))))
