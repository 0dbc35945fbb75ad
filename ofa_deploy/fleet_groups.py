"""Which devices of a fleet share a network, decided exactly, by prediction."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.errors import InfeasibleBudget
from ofa_deploy.evidence import EXPECTED_RATIO, ROUNDING
from ofa_deploy.pipeline import EVOLUTION, Specializer
from ofa_deploy.search.evolution import Limit, SearchProblem
from ofa_deploy.space import Genomes, SearchSpace

# Of so many devices every group is searched for.
SEARCHED_DEVICES = 4

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Planner:
    """Candidates from every device's front, and who could run them.

    Args:
        space: Whose networks.
        budgets_ms: By device.
        genomes: The candidates, `(n, genes)`.
        accuracy: Theirs, `(n,)`.
        expected_ms: What is expected to be certified of each on each device,
            `(n, devices)`.
    """

    space: SearchSpace
    budgets_ms: Mapping[str, float]
    genomes: Genomes
    accuracy: Floats
    expected_ms: Floats

    @classmethod
    def of(
        cls,
        sessions: Mapping[str, Specializer],
        budgets_ms: Mapping[str, float],
        *,
        seed: int,
    ) -> Planner:
        """Candidates of the devices' fronts and groups.

        Args:
            sessions: By device.
            budgets_ms: Likewise.
            seed: Of the search for groups' candidates.
        """
        genomes: Genomes = np.unique(
            np.concatenate(
                [
                    *(session.front.genomes for session in sessions.values()),
                    _joint_networks(sessions, budgets_ms, seed=seed),
                ]
            ),
            axis=0,
        )
        first = next(iter(sessions.values()))
        expected_ms = [
            sessions[name].predictor.predict_ms(genomes) * EXPECTED_RATIO
            for name in budgets_ms
        ]
        return cls(
            space=first.supernet.space,
            budgets_ms=budgets_ms,
            genomes=genomes,
            accuracy=first.predictors.accuracy(genomes),
            expected_ms=np.stack(expected_ms, axis=1),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the devices."""
        return tuple(self.budgets_ms)

    @property
    def shares(self) -> Floats:
        """What is expected to be used of each budget, `(n, devices)`; 1 still fits."""
        return self.expected_ms / list(self.budgets_ms.values())

    def best_accuracy(self, members: tuple[int, ...]) -> float:
        """Of the best candidate that all of them can run; -inf if there is none."""
        fits = (self.shares[:, list(members)] <= 1).all(axis=1)
        return float(self.accuracy[fits].max()) if fits.any() else -np.inf

    def groups(self, count: int) -> list[tuple[str, ...]]:
        """The grouping into at most `count` with the highest mean accuracy.

        Exact, by dynamic programming over sets of devices.

        Raises:
            InfeasibleBudget: No grouping lets every device run something.
        """
        device_count = len(self.names)
        everyone = (1 << device_count) - 1
        value = {
            mask: mask.bit_count() * self.best_accuracy(_members(mask))
            for mask in range(1, everyone + 1)
        }
        # best[mask]: with so many groups, the value and the group of its lowest device.
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
        for _ in range(count):
            longer = dict(best)
            for mask in range(1, everyone + 1):
                lowest = mask & -mask
                part = mask
                while part:
                    if part & lowest and mask ^ part in best:
                        before, groups = best[mask ^ part]
                        total = before + value[part]
                        least, _ = longer.get(mask, (-np.inf, ()))
                        if total > least + ROUNDING:
                            longer[mask] = (total, (*groups, part))
                    part = (part - 1) & mask
            if longer == best:
                break  # more groups help nobody
            best = longer
        if everyone not in best:
            raise self._refusal(count)
        return [
            tuple(self.names[index] for index in _members(mask))
            for mask in best[everyone][1]
        ]

    def _refusal(self, count: int) -> InfeasibleBudget:
        """Of devices that no network suits, or of too few networks for all."""
        fastest_ms = self.expected_ms.min(axis=0)
        budgets_ms = list(self.budgets_ms.values())
        alone = [i for i, ms in enumerate(budgets_ms) if fastest_ms[i] > ms]
        told = ", ".join(
            f"{self.names[i]} {fastest_ms[i]:.4g} ms ({budgets_ms[i]:g} ms are asked "
            "for)"
            for i in alone or range(len(budgets_ms))
        )
        worst = max(alone, key=lambda i: fastest_ms[i] / budgets_ms[i], default=None)
        # The nearest: on the device that is furthest off, or on all together.
        used = self.shares.max(axis=1) if worst is None else self.shares[:, worst]
        return InfeasibleBudget(
            f"no network is expected to keep the budget of "
            f"{', '.join(self.names[i] for i in alone)}; the fastest takes on {told}. "
            "Ask for more milliseconds there"
            if alone
            else f"{'no network is' if count == 1 else f'no {count} networks are'} "
            f"expected to keep all budgets together; for itself the fastest takes on "
            f"{told}. Allow more models, or ask for more milliseconds",
            budget_ms=None if worst is None else budgets_ms[worst],
            fastest_ms=None if worst is None else float(fastest_ms[worst]),
            nearest=self.space.decode(self.genomes[used.argmin()]).id,
        )


def _joint_networks(
    sessions: Mapping[str, Specializer],
    budgets_ms: Mapping[str, float],
    *,
    seed: int,
) -> Genomes:
    """The best networks of groups of devices, `(n, genes)`.

    What two devices can both run may be on neither's own front. All groups of a few
    devices are searched for; of many, the pairs, and all together.
    """
    names = tuple(sessions)
    sizes = range(2, len(names) + 1) if len(names) <= SEARCHED_DEVICES else (2,)
    groups = [group for size in sizes for group in combinations(names, size)]
    if len(names) > SEARCHED_DEVICES:
        groups.append(names)
    found = []
    for group in groups:
        level = dict.fromkeys(group, EXPECTED_RATIO)
        with suppress(InfeasibleBudget):
            found.append(search_together(sessions, budgets_ms, level, seed=seed))
    genes = len(sessions[names[0]].supernet.space.choice_counts)
    return np.concatenate([np.empty((0, genes), dtype=np.int64), *found])


def _members(mask: int) -> tuple[int, ...]:
    return tuple(index for index in range(mask.bit_length()) if mask >> index & 1)


def search_together(
    sessions: Mapping[str, Specializer],
    budgets_ms: Mapping[str, float],
    level: Mapping[str, float],
    *,
    seed: int,
) -> Genomes:
    """The most accurate networks expected to keep a group's budgets, best first."""
    first = sessions[next(iter(level))]
    limits = tuple(
        Limit(
            label=f"latency on {name}",
            unit="ms",
            value=sessions[name].predictor.predict_ms,
            upper=budgets_ms[name] / ratio,
        )
        for name, ratio in level.items()
    )
    problem = SearchProblem(
        space=first.supernet.space,
        score=first.predictors.accuracy,
        limits=limits,
        landmarks=np.stack([sessions[name].predictors.fastest() for name in level]),
    )
    return EVOLUTION.search(problem, np.random.default_rng(seed)).genomes
