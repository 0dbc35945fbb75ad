"""Networks as people bring them, at the sizes that papers on CIFAR-10 prune."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

CLASS_COUNT = 10
WIDTHS = (16, 32, 64)


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut, a projection where shapes change.

    Source: K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016,
    section 4.2.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut = (
            nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )
            if stride != 1 or channels != out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply to `(N, channels, H, W)`."""
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """The residual network for CIFAR.

    Args:
        depth: 6n + 2.
        width: All widths, over the published ones.
    """

    def __init__(self, depth: int, *, width: float = 1.0) -> None:
        super().__init__()
        widths = [max(1, round(channels * width)) for channels in WIDTHS]
        self.stem = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        blocks, before = [], widths[0]
        for stage, channels in enumerate(widths):
            for place in range((depth - 2) // 6):
                stride = 2 if stage and not place else 1
                blocks.append(ResidualBlock(before, channels, stride))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, CLASS_COUNT)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, 10)` of images `(N, 3, 32, 32)`."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return cast(Tensor, self.head(x.mean((2, 3))))


class Vgg(nn.Sequential):
    """A chain of 3×3 convolutions with pools between, and one linear layer.

    Source: K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale
    Image Recognition", ICLR 2015; for 32×32 images with batch norms, half as wide.
    """

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        before = 3
        for stage in ((32, 32), (64, 64), (128, 128), (256, 256)):
            for channels in stage:
                layers += [
                    nn.Conv2d(before, channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                ]
                before = channels
            layers.append(nn.MaxPool2d(2))
        super().__init__(
            *layers,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(before, CLASS_COUNT),
        )
