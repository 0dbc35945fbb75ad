"""The whole front of the ImageNet space against hundreds of single searches."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from evolution_speed import SHIPPED_MEMBERS
from inputs import console, new_parser
from made_up_accuracy import made_up_accuracy
from report import Section
from rich.progress import track

import latency_tables
from ofa_deploy.choosing import ERROR, LATENCY_MS, Predictors, find_front
from ofa_deploy.families import mbv3
from ofa_deploy.fronts import SEARCH
from ofa_deploy.predict.latency import fit_latency_predictor
from ofa_deploy.predict.sizes import network_sizes
from ofa_deploy.search.evolution import Evolution, within_latency
from ofa_deploy.search.pareto import Costs, hypervolume
from ofa_deploy.space import SearchSpace
from profilers.table import LatencyTable

SEED = 7
SEARCHES = 200
SEEDS = 3
MAX_SECONDS = 10.0
BACKEND = "openvino-cpu"


def main() -> None:
    """Search both ways, compare what they dominate, publish."""
    parser = new_parser(__doc__)
    parser.add_argument("--searches", type=int, default=SEARCHES)
    args = parser.parse_args()
    section = Section("frontier_quality", "Frontier", results=args.results)
    space = mbv3.imagenet(width=1.0)
    predictors = predictors_of(space)
    fronts, seconds = [], []
    for seed in track(range(SEEDS), "fronts", console=console, transient=True):
        start_s = time.perf_counter()
        fronts.append(find_front(predictors, SEARCH, seed=seed))
        seconds.append(time.perf_counter() - start_s)
    start_s = time.perf_counter()
    singles, predicted = single_searches(predictors, count=args.searches)
    single_s = time.perf_counter() - start_s
    everything = np.concatenate([singles, *(front.costs for front in fronts)])
    worst = everything.max(axis=0) * 1.001
    flat = [LATENCY_MS, ERROR]
    scale = np.prod(worst), np.prod(worst[flat])

    def volumes(costs: Costs) -> tuple[float, float]:
        return (
            hypervolume(costs, reference=worst) / scale[0],
            hypervolume(costs[:, flat], reference=worst[flat]) / scale[1],
        )

    rows, found = [], [volumes(front.costs) for front in fronts]
    for seed, (front, volume) in enumerate(zip(fronts, found, strict=True)):
        rows.append(
            row(
                f"front, seed {seed}",
                front.costs,
                volume,
                seconds=seconds[seed],
                predicted=front.evaluation_count,
            )
        )
    of_singles = volumes(singles)
    rows.append(
        row(
            f"{args.searches} searches",
            singles,
            of_singles,
            seconds=single_s,
            predicted=predicted,
        )
    )
    section.text(
        f"`{space.name}` ({space.count():.1e} networks), latencies by the {BACKEND} "
        f"table that comes with the package; an accuracy predictor with labels that "
        f"are made up, and as many members as are shipped ({SHIPPED_MEMBERS}). The "
        "searches have a population of 100 and 500 generations each, for budgets "
        "evenly spaced by ratio; all ten networks that each returns count. *volume* is "
        "the hypervolume of latency, error and size, as a share of the box to the "
        "worst of all networks found; *flat* that of latency and error alone."
    )
    section.table(
        ["", "networks", "volume", "flat", "seconds", "networks predicted"], rows
    )
    slowest_s = max(seconds)
    section.bar(
        f"the front in at most {MAX_SECONDS:g} s: {slowest_s:.1f} s, the slowest of "
        f"{SEEDS} seeds",
        passed=slowest_s <= MAX_SECONDS,
    )
    for place, label in enumerate(("latency, error and size", "latency and error")):
        least = min(volume[place] for volume in found)
        section.bar(
            f"hypervolume of {label} at least that of {args.searches} searches: "
            f"{least:.6f}, the least of {SEEDS} seeds, against {of_singles[place]:.6f}",
            passed=least >= of_singles[place],
        )
    section.publish()


def predictors_of(space: SearchSpace) -> Predictors:
    """Real latencies and sizes, made-up accuracies."""
    with console.status("fitting an accuracy predictor to made-up labels"):
        accuracy = made_up_accuracy(space, seed=SEED, members=SHIPPED_MEMBERS)
    return Predictors(
        latency=fit_latency_predictor(space, table_of(space)),
        accuracy=accuracy.predict,
        sizes=network_sizes(space),
    )


def table_of(space: SearchSpace) -> LatencyTable:
    """The table that comes with the package."""
    folder = Path(latency_tables.__path__[0])
    paths = sorted(folder.glob(f"{space.name}-*_{BACKEND}-*.json"))
    return LatencyTable.load(paths[0])


def single_searches(predictors: Predictors, *, count: int) -> tuple[Costs, int]:
    """Costs of all networks that searches for a budget each return; and how many."""
    space, latency = predictors.space, predictors.latency
    fastest = predictors.fastest()
    ends = latency.predict_ms(np.stack([fastest, space.encode(space.largest())]))
    found, predicted = [], 0
    budgets_ms = np.geomspace(1.01 * ends[0], ends[1], count)
    for seed, budget_ms in enumerate(
        track(budgets_ms, "searches", console=console, transient=True)
    ):
        problem = within_latency(
            space,
            accuracy=predictors.accuracy,
            latency_ms=latency.predict_ms,
            budget_ms=float(budget_ms),
        )
        result = Evolution().search(problem, np.random.default_rng(seed))
        found.append(predictors.costs(result.genomes))
        predicted += result.evaluation_count
    return np.concatenate(found), predicted


def row(
    label: str,
    costs: Costs,
    volume: tuple[float, float],
    *,
    seconds: float,
    predicted: int,
) -> list[str]:
    """Cells of one way to search."""
    return [
        label,
        f"{len(costs):,}",
        f"{volume[0]:.6f}",
        f"{volume[1]:.6f}",
        f"{seconds:.1f}",
        f"{predicted:,}",
    ]


if __name__ == "__main__":
    main()
