"""Residual networks for 32×32 images, every convolution with a width of its own.

Source: K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section
4.2; the shape with free widths and depths, and how it is counted, is that of X. Dong,
Y. Yang, "Network Pruning via Transformable Architecture Search", NeurIPS 2019.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ofa_deploy.errors import SpaceError

SIZES = (32, 16, 8)
WIDTHS = (16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResNetConv:
    """One convolution of a kept block, or a projection.

    Args:
        kernel: 3, or 1 of a projection.
        in_channels: Read.
        out_channels: Written.
        size: Height and width of the output.
    """

    kernel: int
    in_channels: int
    out_channels: int
    size: int

    @property
    def mac_count(self) -> int:
        """Multiply-accumulates of one image."""
        return self.kernel**2 * self.in_channels * self.out_channels * self.size**2


@dataclass(frozen=True, slots=True, kw_only=True)
class ResNetShape:
    """Widths of all convolutions, and how many blocks of each stage are kept.

    Args:
        widths: Of the stem, then of both convolutions of every block, those of blocks
            that are not kept included: `1 + 2 · blocks`.
        kept_blocks: Of each of the three stages, the first ones.
        class_count: Outputs.

    Raises:
        SpaceError: No such network is there.
    """

    widths: tuple[int, ...]
    kept_blocks: tuple[int, int, int]
    class_count: int = 10

    def __post_init__(self) -> None:
        blocks, rest = divmod(len(self.widths) - 1, 2 * len(SIZES))
        if rest or blocks < 1:
            raise SpaceError(
                f"{len(self.widths)} widths; a residual network of depth 6n + 2 has "
                "6n + 1, the stem's first"
            )
        if min(self.widths) < 1:
            raise SpaceError(f"widths {self.widths}; give at least 1 each")
        if not all(1 <= kept <= blocks for kept in self.kept_blocks):
            raise SpaceError(
                f"kept blocks {self.kept_blocks} of {blocks} in each stage; give 1 to "
                f"{blocks}"
            )

    @classmethod
    def dense(cls, depth: int, *, class_count: int = 10) -> ResNetShape:
        """The published network.

        Args:
            depth: 6n + 2, such as 20, 32, 56 or 110.
            class_count: Outputs.
        """
        blocks, rest = divmod(depth - 2, 2 * len(SIZES))
        if rest or blocks < 1:
            raise SpaceError(
                f"depth {depth}; residual networks for 32×32 images have 6n + 2 "
                "layers: 20, 32, 44, 56, 110"
            )
        widths = [WIDTHS[0]] + [width for width in WIDTHS for _ in range(2 * blocks)]
        return cls(
            widths=tuple(widths),
            kept_blocks=(blocks, blocks, blocks),
            class_count=class_count,
        )

    @property
    def blocks(self) -> int:
        """Blocks of a stage, kept or not."""
        return (len(self.widths) - 1) // (2 * len(SIZES))

    def block_widths(self, stage: int, block: int) -> tuple[int, int]:
        """Of a block's two convolutions."""
        first = 1 + 2 * (stage * self.blocks + block)
        return self.widths[first], self.widths[first + 1]

    def convs(self) -> Iterator[ResNetConv]:
        """Of the network that is run: kept blocks, and the projections they need.

        A shortcut is projected in the first block of the second and third stage, and
        wherever a block's width is not that of what it reads.
        """
        yield ResNetConv(
            kernel=3, in_channels=3, out_channels=self.widths[0], size=SIZES[0]
        )
        read = self.widths[0]
        for stage, kept in enumerate(self.kept_blocks):
            size = SIZES[stage]
            for block in range(kept):
                middle, out = self.block_widths(stage, block)
                for kernel, before, after in ((3, read, middle), (3, middle, out)):
                    yield ResNetConv(
                        kernel=kernel, in_channels=before, out_channels=after, size=size
                    )
                if (stage and not block) or read != out:
                    yield ResNetConv(
                        kernel=1, in_channels=read, out_channels=out, size=size
                    )
                read = out

    @property
    def last_width(self) -> int:
        """What the classifier reads."""
        last = len(SIZES) - 1
        return self.block_widths(last, self.kept_blocks[last] - 1)[1]

    @property
    def mac_count(self) -> int:
        """Multiply-accumulates of one image."""
        convs = sum(conv.mac_count for conv in self.convs())
        return convs + self.last_width * self.class_count
