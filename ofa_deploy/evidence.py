"""What one call has measured, and what follows for networks that it has not."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from ofa_deploy.assembly import VerifiedNetwork
from ofa_deploy.choosing import PredictedLimits, Predictors
from ofa_deploy.constraints import MEGABYTE, ConstraintName, Constraints, Verdict
from ofa_deploy.space import Genomes, SubnetConfig
from ofa_deploy.verify import Candidate

# What a certified bound is expected to be of a confirmed latency, before it is known:
# its own uncertainty, of a percent, and that of both; and, where the budget is of slow
# runs or of another pace, what these usually add.
EXPECTED_RATIO, EXPECTED_RATIO_OTHERWISE = 1.02, 1.1
# A bound in the quiet state is seldom further above what was found.
USUAL_BOUND_RATIO = 1.03
# Room that is left besides after one miss, two, and more, or where time is short. The
# last says that the machine has slowed down, and may go on to. Of 5, 6, 8, 10 and 15 %
# the first left least unused in a simulation of calls on such machines, and missed no
# more often; on a device it has not been compared.
MISS_MARGINS = (0.0, 0.03, 0.05)
# Of the planned memory of a network that took too much.
MISSED_SHARE = 0.95
# An accuracy is predicted alone and among thousands, which differs in the last digits.
ROUNDING = 1e-6
MOST_ACCURACY = 1 - 1e-9


def expected_ratio(constraints: Constraints) -> float:
    """What a certified bound is expected to be of a latency, before any is known."""
    return EXPECTED_RATIO if constraints.is_plain else EXPECTED_RATIO_OTHERWISE


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """An exported file, timed against others.

    Args:
        quiet_ms: Its latency in the quiet state.
        size_bytes: Of what the runtime loads.
    """

    quiet_ms: float
    size_bytes: int


@dataclass(slots=True, kw_only=True)
class Evidence:
    """Files that were confirmed and certified, and expectations corrected by them.

    Args:
        constraints: What is asked.
        predictors: Whose predictions are corrected.
        hurries: Whether the next try has to do: it gets all the room there is.
        confirmed: By network, in this order.
        certified: Likewise.
    """

    constraints: Constraints
    predictors: Predictors
    hurries: bool = False
    confirmed: dict[str, Confirmed] = field(default_factory=dict)
    certified: list[VerifiedNetwork] = field(default_factory=list)

    def candidates(self) -> tuple[Candidate, ...]:
        """What was measured, in this order."""
        bounds_ms = {
            found.config.id: verdict.bound
            for found in self.certified
            for verdict in found.verdicts
            if verdict.constraint == "latency"
        }
        return tuple(
            Candidate(
                config_id=name,
                predicted_ms=self.predicted_ms(SubnetConfig.from_id(name)),
                confirmed_ms=found.quiet_ms,
                certified_ms=bounds_ms.get(name),
            )
            for name, found in self.confirmed.items()
        )

    def predicted_ms(self, config: SubnetConfig) -> float:
        """A network's latency, uncorrected."""
        return self.predictors.latency.estimate(config).ms

    def accuracy(self, config: SubnetConfig) -> float:
        """A network's accuracy, uncorrected, 0..1."""
        return float(self.predictors.accuracy(self._row(config.id))[0])

    def _row(self, name: str) -> Genomes:
        config = SubnetConfig.from_id(name)
        return self.predictors.space.encode(config)[None]

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
        """Certified bounds over confirmed latencies; after misses, the worst and more.

        What missed by a hair again and again would miss until nothing was left to try.
        """
        ratios = [self._excess_of(found) for found in self.certified]
        misses = sum(not found.verdict("latency").met for found in self.certified)
        if misses:
            last = len(MISS_MARGINS) - 1
            margin = MISS_MARGINS[last if self.hurries else min(misses - 1, last)]
            return max(ratios) * (1 + margin)
        if ratios:
            return median(ratios)
        return expected_ratio(self.constraints)

    def _excess_of(self, found: VerifiedNetwork) -> float:
        verdict = found.verdict("latency")
        bound = verdict.bound
        if self.constraints.is_plain:
            # Of a file that two processes were enough to give up, the bound is far
            # above what was found, and says nothing of the next file.
            bound = min(bound, USUAL_BOUND_RATIO * verdict.found)
        return bound / self.confirmed[found.config.id].quiet_ms

    @property
    def limits(self) -> PredictedLimits:
        """The constraints, as predictions must keep them to be kept."""
        asked = self.constraints
        return PredictedLimits(
            latency_ms=(
                None
                if asked.budget_ms is None
                else asked.budget_ms / (self.excess * self.slowdown)
            ),
            weight_bytes=(
                None
                if asked.size_bytes is None
                else max(1.0, asked.size_bytes - self._size_overhead_bytes)
            ),
            memory_bytes=(
                None
                if asked.peak_memory_mb is None
                else self._memory_limit_bytes(asked.peak_memory_mb)
            ),
            min_accuracy=(
                None
                if asked.min_accuracy is None
                else min(MOST_ACCURACY, asked.min_accuracy + self._optimism)
            ),
        )

    @property
    def _size_overhead_bytes(self) -> float:
        """What files hold besides the weights."""
        weight_bytes = self.predictors.sizes.weight_bytes
        return max(
            (
                found.size_bytes - float(weight_bytes(self._row(name))[0])
                for name, found in self.confirmed.items()
            ),
            default=0.0,
        )

    def _memory_limit_bytes(self, limit_mb: float) -> float:
        """What weights and activations may take, by what certified networks took.

        What a runtime takes besides grows with the model or does not. Two networks
        tell; of one alone the more hopeful is believed, and certified.
        """
        memory_bytes = self.predictors.sizes.memory_bytes
        limit_bytes = limit_mb * MEGABYTE
        known = [
            (
                found.verdict("memory").bound * MEGABYTE,
                float(memory_bytes(self._row(found.config.id))[0]),
            )
            for found in self.certified
        ]
        if not known:
            return limit_bytes
        known.sort(key=lambda pair: abs(pair[0] - limit_bytes))
        (measured, planned), *others = known
        besides = measured - planned
        hopeful = limit_bytes - besides
        if measured > 0:
            hopeful = max(hopeful, limit_bytes * planned / measured)
        for other_measured, other_planned in others[:1]:
            rise, step = other_measured - measured, other_planned - planned
            if rise * step > 0:
                hopeful = planned + step / rise * (limit_bytes - measured)
        # Not as much as one that took too much.
        missed = [plan for found, plan in known if found > limit_bytes]
        return max(1.0, min([hopeful, *(MISSED_SHARE * one for one in missed)]))

    @property
    def _optimism(self) -> float:
        """Predicted accuracies over measured ones; a hair, where none is measured."""
        gaps = [
            self.accuracy(found.config) - found.accuracy.value
            for found in self.certified
            if found.accuracy.kind == "measured"
        ]
        return max(0.0, median(gaps)) + ROUNDING if gaps else ROUNDING

    def fits(self, config: SubnetConfig) -> bool:
        """Whether a confirmed network is expected to keep all limits."""
        asked, found, limits = self.constraints, self.confirmed[config.id], self.limits
        if asked.size_bytes is not None and found.size_bytes > asked.size_bytes:
            return False
        if limits.memory_bytes is not None:
            memory = self.predictors.sizes.memory_bytes(self._row(config.id))
            if memory[0] > limits.memory_bytes:
                return False
        least = limits.min_accuracy
        if least is not None and self.accuracy(config) < least - ROUNDING:
            return False
        if asked.budget_ms is None:
            return True
        missed_ms = [
            self.confirmed[other.config.id].quiet_ms
            for other in self.certified
            if not other.verdict("latency").met
        ]
        # What is no faster than one that missed will miss, whatever the average says.
        faster = found.quiet_ms < min(missed_ms, default=float("inf"))
        return faster and self.excess * found.quiet_ms <= asked.budget_ms

    def expected(self, name: str) -> tuple[Verdict, ...]:
        """The verdicts on a network, as confirmed, and otherwise as predicted."""
        predictors, row = self.predictors, self._row(name)
        found = self.confirmed.get(name)
        bounds: dict[ConstraintName, float] = {
            "latency": (
                float(predictors.latency.predict_ms(row)[0])
                if found is None
                else self.excess * found.quiet_ms
            ),
            "size": (
                float(predictors.sizes.weight_bytes(row)[0])
                if found is None
                else found.size_bytes
            ),
            "memory": float(predictors.sizes.memory_bytes(row)[0]) / MEGABYTE,
            "accuracy": float(predictors.accuracy(row)[0]),
        }
        return tuple(
            Verdict(
                constraint=constraint,
                limit=limit,
                found=bounds[constraint],
                bound=bounds[constraint],
                evidence="predicted",
            )
            for constraint, limit in self.constraints.limits.items()
        )
