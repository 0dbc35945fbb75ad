"""A network that is larger than what is deployed, and teaches it.

Shape after K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024: few
channels before the first pool, and all computing behind it; with a skip over the last
two convolutions of each block.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 256, 256)
STEM_WIDTH = 24


def conv(channels: int, out: int, kernel: int = 3) -> nn.Conv2d:
    """A convolution in front of a batch norm."""
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)


class Block(nn.Module):
    """A convolution and a pool; then a skip over two convolutions.

    Args:
        channels: Of the input.
        out: Of the output, which is half as large.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.first, self.norm1 = conv(channels, out), nn.BatchNorm2d(out)
        self.second, self.norm2 = conv(out, out), nn.BatchNorm2d(out)
        self.third, self.norm3 = conv(out, out), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to `(N, channels, H, W)`."""
        x = F.relu(self.norm1(F.max_pool2d(self.first(x), 2)))
        y = F.relu(self.norm2(self.second(x)))
        return F.relu(self.norm3(self.third(y)) + x)


class WideNet(nn.Module):
    """Three blocks between a stem and the largest value of each channel.

    Args:
        class_count: Outputs.
    """

    def __init__(self, class_count: int = 10) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, STEM_WIDTH), nn.BatchNorm2d(STEM_WIDTH)
        widths = (STEM_WIDTH, *WIDTHS)
        self.blocks = nn.Sequential(
            *(Block(*pair) for pair in zip(widths, WIDTHS, strict=False))
        )
        self.head = nn.Linear(WIDTHS[-1], class_count)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, classes)` of images `(N, 3, 32, 32)`."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        logits: Tensor = self.head(x.amax((2, 3)))
        return logits
