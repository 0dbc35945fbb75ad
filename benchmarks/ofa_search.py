"""Our search against the evolutionary search of the `ofa` package, side by side.

    pip install --no-deps --target build/ofa ofa
    python benchmarks/ofa_search.py --ofa build/ofa

The package imports torchvision and more for what is not searched with; stand-in
modules take their place. Both sides look for the most accurate network within a
latency, on the same space, with the same prices per block and an accuracy predictor of
the same weights.
"""

from __future__ import annotations

import importlib
import random  # noqa: TID251 - of which theirs draws
import statistics
import sys
import time
import types
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from frontier_quality import BACKEND, table_of
from inputs import console, new_parser
from made_up_accuracy import made_up_accuracy
from report import Section
from rich.progress import track

from ofa_deploy.families import mbv3
from ofa_deploy.layers import BlockPlan, ConvLayer
from ofa_deploy.pipeline import EVOLUTION
from ofa_deploy.plan import all_blocks
from ofa_deploy.predict.accuracy import AccuracyPredictor
from ofa_deploy.predict.block_costs import COSTS, look_up_blocks
from ofa_deploy.predict.latency import LatencyPredictor, ResidualRatios, price_list
from ofa_deploy.search.dominated_widths import promotion
from ofa_deploy.search.evolution import within_latency
from ofa_deploy.space import BlockConfig, SearchSpace, SubnetConfig
from profilers.table import LatencyTable

