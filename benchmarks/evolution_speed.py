"""How fast the search is on the ImageNet space, whole populations at once."""

from __future__ import annotations

import inspect
import statistics
import time
from dataclasses import dataclass

import numpy as np
from inputs import console, new_parser
from report import Section
from rich.progress import track

from ofa_deploy.families import mbv3
from ofa_deploy.predict.accuracy import (
    AccuracyPredictor,
    AccuracySample,
    fit_accuracy_predictor,
)
from ofa_deploy.predict.latency import LatencyPredictor, ResidualRatios
from ofa_deploy.search.dominated_widths import promotion
from ofa_deploy.search.evolution import Evolution, SearchProblem, within_latency
from ofa_deploy.space import Genomes, SearchSpace

SEED = 5
REPEATS = 5
PLAIN_GENERATIONS = 5
MAX_SECONDS = 1.0
# As many as `fit_accuracy_predictor` trains unless told otherwise.
SHIPPED_MEMBERS: int = (
    inspect.signature(fit_accuracy_predictor).parameters["members"].default
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Of one search."""

    seconds: float
    networks_per_s: float


def main() -> None:
    """Time the search and the plain loop, with one member and with the shipped ones."""
    parser = new_parser(__doc__)
    parser.add_argument("--generations", type=int, default=500)
    args = parser.parse_args()
    section = Section("evolution_speed", "Search speed", results=args.results)
    evolution = Evolution(generations=args.generations)
    space = mbv3.imagenet(width=1.0)
    rows, seconds_by_members = [], {}
    for members in (1, SHIPPED_MEMBERS):
        problem = random_problem(space, members=members)
        repeats = track(range(REPEATS), "searching", console=console, transient=True)
        runs = [time_search(evolution, problem, seed=seed) for seed in repeats]
        seconds = statistics.median(run.seconds for run in runs)
        rate = statistics.median(run.networks_per_s for run in runs)
        with console.status("searching in a plain loop"):
            plain = time_plain_search(evolution, problem)
        seconds_by_members[members] = seconds
        label = f"{members} member{'s' if members > 1 else ''}"
        plain_s = plain.seconds / PLAIN_GENERATIONS * evolution.generations
        rows += [
            [f"{label}, arrays", f"{seconds:.2f}", f"{rate:,.0f}", "1"],
            [
                f"{label}, plain loop (extrapolated from {PLAIN_GENERATIONS} "
                "generations)",
                f"{plain_s:.0f}",
                f"{plain.networks_per_s:,.0f}",
                f"{plain_s / seconds:.0f}",
            ],
        ]
    section.text(
        f"Population {evolution.population}, {evolution.generations} generations on "
        f"`{space.name}` ({space.count():.1e} networks), the accuracy predictor with "
        "one member and with as many as are shipped, random weights and block times, "
        "dominated widths left out as `specialize` does; "
        f"median of {REPEATS} seeds. The plain loop breeds and predicts one network "
        "at a time, by the same rules."
    )
    section.table(["search", "seconds", "networks/s", "times as long"], rows)
    seconds = seconds_by_members[SHIPPED_MEMBERS]
    section.bar(
        f"{evolution.generations} generations with {SHIPPED_MEMBERS} members in at "
        f"most {MAX_SECONDS:g} s: {seconds:.2f} s",
        passed=seconds <= MAX_SECONDS,
    )
    section.publish()


def random_problem(space: SearchSpace, *, members: int) -> SearchProblem:
    """Predictors of the right sizes that know nothing, and a budget in the middle."""
    rng = np.random.default_rng(SEED)
    genomes = space.sample(64, rng)
    sample = AccuracySample(
        genomes=genomes, accuracy=rng.uniform(0.6, 0.8, 64), image_count=1_000
    )
    accuracy: AccuracyPredictor
    accuracy, _ = fit_accuracy_predictor(
        space, sample, rng=rng, members=members, epochs=2
    )
    sizes = (len(space.resolutions), space.slot_count, 3, 3)
    latency = LatencyPredictor(
        space=space,
        fixed_ms=rng.uniform(0.1, 0.2, sizes[0]),
        slot_ms=rng.uniform(0.05, 0.5, sizes),
        residuals=ResidualRatios(rms=0.03, low=0.94, high=1.06, upper=1.05, count=100),
    )
    drawn = latency.predict_ms(space.sample(1_000, rng))
    return within_latency(
        space,
        accuracy=accuracy.predict,
        latency_ms=latency.predict_ms,
        budget_ms=float(np.median(drawn)),
        promotion=promotion(space, latency.slot_ms),
    )


def time_search(evolution: Evolution, problem: SearchProblem, *, seed: int) -> Timing:
    """Run the library's search once."""
    start_s = time.perf_counter()
    result = evolution.search(problem, np.random.default_rng(seed))
    seconds = time.perf_counter() - start_s
    return Timing(seconds=seconds, networks_per_s=result.evaluation_count / seconds)


def time_plain_search(evolution: Evolution, problem: SearchProblem) -> Timing:
    """Run the same rules one network at a time, for a few generations."""
    plain = PlainSearch(evolution, problem, np.random.default_rng(SEED))
    population = plain.first_population()
    start_s = time.perf_counter()
    for _ in range(PLAIN_GENERATIONS):
        population = plain.next_generation(population)
    seconds = time.perf_counter() - start_s
    count = PLAIN_GENERATIONS * evolution.population
    return Timing(seconds=seconds, networks_per_s=count / seconds)


Individual = tuple[float, list[int]]


class PlainSearch:
    """The evolution as it is usually written: a loop over individuals.

    Args:
        evolution: Its settings.
        problem: What to maximise.
        rng: Source of all choices.
    """

    def __init__(
        self, evolution: Evolution, problem: SearchProblem, rng: np.random.Generator
    ) -> None:
        self._settings = evolution
        self._problem = problem
        self._rng = rng
        self._counts: list[int] = problem.space.choice_counts.tolist()

    def first_population(self) -> list[Individual]:
        """Random networks."""
        drawn = self._problem.space.sample(self._settings.population, self._rng)
        return [self._judge(row) for row in drawn[:, None]]

    def next_generation(self, population: list[Individual]) -> list[Individual]:
        """Survivors and their children."""
        settings = self._settings
        ordered = sorted(population, key=lambda one: one[0], reverse=True)
        parents = ordered[: round(settings.population * settings.parent_share)]
        mutant_count = round(settings.population * settings.mutant_share)
        children = []
        known = {tuple(genome) for _, genome in parents}
        for index in range(settings.population):
            child = self._pick(parents)
            if index < mutant_count:
                child = self._mutate(child)
            else:
                other = self._pick(parents)
                pairs = zip(child, other, strict=True)
                child = [a if self._rng.random() < 0.5 else b for a, b in pairs]
            row = self._canonical(child)
            if tuple(row[0].tolist()) not in known:
                known.add(tuple(row[0].tolist()))
                children.append(self._judge(row))
        return parents + children

    def _pick(self, parents: list[Individual]) -> list[int]:
        return parents[int(self._rng.integers(len(parents)))][1]

    def _mutate(self, genome: list[int]) -> list[int]:
        settings, result = self._settings, list(genome)
        first_slot = self._problem.space.first_slot_gene
        if self._rng.random() < settings.resolution_mutation:
            result[0] = self._draw(0)
        for gene in range(1, first_slot):
            if self._rng.random() < settings.block_mutation:
                result[gene] = self._draw(gene)
        for gene in range(first_slot, len(genome), 2):
            if self._rng.random() < settings.block_mutation:
                result[gene], result[gene + 1] = self._draw(gene), self._draw(gene + 1)
        return result

    def _draw(self, gene: int) -> int:
        return int(self._rng.integers(self._counts[gene]))

    def _canonical(self, genome: list[int]) -> Genomes:
        return self._problem.space.canonical(np.array([genome], dtype=np.int64))

    def _judge(self, row: Genomes) -> Individual:
        problem = self._problem
        load = problem.load(row)
        return float(problem.fitness(row, load)[0]), row[0].tolist()


if __name__ == "__main__":
    main()
