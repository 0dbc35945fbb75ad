"""What a report tells, taken from tables, predictors and measurements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.assembly import VerifiedNetwork
from ofa_deploy.choosing import ERROR, LATENCY_MS, WEIGHT_BYTES
from ofa_deploy.constraints import MEGABYTE
from ofa_deploy.layers import BlockPlan, ConvLayer, RepConvLayer
from ofa_deploy.plan import all_blocks, lower
from ofa_deploy.predict.latency import ONE_SIDED_95, LatencyPredictor, calibration
from ofa_deploy.report.charts import BlockShare, ChosenPoint, FrontPoint, WidthLine
from ofa_deploy.search.pareto import Front
from ofa_deploy.space import SearchSpace, SubnetConfig
from profilers.table import LatencyTable

Floats = NDArray[np.float64]

# Networks of the front that are drawn; more cannot be told apart.
MAX_FRONT_POINTS = 400


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LeftOut:
    """Networks of a table, predicted by fits that had not seen them."""

    names: tuple[str, ...]
    predicted_ms: Floats
    measured_ms: Floats


def front_points(space: SearchSpace, front: Front) -> list[FrontPoint]:
    """The networks that no other is both faster and more accurate than, thinned."""
    order = np.lexsort((front.costs[:, ERROR], front.costs[:, LATENCY_MS]))
    errors = front.costs[order, ERROR]
    better = np.concatenate([[True], errors[1:] < np.minimum.accumulate(errors)[:-1]])
    kept = order[better]
    if len(kept) > MAX_FRONT_POINTS:
        places = np.linspace(0, len(kept) - 1, MAX_FRONT_POINTS)
        kept = kept[places.round().astype(int)]
    return [
        FrontPoint(
            name=space.decode(front.genomes[row]).id,
            latency_ms=float(front.costs[row, LATENCY_MS]),
            accuracy=float(1 - front.costs[row, ERROR]),
            weight_mb=float(front.costs[row, WEIGHT_BYTES]) / MEGABYTE,
        )
        for row in kept
    ]


def chosen_point(network: VerifiedNetwork) -> ChosenPoint:
    """The network of a bundle, in the quiet state."""
    measured = network.measurement
    margin = ONE_SIDED_95 * measured.standard_error_ratio
    return ChosenPoint(
        name=network.config.id,
        latency_ms=measured.quiet_ms,
        low_ms=measured.quiet_ms * (1 - margin),
        high_ms=measured.quiet_ms * (1 + margin),
        predicted_ms=network.predicted.ms,
        accuracy=network.accuracy.value,
    )


def left_out(space: SearchSpace, table: LatencyTable) -> LeftOut:
    """A table's networks against predictions made without them."""
    known = calibration(space, table)
    return LeftOut(
        names=known.names,
        predicted_ms=known.measured_ms / known.left_out(),
        measured_ms=known.measured_ms,
    )


def block_shares(
    predictor: LatencyPredictor, table: LatencyTable, config: SubnetConfig
) -> list[BlockShare]:
    """What each block of a network is priced at, and took when timed alone."""
    space = predictor.space
    genome = space.encode(config)
    (pairs,) = space.slot_choices(genome[None])
    used = np.flatnonzero(space.active_slots(genome[None])[0])
    blocks = lower(space, config).blocks
    staged = [block for block in blocks if block.stage is not None]
    outside = [block for block in blocks if block.stage is None]
    alone = [_alone_ms(table, block) for block in outside]
    shares = [
        BlockShare(
            name="stem, head",
            what="and what every network costs",
            price_ms=float(predictor.fixed_ms[genome[0]]),
            alone_ms=None if None in alone else sum(ms or 0.0 for ms in alone),
        )
    ]
    for block, slot in zip(staged, used, strict=True):
        kernel, expand = pairs[slot]
        shares.append(
            BlockShare(
                name=block.name,
                what=_describe(block),
                price_ms=float(predictor.slot_ms[genome[0], slot, kernel, expand]),
                alone_ms=_alone_ms(table, block),
            )
        )
    return shares


def width_lines(
    space: SearchSpace, table: LatencyTable, *, resolution: int
) -> list[WidthLine]:
    """Blocks of one resolution that differ in their width alone, as timed."""
    by_rest: dict[tuple[str, ...], dict[int, float]] = defaultdict(dict)
    names: dict[tuple[str, ...], str] = {}
    for block in all_blocks(_only(space, resolution)).values():
        latency_ms, kernel = _alone_ms(table, block), _kernel(block)
        if latency_ms is None or kernel is None or block.stage is None:
            continue
        # The first block of a stage has another input than the rest.
        first = block.name.endswith(".block1")
        place = f"stage{block.stage}" + (" first block" if first else "")
        key = (place, f"k{kernel}")
        by_rest[key][_inner_width(block)] = latency_ms
        names[key] = (
            f"{place}, {kernel}×{kernel}, input {block.in_size}×{block.in_size}"
        )
    return [
        WidthLine(
            name=names[key],
            widths=tuple(sorted(found)),
            latency_ms=tuple(found[width] for width in sorted(found)),
        )
        for key, found in by_rest.items()
        if len(found) > 1
    ]


def _only(space: SearchSpace, resolution: int) -> SearchSpace:
    return SearchSpace(
        name=space.name,
        resolutions=(resolution,),
        stem=space.stem,
        stages=space.stages,
        head=space.head,
    )


def _alone_ms(table: LatencyTable, block: BlockPlan) -> float | None:
    found = table.blocks.get(block.key)
    return None if found is None else found.quiet_ms


def _inner_width(block: BlockPlan) -> int:
    # The last convolution projects to the block's output.
    convolutions = _convolutions(block)
    inside = convolutions[:-1] or convolutions
    return max(conv.out_channels for conv in inside)


def _kernel(block: BlockPlan) -> int | None:
    kernels = [conv.kernel for conv in _convolutions(block)]
    return max(kernels) if kernels else None


def _convolutions(block: BlockPlan) -> Sequence[ConvLayer]:
    run = [
        layer.merged if isinstance(layer, RepConvLayer) else layer
        for layer in block.layers
    ]
    return [layer for layer in run if isinstance(layer, ConvLayer)]


def _describe(block: BlockPlan) -> str:
    return (
        f"{_kernel(block)}×{_kernel(block)}, {block.in_channels} → "
        f"{_inner_width(block)} → {block.out_channels} channels at "
        f"{block.in_size}×{block.in_size}"
    )