SEED = 7
SEEDS = 5
LEAST_RATIO = 100.0
# A network alone is predicted as 0.78123456, among others as 0.78123457.
ROUNDING = 1e-6
LookUpTable = dict[str, dict[str, float]]
# Of random networks' latencies.
BUDGET_QUANTILES = (0.1, 0.5, 0.9)
# Imported by the package, and used by none of what is run here.
STAND_INS = (
    *("torchvision", "torchvision.transforms", "torchvision.datasets"),
    *("torchvision.transforms.functional", "torchvision.datasets.folder"),
    *("yaml", "tqdm"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One search: seconds, and the accuracy of the best network by our predictor."""

    seconds: float
    accuracy: float


def main() -> None:
    """Search with both, for some budgets and seeds each, and publish."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--ofa", type=Path, default=Path("build/ofa"), help="where ofa was put"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    args = parser.parse_args()
    if not (args.ofa / "ofa").is_dir():
        raise SystemExit(
            f"ofa is not in {args.ofa}. Run: pip install --no-deps --target "
            f"{args.ofa} ofa"
        )
    section = Section("ofa_search", "Search beside `ofa`", results=args.results)
    space = mbv3.imagenet(width=1.0)
    table = table_of(space)
    latency = block_sums(space, table)
    with console.status("fitting an accuracy predictor to made-up labels"):
        accuracy = made_up_accuracy(space, seed=SEED, members=1)
    drawn = latency.predict_ms(space.sample(2_000, np.random.default_rng(SEED)))
    peers = Peers(args.ofa, space, table, latency, accuracy)
    rows, ratios, gaps = [], [], []
    for share in BUDGET_QUANTILES:
        budget_ms = float(np.quantile(drawn, share))
        table_runs, plain_runs, ours = [], [], []
        for seed in track(range(args.seeds), f"{budget_ms:.3g} ms", console=console):
            table_runs.append(peers.run(peers.table, budget_ms, seed))
            plain_runs.append(peers.run(peers.plain, budget_ms, seed))
            ours.append(our_run(space, latency, accuracy, budget_ms, seed))
        theirs = [*table_runs, *plain_runs]
        rows += [
            row("`ofa`, its latency table", budget_ms, table_runs, ours),
            row("`ofa`, our prices in a plain loop", budget_ms, plain_runs, ours),
            row("ours", budget_ms, ours, ours),
        ]
        ratios.append(
            tuple(_median(runs) / _median(ours) for runs in (table_runs, plain_runs))
        )
        worst = min(run.accuracy for run in ours)
        best, least = (f(run.accuracy for run in theirs) for f in (max, min))
        gaps.append((worst - best, best - least))
    section.text(
        f"`{space.name}`, {BACKEND}, 1 thread, {args.seeds} seeds; a network's latency "
        "is the sum of its blocks', as the package has it. `ofa` with population 100 "
        "and 500 generations, the published settings; ours as `specialize` searches "
        f"where its front does not do: {EVOLUTION.population} and "
        f"{EVOLUTION.generations}, then a polish. "
        "*its latency table* is the package's own class, with our measured blocks in "
        "it; *our prices in a plain loop* spares it the network that it sets up for "
        "each look-up, which its users do not have. Its accuracy predictor is its own "
        "class with the weights of ours, whose labels are made up. Sides in turn."
    )
    section.table(
        ["search", "budget ms", "seconds", "times ours", "worst seed", "best seed"],
        rows,
    )
    for place, name in enumerate(("its latency table", "our prices in a plain loop")):
        least = min(ratio[place] for ratio in ratios)
        section.bar(
            f"at least {LEAST_RATIO:g} times as fast as `ofa` with {name}: {least:.0f} "
            f"times, the least of {len(ratios)} budgets",
            passed=least >= LEAST_RATIO,
        )
    section.bar(
        "our worst seed below their best by no more than their spread: "
        + ", ".join(f"{gap:+.3%} (spread {spread:.3%})" for gap, spread in gaps),
        passed=all(gap >= -spread - ROUNDING for gap, spread in gaps),
    )
    section.publish()


def row(name: str, budget_ms: float, runs: list[Run], ours: list[Run]) -> list[str]:
    """Cells of one side and budget."""
    return [
        name,
        f"{budget_ms:.3f}",
        f"{_median(runs):.3f}",
        f"{_median(runs) / _median(ours):.0f}",
        f"{min(run.accuracy for run in runs):.3%}",
        f"{max(run.accuracy for run in runs):.3%}",
    ]


def _median(runs: list[Run]) -> float:
    return statistics.median(run.seconds for run in runs)


def block_sums(space: SearchSpace, table: LatencyTable) -> LatencyPredictor:
    """A predictor that adds blocks up, as the package's table does."""
    blocks = look_up_blocks(space, {key: m.quiet_ms for key, m in table.blocks.items()})
    # The same at every resolution.
    weights = np.zeros((2, 2 + len(space.stages) + len(COSTS) - 1))
    weights[0, 1 : 2 + len(space.stages)] = 1.0
    none = ResidualRatios(rms=0.0, low=1.0, high=1.0, upper=1.0, count=100)
    return price_list(space, blocks, weights.ravel(), residuals=none)


def our_run(
    space: SearchSpace,
    latency: LatencyPredictor,
    accuracy: AccuracyPredictor,
    budget_ms: float,
    seed: int,
) -> Run:
    """As `specialize` searches where it has no front."""
    start_s = time.perf_counter()
    problem = within_latency(
        space,
        accuracy=accuracy.predict,
        latency_ms=latency.predict_ms,
        budget_ms=budget_ms,
        promotion=promotion(space, latency.slot_ms),
    )
    found = EVOLUTION.search(problem, np.random.default_rng(seed))
    return Run(seconds=time.perf_counter() - start_s, accuracy=float(found.score[0]))


class Prices:
    """Their efficiency predictor, with our prices: a look-up for each block."""

    def __init__(self, space: SearchSpace, latency: LatencyPredictor) -> None:
        stage = space.stages[0]
        self._resolution = {value: i for i, value in enumerate(space.resolutions)}
        self._kernel = {value: i for i, value in enumerate(stage.kernels)}
        self._expand = {value: i for i, value in enumerate(stage.expands)}
        self._fixed = latency.fixed_ms.tolist()
        self._slots = latency.slot_ms.tolist()
        self._depth = stage.max_depth

    def get_efficiency(self, arch: dict[str, Any]) -> float:
        """As their searches ask for it."""
        place = self._resolution[arch["image_size"]]
        total, prices = self._fixed[place], self._slots[place]
        for stage, depth in enumerate(arch["d"]):
            for block in range(depth):
                slot = stage * self._depth + block
                kernel = self._kernel[arch["ks"][slot]]
                total += prices[slot][kernel][self._expand[arch["e"][slot]]]
        return float(total)


def look_up_table(
    space: SearchSpace, table: LatencyTable
) -> dict[str, dict[str, float]]:
    """Our measured blocks under the names of the package's table."""
    found: dict[str, dict[str, float]] = {}

    def put(kind: str, block: BlockPlan, rest: str = "") -> None:
        sizes = (block.in_size, block.in_channels), (block.out_size, block.out_channels)
        shape_in, shape_out = (f"{size}x{size}x{width}" for size, width in sizes)
        name = f"{kind}-input:{shape_in}-output:{shape_out}{rest}"
        found[name] = {"mean": table.blocks[block.key].quiet_ms}

    for block in all_blocks(space).values():
        if block.name == "stem":
            put("Conv", block)
        elif block.name == "head":
            expand = block.layers[0].out_channels  # type: ignore[union-attr]
            mixed = block.layers[2].out_channels  # type: ignore[union-attr]
            size = f"{block.in_size}x{block.in_size}"
            # One block with us; its price goes to the first of their four parts.
            parts = (
                f"Conv_1-input:{size}x{block.in_channels}-output:{size}x{expand}",
                f"AvgPool2D-input:{size}x{expand}-output:1x1x{expand}",
                f"Conv_2-input:1x1x{expand}-output:1x1x{mixed}",
                f"Logits-input:1x1x{mixed}-output:{block.out_channels}",
            )
            price = table.blocks[block.key].quiet_ms
            found |= {
                part: {"mean": 0.0 if index else price}
                for index, part in enumerate(parts)
            }
        else:
            inside = [layer for layer in block.layers if isinstance(layer, ConvLayer)]
            (middle,) = (layer for layer in inside if layer.depthwise)
            gated = len(inside) < len(block.layers)
            put(
                "expanded_conv",
                block,
                f"-expand:{middle.out_channels}-kernel:{middle.kernel}"
                f"-stride:{middle.stride}-idskip:{int(block.residual)}-se:{int(gated)}"
                f"-hs:{int(middle.activation == 'hswish')}",
            )
    return found


class Peers:
    """The package's search, with two ways to ask for a latency.

    Args:
        folder: Where the package is.
        space: To search.
        table: Of our measured blocks.
        latency: The sums of these.
        accuracy: Of one member.
    """

    def __init__(
        self,
        folder: Path,
        space: SearchSpace,
        table: LatencyTable,
        latency: LatencyPredictor,
        accuracy: AccuracyPredictor,
    ) -> None:
        _stand_in()
        sys.path.insert(0, str(folder))
        nas, elastic = "ofa.nas", "ofa.imagenet_classification.elastic_nn.networks"
        encoders = importlib.import_module(f"{nas}.accuracy_predictor")
        costs = importlib.import_module(f"{nas}.efficiency_predictor")
        self._finder = importlib.import_module(
            f"{nas}.search_algorithm"
        ).EvolutionFinder
        self._space, self._latency, self._accuracy = space, latency, accuracy
        stage = space.stages[0]
        kernels, expands, depths = (
            list(choices) for choices in (stage.kernels, stage.expands, stage.depths)
        )
        encoder = encoders.MobileNetArchEncoder(
            image_size_list=list(space.resolutions),
            ks_list=kernels,
            expand_list=expands,
            depth_list=depths,
        )
        self._predictor = _with_our_weights(
            encoders.AccuracyPredictor(encoder, device="cpu"), space, accuracy
        )
        self.plain = Prices(space, latency)
        prices = costs.MBv3LatencyTable.__new__(costs.MBv3LatencyTable)
        prices.lut = look_up_table(space, table)
        self.table = costs.Mbv3LatencyModel.__new__(costs.Mbv3LatencyModel)
        self.table.latency_tables = dict.fromkeys(space.resolutions, prices)
        self.table.ofa_net = importlib.import_module(elastic).OFAMobileNetV3(
            ks_list=kernels, expand_ratio_list=expands, depth_list=depths
        )

    def run(self, prices: Any, budget_ms: float, seed: int) -> Run:
        """Search once."""
        import torch

        random.seed(seed)
        np.random.seed(seed)  # noqa: TID251 - of which theirs draws, too
        start_s = time.perf_counter()
        # It prints a line or two, which do not belong among our results.
        with torch.no_grad(), redirect_stdout(sys.stderr):
            _, best = self._finder(prices, self._predictor).run_evolution_search(
                budget_ms, verbose=True
            )
        seconds = time.perf_counter() - start_s
        score, arch, _ = best
        row = self._space.encode(_config(self._space, arch))[None]
        accuracy = float(self._accuracy.predict(row)[0])
        ours = accuracy, float(self._latency.predict_ms(row)[0])
        theirs = float(score), float(prices.get_efficiency(arch))
        if not np.allclose(ours, theirs, rtol=1e-4):
            raise SystemExit(f"predictions differ: ours {ours}, theirs {theirs}")
        return Run(seconds=seconds, accuracy=accuracy)


def _with_our_weights(
    predictor: Any, space: SearchSpace, accuracy: AccuracyPredictor
) -> Any:
    """Their predictor with the weights of our only member, and our linear path beside.

    Their features are ordered by kind, ours by slot: kernel and expand in turn.
    """
    import torch

    stage = space.stages[0]
    kernels, expands = len(stage.kernels), len(stage.expands)
    first, slots = len(space.resolutions), space.slot_count
    starts = first + np.arange(slots)[:, None] * (kernels + expands)
    order = np.concatenate(
        [
            np.arange(first),
            (starts + np.arange(kernels)).ravel(),
            (starts + kernels + np.arange(expands)).ravel(),
        ]
    )
    (member,) = accuracy.weights
    tensors = [torch.from_numpy(np.array(array)) for array in member]
    tensors[0] = tensors[0][order]
    linear = torch.from_numpy(np.array(accuracy.linear[order, 0]))
    layers = [layer[0] for layer in predictor.layers[:-1]] + [predictor.layers[-1]]
    for layer, weight in zip(layers, tensors[0::2], strict=True):
        layer.weight.data = weight.T.contiguous()
    for layer, bias in zip(layers, tensors[1::2], strict=False):
        layer.bias.data = bias
    predictor.base_acc.data += accuracy.base_accuracy
    forward = predictor.forward
    predictor.forward = lambda features: forward(features) + features @ linear
    return predictor


def _config(space: SearchSpace, arch: dict[str, Any]) -> SubnetConfig:
    """One of their networks as ours."""
    depth = space.stages[0].max_depth
    return SubnetConfig(
        resolution=arch["image_size"],
        stages=tuple(
            tuple(
                BlockConfig(
                    kernel=arch["ks"][stage * depth + block],
                    expand=arch["e"][stage * depth + block],
                )
                for block in range(count)
            )
            for stage, count in enumerate(arch["d"])
        ),
    )


def _stand_in() -> None:
    for name in STAND_INS:
        module = sys.modules.setdefault(name, _StandIn(name))
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    sys.modules["tqdm"].tqdm = _Bar  # type: ignore[attr-defined]


class _Bar:
    """The progress bar that their search asks for, without drawing."""

    def __init__(self, **_: Any) -> None: ...

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, count: int) -> None:
        """Do nothing."""

    def set_postfix(self, told: dict[str, Any]) -> None:
        """Do nothing."""


class _StandIn(types.ModuleType):
    """A module that has every name, none of which does anything."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


if __name__ == "__main__":
    main()
