"""Residual networks for 32×32 images, as their shape says."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ofa_deploy.families.cifar_resnet import SIZES, ResNetShape


class Block(nn.Module):
    """Two convolutions and a shortcut.

    Source: as networks of Transformable Architecture Search (NeurIPS 2019) are built: a
    shortcut that halves the map is a mean and a 1×1 convolution, one that changes the
    width alone a 1×1 convolution and a batch norm.

    Args:
        channels: Of the input.
        middle: Between the convolutions.
        out: Of the output.
        stride: 1 or 2.
    """

    def __init__(self, channels: int, middle: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, middle, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(middle)
        self.second = nn.Conv2d(middle, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2:
            point = nn.Conv2d(channels, out, 1, bias=False)
            self.shortcut = nn.Sequential(nn.AvgPool2d(2), point)
        elif channels != out:
            point = nn.Conv2d(channels, out, 1, bias=False)
            self.shortcut = nn.Sequential(point, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to `(N, channels, H, W)`."""
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """A residual network.

    Args:
        shape: Its widths, and the blocks that are kept.
    """

    def __init__(self, shape: ResNetShape) -> None:
        super().__init__()
        self.shape = shape
        before = shape.widths[0]
        self.stem = nn.Conv2d(3, before, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(before)
        stages = []
        for stage in range(len(SIZES)):
            blocks = []
            for block in range(shape.kept_blocks[stage]):
                middle, out = shape.block_widths(stage, block)
                stride = 2 if stage and not block else 1
                blocks.append(Block(before, middle, out, stride))
                before = out
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(before, shape.class_count)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, classes)` of images `(N, 3, 32, 32)`."""
        x = self.stages(F.relu(self.norm(self.stem(x))))
        return cast(Tensor, self.head(x.mean((2, 3))))
