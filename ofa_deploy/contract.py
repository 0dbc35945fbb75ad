"""The closed loop: choose by prediction, confirm by measurement, certify, choose again.

A predictor is off by a percent or two, differently for each network and each day. So a
few networks around the budget are exported and their files timed against each other;
the most accurate that fits by that is timed once more, in processes of its own, and
only what this shows is believed. Each answer corrects what the next choice expects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from ofa_deploy.assembly import VerifiedNetwork
from ofa_deploy.choosing import Chooser, PredictedLimits, ladder
from ofa_deploy.constraints import MEGABYTE, Constraints, binding
from ofa_deploy.errors import InfeasibleBudget
from ofa_deploy.space import Genomes, SubnetConfig

# Networks certified at most: each takes several processes' time.
MAX_CERTIFIED = 5
# Times that networks are chosen and confirmed before one must do.
MAX_LADDERS = 4
# Steps of the ladder of candidates, in standard errors of the predictor.
LADDER = (1.5, 0.5, -0.5, -1.5)
# What a certified bound is expected to be of a confirmed latency, before it is known:
# its own uncertainty, of something over half a percent, and, where the budget is of
# slow runs or of another pace, what these usually add.
EXPECTED_RATIO, EXPECTED_RATIO_OTHERWISE = 1.01, 1.1
# More room than this is worth another try, as long as a better network may fit.
WASTED_SHARE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """An exported file, timed against others.

    Args:
        quiet_ms: Its latency in the quiet state.
        size_bytes: Of what the runtime loads.
    """

    quiet_ms: float
    size_bytes: int


class Bench(Protocol):
    """Where files are made and timed; each network at most once in either way."""

    def confirm(self, configs: Sequence[SubnetConfig]) -> Mapping[str, Confirmed]:
        """Export networks, and time the files against each other; by id."""

    def certify(self, config: SubnetConfig) -> VerifiedNetwork:
        """Time a network's file in fresh processes, and hold it against all limits."""


def fulfil(
    constraints: Constraints, *, chooser: Chooser, bench: Bench, where: str
) -> VerifiedNetwork:
    """The best network that was shown to keep the constraints.

    Args:
        constraints: What is asked.
        chooser: Finds networks by prediction.
        bench: Measures them.
        where: Names the device in messages.

    Raises:
        InfeasibleBudget: None keeps them, by prediction, or by what was measured.
    """
    loop = _Loop(constraints=constraints, chooser=chooser, bench=bench, where=where)
    best: VerifiedNetwork | None = None
    while len(loop.certified) < MAX_CERTIFIED:
        config = loop.next_config(better_than=best)
        if config is None:
            break
        found = bench.certify(config)
        loop.certified.append(found)
        if found.met:
            best = found
            if not loop.wasteful(found):
                return found
    if best is not None:
        return best
    raise loop.refusal()


