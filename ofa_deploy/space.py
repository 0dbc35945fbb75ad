"""The networks a supernet contains, as values: space, config, genome, id.

A `SearchSpace` lists the choices; a `SubnetConfig` is one network, with active blocks
only, so that equal networks compare equal; a genome is the same network as a row of
integers, so that a search can work on whole populations at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.errors import SpaceError

Activation = Literal["relu", "hswish"]
BlockKind = Literal["mbconv", "fused_mbconv", "repvgg"]
Genomes = NDArray[np.int64]

MAX_NAME_LENGTH = 64

_BLOCK_ID = re.compile(r"k(\d+)e(\d+)")
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME_LENGTH - 1}}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpace:
    """One stage: blocks of one width, the first of them with the stage's stride.

    Args:
        out_channels: Width of every block's output.
        stride: Of the first block, 1 or 2.
        kernels: Allowed kernel sizes, ascending and odd.
        expands: Allowed ratios of a block's middle to its input width, ascending; of a
            `repvgg` block in quarters, and to its output width.
        depths: Allowed block counts, ascending.
        activation: After the expansion and after the depthwise convolution.
        squeeze_excite: Whether blocks weigh their middle channels.
        block: `mbconv` expands by 1×1 and filters depthwise; `fused_mbconv` does both
            in one dense k×k convolution; `repvgg` is two 3×3 convolutions, each trained
            as several branches.
    """

    out_channels: int
    stride: int
    kernels: tuple[int, ...]
    expands: tuple[int, ...]
    depths: tuple[int, ...]
    activation: Activation
    squeeze_excite: bool
    block: BlockKind = "mbconv"

    def __post_init__(self) -> None:
        for name in ("kernels", "expands", "depths"):
            choices = getattr(self, name)
            if not choices or list(choices) != sorted(set(choices)) or choices[0] < 1:
                raise SpaceError(
                    f"{name}={choices} must be ascending, distinct and positive"
                )
        if any(kernel % 2 == 0 for kernel in self.kernels):
            raise SpaceError(f"kernels={self.kernels} must be odd")
        if self.stride not in (1, 2):
            raise SpaceError(f"stride={self.stride} must be 1 or 2")
        if self.out_channels < 1:
            raise SpaceError(f"out_channels={self.out_channels} must be positive")
        if self.block == "repvgg" and (self.kernels != (3,) or self.squeeze_excite):
            raise SpaceError(
                f"kernels={self.kernels}, squeeze_excite={self.squeeze_excite}: repvgg "
                "blocks have 3×3 convolutions and nothing between them; give (3,) and "
                "False"
            )

    @property
    def max_depth(self) -> int:
        """Blocks in the deepest choice."""
        return self.depths[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class StemSpace:
    """The fixed layers before the stages: a 3×3 convolution and, if asked, one block.

    Before `repvgg` stages the convolution is trained as several branches, too.

    `block_channels` is the width of an expand-1 block after the convolution (block 0 of
    MobileNetV3), or None for no such block.
    """

    out_channels: int
    stride: int
    activation: Activation
    block_channels: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpace:
    """The fixed layers after the stages: expand, mean pool, mix, classify.

    `expand_channels` and `feature_channels` are None for no such layer.
    """

    expand_channels: int | None
    feature_channels: int | None
    activation: Activation
    class_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockConfig:
    """Choices of one active block."""

    kernel: int
    expand: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SubnetConfig:
    """One network of a space: its resolution and the active blocks of each stage."""

    resolution: int
    stages: tuple[tuple[BlockConfig, ...], ...]

    @property
    def id(self) -> str:
        """A readable name, such as `r32-k3e4.k3e2-k7e6`; stages are split by `-`."""
        stages = (".".join(f"k{b.kernel}e{b.expand}" for b in s) for s in self.stages)
        return "-".join((f"r{self.resolution}", *stages))

    @classmethod
    def from_id(cls, text: str) -> SubnetConfig:
        """The config whose `id` is `text`.

        Raises:
            SpaceError: The text is not such an id.
        """
        head, *stages = text.split("-")
        if not re.fullmatch(r"r\d+", head):
            raise SpaceError(f"id {text!r} must begin with a resolution, such as r32")
        return cls(
            resolution=int(head[1:]),
            stages=tuple(
                tuple(_block_from_id(part, text) for part in stage.split("."))
                for stage in stages
            ),
        )


def require_name(name: str) -> str:
    """The name of a space, if it is one.

    Latency tables are kept under it: it must not lead to another folder.

    Raises:
        SpaceError: It is too long, or has characters that file names should not have.
    """
    if not _NAME.fullmatch(name):
        shown = name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH]}…"
        raise SpaceError(
            f"name={shown!r} is no name of a space; give 1 to {MAX_NAME_LENGTH} "
            "ASCII letters, digits, '.', '_' and '-', the first a letter or a digit"
        )
    return name


def _block_from_id(part: str, text: str) -> BlockConfig:
    match = _BLOCK_ID.fullmatch(part)
    if match is None:
        raise SpaceError(f"id {text!r}: {part!r} is not a block such as k5e4")
    return BlockConfig(kernel=int(match[1]), expand=int(match[2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """All sub-networks of a supernet, and the fixed layers around them.

    Genes, in order: resolution, then the depth of each stage, then kernel and expand of
    each block slot, stage by stage. A gene is an index into its choices; genes of slots
    beyond a stage's depth are 0, so that a row names exactly one network.

    `name` is part of file names; `require_name` says what it may be.
    """

    name: str
    resolutions: tuple[int, ...]
    stem: StemSpace
    stages: tuple[StageSpace, ...]
    head: HeadSpace

    def __post_init__(self) -> None:
        require_name(self.name)
        if list(self.resolutions) != sorted(set(self.resolutions)):
            raise SpaceError(f"resolutions={self.resolutions} must be ascending")
        if not self.resolutions or self.resolutions[0] < 1 or not self.stages:
            raise SpaceError("a space needs at least one resolution and one stage")

    # -- genes -----------------------------------------------------------------

    @property
    def choice_counts(self) -> NDArray[np.int64]:
        """Number of choices of each gene, `(genes,)`."""
        counts = [len(self.resolutions), *(len(s.depths) for s in self.stages)]
        for stage in self.stages:
            counts += [len(stage.kernels), len(stage.expands)] * stage.max_depth
        return np.array(counts, dtype=np.int64)

    @property
    def slot_count(self) -> int:
        """Block slots over all stages, used or not."""
        return sum(stage.max_depth for stage in self.stages)

    @property
    def first_slot_gene(self) -> int:
        """Index of the first slot's kernel gene."""
        return 1 + len(self.stages)

    def slot_choices(self, genomes: Genomes) -> Genomes:
        """Kernel and expansion of each slot, as indices, a view `(n, slots, 2)`.

        Args:
            genomes: `(individuals, genes)`.
        """
        return genomes[:, self.first_slot_gene :].reshape(-1, self.slot_count, 2)

    def active_slots(self, genomes: Genomes) -> NDArray[np.bool_]:
        """Which slots are used, `(individuals, slots)`."""
        parts = []
        for index, stage in enumerate(self.stages):
            depth = np.asarray(stage.depths)[genomes[:, 1 + index]]
            parts.append(np.arange(stage.max_depth)[None, :] < depth[:, None])
        return np.concatenate(parts, axis=1)

    def canonical(self, genomes: Genomes) -> Genomes:
        """The same networks with the genes of unused slots set to 0."""
        used = np.repeat(self.active_slots(genomes), 2, axis=1)
        result = genomes.copy()
        result[:, self.first_slot_gene :] *= used
        return result

    def sample(self, count: int, rng: np.random.Generator) -> Genomes:
        """`count` networks, each choice drawn uniformly, `(count, genes)`."""
        counts = self.choice_counts
        drawn = rng.integers(0, counts[None, :], size=(count, len(counts)))
        return self.canonical(drawn)

    # -- single networks ---------------------------------------------------------

    def decode(self, genome: Sequence[int] | NDArray[np.int64]) -> SubnetConfig:
        """The config that a row of genes means."""
        counts = self.choice_counts
        row = np.asarray(genome, dtype=np.int64)
        if row.shape != counts.shape or (row < 0).any() or (row >= counts).any():
            raise SpaceError(
                f"a genome of space {self.name} has {len(counts)} genes, each in "
                f"0..choices-1 with choices {counts.tolist()}; got {row.tolist()}"
            )
        stages, gene = [], self.first_slot_gene
        for index, stage in enumerate(self.stages):
            depth = stage.depths[row[1 + index]]
            pairs = row[gene : gene + 2 * stage.max_depth].reshape(-1, 2)[:depth]
            stages.append(
                tuple(
                    BlockConfig(kernel=stage.kernels[k], expand=stage.expands[e])
                    for k, e in pairs
                )
            )
            gene += 2 * stage.max_depth
        return SubnetConfig(resolution=self.resolutions[row[0]], stages=tuple(stages))

    def encode(self, config: SubnetConfig) -> NDArray[np.int64]:
        """The row of genes of a config, `(genes,)`."""
        self.validate(config)
        genes = [self.resolutions.index(config.resolution)]
        for stage, blocks in zip(self.stages, config.stages, strict=True):
            genes.append(stage.depths.index(len(blocks)))
        for stage, blocks in zip(self.stages, config.stages, strict=True):
            for block in blocks:
                genes.append(stage.kernels.index(block.kernel))
                genes.append(stage.expands.index(block.expand))
            genes += [0, 0] * (stage.max_depth - len(blocks))
        return np.array(genes, dtype=np.int64)

    def validate(self, config: SubnetConfig) -> None:
        """Check that the config is in the space.

        Raises:
            SpaceError: Names the first choice that is not.
        """
        if config.resolution not in self.resolutions:
            raise SpaceError(
                f"resolution={config.resolution} is not one of {self.resolutions} "
                f"of space {self.name}"
            )
        if len(config.stages) != len(self.stages):
            raise SpaceError(
                f"the config has {len(config.stages)} stages, space {self.name} "
                f"has {len(self.stages)}"
            )
        for index, (stage, blocks) in enumerate(
            zip(self.stages, config.stages, strict=True)
        ):
            where = f"stage {index + 1}"
            _require_choice(f"{where}: depth", len(blocks), stage.depths)
            for place, block in enumerate(blocks):
                label = f"{where}, block {place + 1}"
                _require_choice(f"{label}: kernel", block.kernel, stage.kernels)
                _require_choice(f"{label}: expand", block.expand, stage.expands)

    def uniform(
        self, resolution: int, *, kernel_index: int, expand_index: int
    ) -> SubnetConfig:
        """The deepest network that takes the same choice everywhere.

        Args:
            resolution: Of its inputs.
            kernel_index: Among each stage's kernels; the last of those that have fewer.
            expand_index: Among each stage's expansions, likewise.
        """
        return SubnetConfig(
            resolution=resolution,
            stages=tuple(
                (
                    BlockConfig(
                        kernel=stage.kernels[min(kernel_index, len(stage.kernels) - 1)],
                        expand=stage.expands[min(expand_index, len(stage.expands) - 1)],
                    ),
                )
                * stage.max_depth
                for stage in self.stages
            ),
        )

    def largest(self) -> SubnetConfig:
        """The network with every choice at its maximum."""
        return self.decode(self.canonical(self.choice_counts[None] - 1)[0])

    def smallest(self) -> SubnetConfig:
        """The network with every choice at its minimum."""
        return self.decode(np.zeros_like(self.choice_counts))

    def middle(self) -> SubnetConfig:
        """The middle one of all choices, the larger of two."""
        return self.decode(self.choice_counts // 2)

    def count(self) -> int:
        """How many different networks the space holds."""
        total = len(self.resolutions)
        for stage in self.stages:
            per_block = len(stage.kernels) * len(stage.expands)
            total *= sum(per_block**depth for depth in stage.depths)
        return total


def _require_choice(label: str, value: int, choices: tuple[int, ...]) -> None:
    if value not in choices:
        raise SpaceError(
            f"{label}={value} is not one of {choices}; "
            "the supernet was trained for those only"
        )


def first_of_each(genomes: Genomes) -> NDArray[np.int64]:
    """Rows `(different,)` of genomes `(n, genes)`, ascending, that none before equals.

    Rows are compared as strings of bytes: `numpy.unique(axis=0)` compares field by
    field, which took the search as long as its predictors. Genes are below 65,536.
    """
    packed = np.ascontiguousarray(genomes, dtype=np.uint16)
    rows = packed.view(f"V{packed.shape[1] * packed.itemsize}")[:, 0]
    _, first = np.unique(rows, return_index=True)
    return np.sort(first)
