"""LeGR: how norms of different layers compare is learned, once for all budgets.

Source: T.-W. Chin, R. Ding, C. Zhang, D. Marculescu, "Towards Efficient Model
Compression via Learned Global Ranking", CVPR 2020, and its code. Filters are ranked by
`alpha_l · ||filter||² + kappa_l`; the two numbers of each layer are evolved so that the
network pruned to the lowest budget of interest has the least loss. One order then
serves every budget. What is other than there: a group has one quota (see
`quota_floors`), and where channels go several at a time their mean score decides; at
least one layer is mutated, however few there are; a budget may be met exactly; several
children are bred at once, so that they can be judged side by side.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ofa_deploy.errors import SpaceError, TrainingError
from ofa_deploy.ranges import COUNT, POSITIVE, SHARE, WHOLE, require_in_range
from ofa_deploy.shrink.candidates import (
    CandidateImages,
    CandidateJob,
    validation_loss,
)
from ofa_deploy.shrink.cost import Price, full_counts
from ofa_deploy.shrink.groups import ChannelGraph
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.ranking import (
    RemovalOrder,
    Writer,
    group_scores,
    quota_floors,
    writers,
)
from ofa_deploy.shrink.resume_store import recall, remember
from profilers.device import available_cores

Floats = NDArray[np.float64]
STATE_FILE = "legr.json"
# Shares of the whole network's price at which the nested family is shown.
FAMILY_SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# How the spread of mutations falls: to this share of it at the last evaluation.
LAST_SPREAD = 0.2
# Networks that wait to be judged; all of a first population would fill the memory.
CANDIDATES_PER_CORE = 2


_COUNTS = (
    "evaluations",
    "population",
    "samples",
    "together",
    "training_count",
    "validation_count",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LegrSettings:
    """How rankings are learned; the published values, but for the tuning steps.

    Args:
        evaluations: Candidates judged in all, the first population among them.
        population: Candidates that live at a time.
        samples: Of a tournament, drawn with replacement.
        mutated_share: Of the layers, whose numbers change in a child.
        spread: Standard deviation of the logarithm of `alpha` at the beginning.
        safeguard: Share of each group's channels that is kept in any case.
        norm_power: See `writers`.
        tuning_steps: Of SGD before a candidate is judged; 0 re-estimates batch norms
            only.
        learning_rate: Of these steps.
        together: Children bred from one population, which can be judged side by side.
        training_count: Images to re-estimate batch norms on.
        validation_count: Held-out images to judge on.
        seed: Of everything random.
    """

    evaluations: int = 400
    population: int = 64
    samples: int = 16
    mutated_share: float = 0.1
    spread: float = 1.0
    safeguard: float = 0.1
    norm_power: int = 2
    tuning_steps: int = 0
    learning_rate: float = 0.01
    together: int = 8
    training_count: int = 1000
    validation_count: int = 2500
    seed: int = 0

    def __post_init__(self) -> None:
        require_in_range(self, COUNT, *_COUNTS)
        require_in_range(self, WHOLE, "tuning_steps", "seed")
        require_in_range(self, POSITIVE, "spread", "learning_rate")
        require_in_range(self, SHARE, "mutated_share", "safeguard")
        if self.norm_power not in (1, 2):
            raise SpaceError(
                f"norm_power={self.norm_power}; give 2 for squared norms, or 1"
            )
        if self.evaluations < self.population:
            raise SpaceError(
                f"evaluations={self.evaluations} for a population of {self.population};"
                " give at least as many"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Affine:
    """What makes norms of different layers comparable.

    Args:
        alpha: Factor of each layer, above 0, `(layers,)`.
        kappa: Added to each layer, `(layers,)`.
    """

    alpha: Floats
    kappa: Floats

    @classmethod
    def plain(cls, layers: int) -> Affine:
        """Norms as they are."""
        return cls(alpha=np.ones(layers), kappa=np.zeros(layers))


def affine_scores(
    graph: ChannelGraph, sources: Sequence[Writer], affine: Affine
) -> list[Floats]:
    """Scores of each group's channels.

    Args:
        graph: Of the channels.
        sources: Layers that write them.
        affine: Numbers of these layers.
    """
    scores = [
        alpha * source.norms + kappa
        for source, alpha, kappa in zip(
            sources, affine.alpha, affine.kappa, strict=True
        )
    ]
    return group_scores(graph, sources, scores)


@dataclass(slots=True)
class Population:
    """Candidates that live, what they were judged, and the best that ever was.

    Evaluation `i` takes slot `i % population`: always that of the oldest.

    Args:
        alpha: `(population, layers)`.
        kappa: `(population, layers)`.
        losses: `(population,)`; infinite where nobody lives yet, and of candidates
            whose outputs are no numbers.
        done: Evaluations so far.
        seconds: That these took, over all sittings.
        best: The best so far; None before the first.
        best_loss: Its loss.
        history: Best loss after each evaluation; infinite before the first number.
    """

    alpha: Floats
    kappa: Floats
    losses: Floats
    done: int = 0
    seconds: float = 0.0
    best: Affine | None = None
    best_loss: float = float("inf")
    history: list[float] = field(default_factory=list)

    @classmethod
    def empty(cls, size: int, layers: int) -> Population:
        """Before the first evaluation."""
        return cls(
            alpha=np.ones((size, layers)),
            kappa=np.zeros((size, layers)),
            losses=np.full(size, np.inf),
        )

    def take(self, candidate: Affine, loss: float) -> None:
        """Let a judged candidate live in place of the oldest."""
        slot = self.done % len(self.losses)
        self.alpha[slot], self.kappa[slot] = candidate.alpha, candidate.kappa
        self.losses[slot] = loss
        self.done += 1
        if self.best is None or loss < self.best_loss:
            self.best, self.best_loss = candidate, loss
        self.history.append(self.best_loss)


def bred(
    population: Population,
    index: int,
    *,
    settings: LegrSettings,
    kappa_spread: Floats,
) -> Affine:
    """The candidate of evaluation `index`.

    Args:
        population: Candidates that live.
        index: From 0.
        settings: How.
        kappa_spread: Standard deviation of each layer's norms, `(layers,)`.
    """
    rng = np.random.default_rng([settings.seed, index])
    layers = len(kappa_spread)
    if index == settings.population - 1:
        return Affine.plain(layers)
    if index < settings.population:
        return Affine(
            alpha=np.exp(rng.normal(0.0, settings.spread, layers)),
            kappa=rng.normal(0.0, 1.0, layers) * kappa_spread,
        )
    drawn = rng.integers(len(population.losses), size=settings.samples)
    winner = int(drawn[np.argmin(population.losses[drawn])])
    alpha, kappa = population.alpha[winner].copy(), population.kappa[winner].copy()
    share = index / settings.evaluations
    spread = settings.spread * (1 - (1 - LAST_SPREAD) * share)
    for _ in range(max(1, int(settings.mutated_share * layers))):
        layer = int(rng.integers(layers))
        alpha[layer] *= np.exp(rng.normal(0.0, spread))
        kappa[layer] += rng.normal(0.0, 1.0) * kappa_spread[layer]
    return Affine(alpha=alpha, kappa=kappa)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One of the nested networks that a ranking leaves.

    Args:
        price: In the price's unit.
        counts: Channels of each group.
        loss: On the held-out images, before anything is fine-tuned; None where it is
            no number.
    """

    price: float
    counts: tuple[int, ...]
    loss: float | None