@dataclass(slots=True, kw_only=True)
class _Loop:
    """What one call has learnt so far."""

    constraints: Constraints
    chooser: Chooser
    bench: Bench
    where: str
    confirmed: dict[str, Confirmed] = field(default_factory=dict)
    certified: list[VerifiedNetwork] = field(default_factory=list)
    ladders: int = 0

    # -- what is expected --------------------------------------------------------------

    def predicted_ms(self, config: SubnetConfig) -> float:
        return self.chooser.predictors.latency.estimate(config).ms

    def accuracy(self, config: SubnetConfig) -> float:
        return float(self.chooser.predictors.accuracy(self._row(config.id))[0])

    @property
    def slowdown(self) -> float:
        """Confirmed latencies over predicted ones."""
        ratios = [
            found.quiet_ms / self.predicted_ms(SubnetConfig.from_id(name))
            for name, found in self.confirmed.items()
        ]
        return median(ratios) if ratios else 1.0

    @property
    def excess(self) -> float:
        """Certified bounds over confirmed latencies."""
        ratios = [
            found.verdict("latency").bound / self.confirmed[found.config.id].quiet_ms
            for found in self.certified
        ]
        if ratios:
            return median(ratios)
        plain = self.constraints.percentile == 50 and self.constraints.rate_hz is None
        return EXPECTED_RATIO if plain else EXPECTED_RATIO_OTHERWISE

    @property
    def limits(self) -> PredictedLimits:
        """The constraints, as predictions must keep them to be kept."""
        asked = self.constraints
        return PredictedLimits(
            latency_ms=(
                None
                if asked.latency_ms is None
                else asked.latency_ms / (self.excess * self.slowdown)
            ),
            weight_bytes=(
                None
                if asked.size_bytes is None
                else max(1.0, asked.size_bytes - self._size_overhead_bytes)
            ),
            memory_bytes=(
                None
                if asked.peak_memory_mb is None
                else max(1.0, self._free_memory_bytes(asked.peak_memory_mb))
            ),
            min_accuracy=asked.min_accuracy,
        )

    @property
    def _size_overhead_bytes(self) -> float:
        """What files hold besides the weights."""
        weight_bytes = self.chooser.predictors.sizes.weight_bytes
        return max(
            (
                found.size_bytes - float(weight_bytes(self._row(name))[0])
                for name, found in self.confirmed.items()
            ),
            default=0.0,
        )

    def _free_memory_bytes(self, limit_mb: float) -> float:
        """What the runtime itself leaves of a limit."""
        memory_bytes = self.chooser.predictors.sizes.memory_bytes
        overhead = max(
            (
                found.verdict("memory").bound * MEGABYTE
                - float(memory_bytes(self._row(found.config.id))[0])
                for found in self.certified
            ),
            default=0.0,
        )
        return limit_mb * MEGABYTE - overhead

    def _row(self, name: str) -> Genomes:
        config = SubnetConfig.from_id(name)
        return self.chooser.predictors.space.encode(config)[None]

    def fits(self, config: SubnetConfig) -> bool:
        """Whether a confirmed network is expected to keep all limits."""
        asked, found = self.constraints, self.confirmed[config.id]
        if asked.size_bytes is not None and found.size_bytes > asked.size_bytes:
            return False
        if asked.peak_memory_mb is not None:
            memory = self.chooser.predictors.sizes.memory_bytes(self._row(config.id))
            if memory[0] > self._free_memory_bytes(asked.peak_memory_mb):
                return False
        if asked.latency_ms is None:
            return True
        missed_ms = [
            self.confirmed[other.config.id].quiet_ms
            for other in self.certified
            if not other.verdict("latency").met
        ]
        # What is no faster than one that missed will miss, whatever the average says.
        faster = found.quiet_ms < min(missed_ms, default=float("inf"))
        return faster and self.excess * found.quiet_ms <= asked.latency_ms

    # -- what comes next ---------------------------------------------------------------

    def next_config(
        self, *, better_than: VerifiedNetwork | None
    ) -> SubnetConfig | None:
        """The network to certify next; None where there is none."""
        while True:
            ready = self._ready(better_than)
            if ready:
                return ready[0]
            if self.ladders >= MAX_LADDERS or not self._confirm_more():
                break
        if better_than is not None:
            return None
        return self._last_resort()

    def _ready(self, better_than: VerifiedNetwork | None) -> list[SubnetConfig]:
        """Confirmed networks expected to keep everything, the best first."""
        tried = {found.config.id for found in self.certified}
        configs = [
            SubnetConfig.from_id(name) for name in self.confirmed if name not in tried
        ]
        fitting = [config for config in configs if self.fits(config)]
        if better_than is not None:
            least = self.accuracy(better_than.config)
            fitting = [config for config in fitting if self.accuracy(config) > least]
        if self.constraints.min_accuracy is not None:
            return sorted(fitting, key=lambda c: self.confirmed[c.id].quiet_ms)
        return sorted(fitting, key=self.accuracy, reverse=True)

    def _confirm_more(self) -> bool:
        """Confirm the networks that are now expected to be best; whether any is new."""
        self.ladders += 1
        rms = self.chooser.predictors.latency.residual_ratio
        try:
            configs = ladder(
                self.chooser,
                self.limits,
                steps=tuple(1 + step * rms for step in LADDER),
            )
        except InfeasibleBudget as error:
            if self.confirmed:
                return False
            raise self._predicted_refusal(error) from error
        new = [config for config in configs if config.id not in self.confirmed]
        if new:
            self.confirmed |= self.bench.confirm(new)
        return bool(new)

    def _last_resort(self) -> SubnetConfig | None:
        """The fastest network: if it misses, all do."""
        asked = self.constraints
        if asked.latency_ms is None or asked.min_accuracy is not None:
            return None
        predictors = self.chooser.predictors
        fastest = predictors.space.decode(predictors.fastest())
        if any(found.config == fastest for found in self.certified):
            return None
        if fastest.id not in self.confirmed:
            self.confirmed |= self.bench.confirm([fastest])
        return fastest

    def wasteful(self, found: VerifiedNetwork) -> bool:
        """Whether a network leaves so much room that a better one may fit."""
        if self.constraints.min_accuracy is not None:
            return False
        return binding(found.verdicts).used_share < 1 - WASTED_SHARE

    # -- refusals ----------------------------------------------------------------------

    def _predicted_refusal(self, error: InfeasibleBudget) -> InfeasibleBudget:
        asked, latency = self.constraints, self.chooser.predictors.latency
        only_latency = asked.size_bytes is None and asked.peak_memory_mb is None
        if not only_latency or asked.min_accuracy is not None:
            return error
        if error.fastest_ms is None or asked.latency_ms is None:
            return error
        return InfeasibleBudget(
            f"no network of {latency.space.name} meets {asked.latency_ms:g} ms on "
            f"{self.where} here; the fastest is predicted to take "
            f"{error.fastest_ms:.4g} ms. Ask for at least "
            f"{error.fastest_ms * latency.upper_ratio:.4g} ms",
            budget_ms=asked.latency_ms,
            fastest_ms=error.fastest_ms,
            nearest=error.nearest,
        )

    def refusal(self) -> InfeasibleBudget:
        """Of what was certified, and missed."""
        asked, name = self.constraints, self.chooser.predictors.space.name
        if not self.certified:
            return InfeasibleBudget(
                f"no network of {name} is expected to keep all limits on {self.where} "
                f"here: {len(self.confirmed)} were measured. Loosen them",
                budget_ms=asked.latency_ms,
                fastest_ms=None,
            )
        nearest = min(
            self.certified, key=lambda found: binding(found.verdicts).used_share
        )
        missed = binding(nearest.verdicts)
        if asked.latency_ms is None or missed.constraint != "latency":
            return InfeasibleBudget(
                f"no network of {name} keeps all limits on {self.where} here: the "
                f"nearest, exported and measured, has {missed.constraint} "
                f"{missed.bound:.6g}; {missed.limit:.6g} is asked for. Loosen that",
                budget_ms=asked.latency_ms,
                fastest_ms=None,
                nearest=nearest.config.id,
            )
        return InfeasibleBudget(
            f"no network of {name} meets {asked.latency_ms:g} ms on {self.where} here: "
            f"the fastest, exported and timed, took up to {missed.bound:.4g} ms, its "
            "uncertainty included. Ask for more; or the machine may be busy (see "
            "`ofa-deploy doctor`), or the latency table out of date (`ofa-deploy "
            "profile`)",
            budget_ms=asked.latency_ms,
            fastest_ms=missed.bound,
            nearest=nearest.config.id,
        )


def _above_zero(limit: float | None, overhead: float) -> float | None:
    """What is left of a limit; never nothing, which cannot be compared with."""
    return None if limit is None else max(1.0, limit - overhead)
