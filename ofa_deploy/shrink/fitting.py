"""The widest structure that keeps a budget, found by timing the file of each.

Weights do not change how fast a network is: its structure is settled before the hours
of fine-tuning.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ofa_deploy.constraints import Constraints, Verdict, binding
from ofa_deploy.errors import InfeasibleBudget
from ofa_deploy.evidence import expected_ratio
from ofa_deploy.exporting import ExportedNetwork
from ofa_deploy.reporting import Reporter
from ofa_deploy.shrink.cost import full_counts
from ofa_deploy.shrink.device_prices import DevicePrices
from ofa_deploy.shrink.masks import MaskedNetwork
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.ranking import ChannelOrder
from ofa_deploy.shrink.resume_store import recall, remember
from ofa_deploy.target import Target
from ofa_deploy.verify import Candidate, judge
from profilers.fresh import FreshMeasurement

# A structure whose certified latency is within these shares of the budget is kept: near
# it, and far enough below that the same structure, timed again, keeps it too.
NEAR_BUDGET = (0.96, 0.99)
AIMED_SHARE = 0.978
# What a killed call chose is kept up to here: hours of fine-tuning may be behind it, so
# that a moment's noise is no reason to choose anew. The file is certified in any case.
STILL_KEPT = 1.03
# Structures timed before the nearest must do.
MAX_FITS = 6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """A structure that was timed.

    Args:
        counts: Channels of each group.
        kept: Their indices.
        name: Of the structure.
        predicted_ms: By the device's prices.
        measurement: Of its file, in fresh processes.
        bound_ms: What was held against the budget, its uncertainty included.
        binding: The limit that leaves the least room, of all but the accuracy.
    """

    counts: tuple[int, ...]
    kept: tuple[Tensor, ...]
    name: str
    predicted_ms: float
    measurement: FreshMeasurement
    bound_ms: float
    binding: Verdict

    @property
    def used_share(self) -> float:
        """The most that it uses of any limit but the accuracy."""
        return self.binding.used_share

    @property
    def candidate(self) -> Candidate:
        """As a manifest tells it."""
        return Candidate(
            config_id=self.name,
            predicted_ms=self.predicted_ms,
            confirmed_ms=self.measurement.quiet_ms,
            certified_ms=self.bound_ms,
        )


@dataclass(slots=True, kw_only=True)
class Fitting:
    """A network's structures on one device, under one set of limits.

    Args:
        own: The network.
        masked: Its masked form, whose weights the timed files have.
        order: In which channels go.
        method: That found it.
        target: Where it is to run.
        constraints: What is asked for; a latency is among it.
        floors: Least channels of each group.
        prices: The device's.
        reporter: Told of stages.
        timed: What was timed so far.
    """

    own: OwnNetwork
    masked: MaskedNetwork
    order: ChannelOrder
    method: str
    target: Target
    constraints: Constraints
    floors: Sequence[int]
    prices: DevicePrices
    reporter: Reporter
    timed: list[Fitted] = field(default_factory=list)

    @property
    def budget_ms(self) -> float:
        """Latency that is asked for."""
        budget_ms = self.constraints.budget_ms
        assert budget_ms is not None
        return budget_ms

    def widest(self, *, memory: Path) -> Fitted:
        """The widest structure, in the order of channels, that keeps the limits.

        Each that is timed corrects the price.

        Args:
            memory: File of the counts that were chosen. What a killed call left there
                is taken if it keeps the limits still.

        Raises:
            InfeasibleBudget: None does, of those tried.
        """
        found = self._remembered(memory)
        if found is None:
            found = self._widest()
            remember(memory, found.counts)
        return found

    def _remembered(self, memory: Path) -> Fitted | None:
        """What a killed call chose, if it keeps the limits still."""
        if not memory.is_file():
            return None
        found = self.time(recall(memory))
        return found if found.used_share <= STILL_KEPT else None

    def _widest(self) -> Fitted:
        low, high = NEAR_BUDGET
        everything = tuple(group.channels for group in self.own.graph.groups)
        most_ms = self.budget_ms / expected_ratio(self.constraints)
        tried: list[Fitted] = []
        while len(tried) < MAX_FITS:
            counts = self._settle(most_ms)
            if any(tuple(counts) == found.counts for found in tried):
                break
            found = self.time(counts)
            tried.append(found)
            whole = found.counts == everything and found.used_share <= high
            if whole or low <= found.used_share <= high:
                return found
            most_ms = found.predicted_ms * AIMED_SHARE / found.used_share
        # With room for the next measurement's noise, or else with less.
        for limit in (high, 1.0):
            keeping = [found for found in tried if found.used_share <= limit]
            if keeping:
                return max(keeping, key=lambda found: found.used_share)
        raise self.infeasible(tried)

    def infeasible(self, tried: Sequence[Fitted]) -> InfeasibleBudget:
        """That none of some structures keeps the limits, to be raised."""
        nearest = min(tried, key=lambda found: found.used_share)
        missed = nearest.binding
        cure = "" if self.method == "tas" else ", or lower the recipe's floor"
        return InfeasibleBudget(
            f"no form of {self.own.family} that was timed keeps all limits on "
            f"{self.target.backend}: the nearest has a {missed.constraint} of "
            f"{missed.told(missed.bound)}, and {missed.told(missed.limit)} is asked "
            f"for. Ask for more{cure}",
            budget_ms=self.budget_ms,
            fastest_ms=nearest.bound_ms,
            nearest=nearest.name,
        )

    def narrower(
        self, fitted: Fitted, *, used_share: float, memory: Path
    ) -> Fitted | None:
        """The next structure below one that turned out to miss a limit.

        Args:
            fitted: That one.
            used_share: Of the limit that it misses; above 1.
            memory: As of `widest`.

        Returns:
            What keeps the limits; None if nothing does, of those tried.
        """
        if (remembered := self._remembered(memory)) is not None:
            return remembered
        for _ in range(MAX_FITS):
            counts = self._settle(fitted.predicted_ms * AIMED_SHARE / used_share)
            if tuple(counts) == fitted.counts:
                break
            fitted = self.time(counts)
            if fitted.used_share <= 1:
                remember(memory, fitted.counts)
                return fitted
            used_share = fitted.used_share
        return None

    def _settle(self, most_ms: float) -> list[int]:
        least_ms = self.price_ms(self.floors)
        return self.order.within(self.prices.price, max(most_ms, least_ms))

    def price_ms(self, counts: Sequence[int]) -> float:
        """Predicted latency of a structure."""
        return float(self.prices.price(torch.tensor(counts, dtype=torch.float64)))

    @property
    def full_ms(self) -> float:
        """Predicted latency of the whole network."""
        return float(self.prices.price(full_counts(self.own.graph)))

    def time(self, counts: Sequence[int]) -> Fitted:
        """Time the file of a structure."""
        kept = self.order.kept(counts)
        with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as name:
            exported = self.export(kept, Path(name))
            measurement = self.measure(exported)
            verdicts = judge(
                replace(self.constraints, latency_ms=self.budget_ms),
                measurement=measurement,
                files=exported,
                accuracy=None,  # before it is fine-tuned it says nothing
            )
        (bound_ms,) = (v.bound for v in verdicts if v.constraint == "latency")
        found = Fitted(
            counts=tuple(counts),
            kept=kept,
            name=exported.facts.name,
            predicted_ms=self.price_ms(counts),
            measurement=measurement,
            bound_ms=bound_ms,
            binding=binding(verdicts),
        )
        self.timed.append(found)
        return found

    def export(self, kept: Sequence[Tensor], folder: Path) -> ExportedNetwork:
        """Write what would be left of the network, with the weights that it has now."""
        return self.written(self.own.remainder(self.masked, kept), kept, folder)

    def written(
        self, trained: nn.Module, kept: Sequence[Tensor], folder: Path
    ) -> ExportedNetwork:
        """Write what is left of the network, once that was trained."""
        return self.own.export(
            trained, kept, method=self.method, target=self.target, folder=folder
        )

    def measure(self, exported: ExportedNetwork) -> FreshMeasurement:
        """Time a file as it is certified."""
        self.reporter.begin("certifying the exported file")
        return self.prices.measure(
            exported.folder / exported.model_file,
            target=self.target,
            asked=self.constraints,
            progress=self.reporter.advance,
        )