class RankingSearch:
    """Learns one ranking of a network's channels, at the lowest budget of interest.

    Args:
        own: The network; not changed.
        price: Of channel counts.
        most: The lowest budget of interest, in the price's unit.
        step: Channel counts are multiples of this.
        floors: Least channels of each group; None for the safeguard's quotas.
        settings: How.
        images: To judge candidates on.
        folder: Keeps what was judged, so that a search that was killed goes on; None
            to keep nothing.

    Raises:
        SpaceError: The safeguards cost more than the budget.
        TrainingError: The folder holds another search.
    """

    def __init__(
        self,
        own: OwnNetwork,
        *,
        price: Price,
        most: float,
        step: int,
        settings: LegrSettings,
        images: CandidateImages,
        floors: Sequence[int] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.own, graph = own, own.graph
        self.price, self.most, self.step = price, most, step
        self.settings, self.images, self.folder = settings, images, folder
        self.sources = writers(own.module, graph, norm_power=settings.norm_power)
        self.floors = list(
            floors or quota_floors(graph, safeguard=settings.safeguard, step=step)
        )
        self._kappa_spread = np.array([source.norms.std() for source in self.sources])
        self.order(Affine.plain(len(self.sources))).within(price, most)
        self.population = Population.empty(settings.population, len(self.sources))
        self._subject = self._digest()
        if folder is not None and (folder / STATE_FILE).is_file():
            self._restore(folder / STATE_FILE)

    def order(self, affine: Affine) -> RemovalOrder:
        """The order in which channels go by a ranking."""
        scores = affine_scores(self.own.graph, self.sources, affine)
        return RemovalOrder(scores, step=self.step, floors=self.floors)

    def run(
        self,
        executor: Executor,
        on_evaluation: Callable[[Population], None] | None = None,
    ) -> Affine:
        """Judge all candidates that are left; returns the best ever.

        Args:
            executor: Runs the judging; of processes, threads, or another engine's.
            on_evaluation: Called with the population, after each evaluation.

        Raises:
            TrainingError: No candidate's outputs are numbers.
        """
        settings, began_s = self.settings, time.monotonic()
        while self.population.done < settings.evaluations:
            self._require_numbers()
            first = self.population.done
            # The first ones have no parents: all can be judged side by side.
            end = min(first + settings.together, settings.evaluations)
            if first < settings.population:
                end = settings.population
            brood = [
                bred(
                    self.population,
                    index,
                    settings=settings,
                    kappa_spread=self._kappa_spread,
                )
                for index in range(first, end)
            ]
            kept = (self._kept(one, self.most) for one in brood)
            for one, loss in zip(brood, self._judged(kept, executor), strict=True):
                self.population.take(one, loss)
                now_s = time.monotonic()
                self.population.seconds += now_s - began_s
                began_s = now_s
                # Others must be bred again from the parents that they had.
                if first < settings.population or self.population.done == end:
                    self._save()
                if on_evaluation is not None:
                    on_evaluation(self.population)
        self._require_numbers()
        assert self.population.best is not None
        return self.population.best

    def _require_numbers(self) -> None:
        """Stop after a first population of which nobody can be told from another."""
        done = self.population.done
        if done >= self.settings.population and np.isinf(self.population.best_loss):
            raise TrainingError(
                f"the loss of all {done} candidates is no number: what is left of the "
                "network overflows on these images. Look at its outputs, or take a "
                "higher budget"
            )

    def family(self, affine: Affine, executor: Executor) -> tuple[Member, ...]:
        """The networks of a ranking at some prices, cheapest first.

        Each keeps what the ones before it keep: further budgets are cut from the same
        ranking.

        Args:
            affine: The ranking.
            executor: Runs the judging.
        """
        full = float(self.price(full_counts(self.own.graph)))
        least = float(self.price(torch.tensor(self.floors, dtype=torch.float64)))
        prices = [s * full for s in FAMILY_SHARES if s * full >= max(least, self.most)]
        kept = [self._kept(affine, most) for most in sorted({self.most, *prices})]
        counts = [tuple(len(indices) for indices in one) for one in kept]
        return tuple(
            Member(
                price=float(self.price(torch.tensor(count, dtype=torch.float64))),
                counts=count,
                loss=loss if np.isfinite(loss) else None,
            )
            for count, loss in zip(counts, self._judged(kept, executor), strict=True)
        )

    def _judged(
        self, kept: Iterable[Sequence[Tensor]], executor: Executor
    ) -> Iterator[float]:
        """Losses of candidates in turn, of which no more than a few are there at once.

        Args:
            kept: Channels that stay, of each candidate.
            executor: Runs the judging.
        """
        most = max(self.settings.together, CANDIDATES_PER_CORE * available_cores())
        jobs: deque[Future[float]] = deque()
        for one in kept:
            if len(jobs) == most:
                yield _or_worst(jobs.popleft().result())
            jobs.append(executor.submit(validation_loss, self._job(one)))
        while jobs:
            yield _or_worst(jobs.popleft().result())

    def _kept(self, affine: Affine, most: float) -> tuple[Tensor, ...]:
        """Channels that a ranking keeps at a price."""
        order = self.order(affine)
        return order.kept(order.within(self.price, most))

    def _job(self, kept: Sequence[Tensor]) -> CandidateJob:
        return CandidateJob(
            module=self.own.candidate(kept),
            seed=self.settings.seed,
            images=self.images,
            tuning_steps=self.settings.tuning_steps,
            learning_rate=self.settings.learning_rate,
        )

    # -- what a killed search goes on from ---------------------------------------------

    def _digest(self) -> str:
        """Of everything that decides the search."""
        digest = hashlib.sha256()
        graph = self.own.graph
        decides = [asdict(self.settings), self.most, self.step, self.price.unit]
        decides += [float(self.price(full_counts(graph))), self.images.sha256]
        decides += [self.floors, [group.name for group in graph.groups]]
        decides += [self.own.sha256]
        digest.update(json.dumps(decides, sort_keys=True).encode())
        return digest.hexdigest()

    def _save(self) -> None:
        if self.folder is None:
            return
        population, best = self.population, self.population.best
        assert best is not None
        content = {
            "subject": self._subject,
            "alpha": population.alpha.tolist(),
            "kappa": population.kappa.tolist(),
            "losses": [None if np.isinf(x) else x for x in population.losses.tolist()],
            "done": population.done,
            "seconds": population.seconds,
            "best": {"alpha": best.alpha.tolist(), "kappa": best.kappa.tolist()},
            "history": [None if np.isinf(x) else x for x in population.history],
        }
        remember(self.folder / STATE_FILE, content)

    def _restore(self, path: Path) -> None:
        content = recall(path)
        if content["subject"] != self._subject:
            raise TrainingError(
                f"{path} is of another search: of another network, budget or settings. "
                "Continue with the same, or name another folder"
            )
        population = self.population
        population.alpha[:] = content["alpha"]
        population.kappa[:] = content["kappa"]
        population.losses[:] = [np.inf if x is None else x for x in content["losses"]]
        population.done = content["done"]
        population.seconds = content["seconds"]
        population.history = [np.inf if x is None else x for x in content["history"]]
        population.best_loss = population.history[-1]
        population.best = Affine(
            alpha=np.array(content["best"]["alpha"]),
            kappa=np.array(content["best"]["kappa"]),
        )


def _or_worst(loss: float) -> float:
    """What is no number is worse than anything."""
    return loss if np.isfinite(loss) else float("inf")
