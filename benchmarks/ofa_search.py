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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from frontier_quality import BACKEND, predictors_of
from inputs import console, new_parser
from made_up_accuracy import made_up_accuracy
from report import Section
from rich.progress import track

from ofa_deploy.families import mbv3
from ofa_deploy.predict.accuracy import AccuracyPredictor
from ofa_deploy.predict.latency import LatencyPredictor
from ofa_deploy.search.dominance import promotion
from ofa_deploy.search.evolution import Evolution, within_latency
from ofa_deploy.space import SearchSpace, SubnetConfig

SEED = 7
SEEDS = 5
LEAST_RATIO = 100.0
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
    latency = predictors_of(space).latency
    accuracy = made_up_accuracy(space, seed=SEED, members=1)
    drawn = latency.predict_ms(space.sample(2_000, np.random.default_rng(SEED)))
    theirs_of = _their_search(args.ofa, space, latency, accuracy)
    rows, ratios, gaps = [], [], []
    for share in (0.1, 0.5):
        budget_ms = float(np.quantile(drawn, share))
        theirs, ours = [], []
        for seed in track(range(args.seeds), f"{budget_ms:.3g} ms", console=console):
            theirs.append(theirs_of(budget_ms, seed))
            ours.append(our_run(space, latency, accuracy, budget_ms, seed))
        rows += [row("ofa", budget_ms, theirs), row("ours", budget_ms, ours)]
        ratios.append(
            statistics.median(run.seconds for run in theirs)
            / statistics.median(run.seconds for run in ours)
        )
        worst = min(run.accuracy for run in ours)
        best, least = (f(run.accuracy for run in theirs) for f in (max, min))
        gaps.append((worst - best, best - least))
    section.text(
        f"`{space.name}`, {BACKEND}, 1 thread; population 100 and 500 generations on "
        "both sides, the published settings. `ofa` is asked one network at a time for "
        "its latency, as its interface has it, and a generation at a time for its "
        "accuracies, by its own predictor class with the weights of ours. The labels "
        "of that predictor are made up. Seeds of both sides in turn."
    )
    section.table(
        ["search", "budget ms", "seconds, median", "worst accuracy", "best accuracy"],
        rows,
    )
    section.bar(
        f"at least {LEAST_RATIO:g} times as fast: {min(ratios):.0f} times, the lesser "
        "of two budgets",
        passed=min(ratios) >= LEAST_RATIO,
    )
    section.bar(
        "our worst seed never below their best by more than their spread: "
        + ", ".join(f"{gap:+.4%} (spread {spread:.4%})" for gap, spread in gaps),
        passed=all(gap >= -spread for gap, spread in gaps),
    )
    section.publish()


def row(name: str, budget_ms: float, runs: list[Run]) -> list[str]:
    """Cells of one side and budget."""
    return [
        name,
        f"{budget_ms:.3f}",
        f"{statistics.median(run.seconds for run in runs):.3f}",
        f"{min(run.accuracy for run in runs):.4%}",
        f"{max(run.accuracy for run in runs):.4%}",
    ]


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
    found = Evolution().search(problem, np.random.default_rng(seed))
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


def _their_search(
    folder: Path,
    space: SearchSpace,
    latency: LatencyPredictor,
    accuracy: AccuracyPredictor,
) -> Any:
    """A budget and a seed to a run of their search."""
    import torch

    for name in STAND_INS:
        sys.modules.setdefault(name, _StandIn(name))
    sys.path.insert(0, str(folder))
    encoders = importlib.import_module("ofa.nas.accuracy_predictor")
    finder = importlib.import_module("ofa.nas.search_algorithm").EvolutionFinder
    stage = space.stages[0]
    encoder = encoders.MobileNetArchEncoder(
        image_size_list=list(space.resolutions),
        ks_list=list(stage.kernels),
        expand_list=list(stage.expands),
        depth_list=list(stage.depths),
    )
    predictor = _with_our_weights(
        encoders.AccuracyPredictor(encoder, device="cpu"), space, accuracy
    )
    prices = Prices(space, latency)

    def _require_same(score: float, arch: dict[str, Any]) -> None:
        """Refuse to compare searches that were told different things."""
        row = space.encode(_config(space, arch))[None]
        ours = float(accuracy.predict(row)[0]), float(latency.predict_ms(row)[0])
        theirs = score, prices.get_efficiency(arch)
        if not np.allclose(ours, theirs, rtol=1e-4):
            raise SystemExit(f"predictions differ: ours {ours}, theirs {theirs}")

    def run(budget_ms: float, seed: int) -> Run:
        random.seed(seed)
        np.random.seed(seed)  # noqa: TID251 - of which theirs draws, too
        start_s = time.perf_counter()
        with torch.no_grad():
            _, best = finder(prices, predictor).run_evolution_search(
                budget_ms, verbose=True
            )
        seconds = time.perf_counter() - start_s
        _require_same(float(best[0]), best[1])
        row = space.encode(_config(space, best[1]))[None]
        return Run(seconds=seconds, accuracy=float(accuracy.predict(row)[0]))

    return run


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
    from ofa_deploy.space import BlockConfig

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
