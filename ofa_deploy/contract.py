"""The closed loop: choose by prediction, confirm by measurement, certify, choose again.

A predictor is off by a percent or two, differently for each network and each day. So a
few networks around the budget are exported and their files timed against each other;
the most accurate that fits by that is finished, and timed once more in processes of its
own, and only what this shows is believed. Each answer corrects the next choice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ofa_deploy.assembly import VerifiedNetwork
from ofa_deploy.choosing import Chooser, ladder
from ofa_deploy.constraints import Constraints, binding, in_words
from ofa_deploy.errors import (
    BackendError,
    InfeasibleBudget,
    MeasurementError,
    RunFailed,
)
from ofa_deploy.evidence import Confirmed, Evidence
from ofa_deploy.space import SubnetConfig

# Networks certified at most: each takes several processes' time.
MAX_CERTIFIED = 5
# Once something was shown to keep everything, nothing better is begun that would end
# after this, if it took as long as the longest try before it: nobody waits longer for
# the last percents.
PATIENCE_S = 26.0
# What has missed so far gets all the room there is if, after the next try, there is no
# time for another that ends by then.
LONGEST_CALL_S = 28.0
# Times that networks are chosen and confirmed before one must do.
MAX_LADDERS = 6
# Steps of the ladder of candidates, in standard errors of the predictor.
LADDER = (1.5, 0.5, -0.5, -1.5)
# The same as shares of the limit, where those have led to nothing: what is far below it
# is still better than the fastest network of all.
WIDE_LADDER = (0.97, 0.9, 0.8, 0.6)
# More room than this is worth another try, as long as a better network may fit.
WASTED_SHARE = 0.06
# Of a latency: what is expected to leave more gives way to a look for one between.
ROOM_SHARE = 0.04
# A predictor that is further off says nothing of the ladder's steps.
MOST_RMS = 0.2


class Bench(Protocol):
    """Where files are made and timed; each network at most once in either way."""

    def confirm(self, configs: Sequence[SubnetConfig]) -> Mapping[str, Confirmed]:
        """Export networks, and time the files against each other; by id.

        Those that the runtime fails on are left out.
        """

    def certify(self, config: SubnetConfig) -> VerifiedNetwork:
        """Time a network's file in fresh processes, and hold it against all limits.

        Raises:
            RunFailed: The runtime fails on it.
        """


def fulfil(
    constraints: Constraints,
    *,
    chooser: Chooser,
    bench: Bench,
    where: str,
    clock_s: Callable[[], float] = time.monotonic,
) -> VerifiedNetwork:
    """The best network that was shown to keep the constraints.

    Args:
        constraints: What is asked.
        chooser: Finds networks by prediction.
        bench: Measures them.
        where: Names the device in messages.
        clock_s: Tells seconds, from any moment on.

    Raises:
        InfeasibleBudget: None keeps them, by prediction, or by what was measured.
        BackendError: The runtime failed on all of them, and nothing was shown to keep
            them before.
        MeasurementError: Nothing could be measured, or the table is stale; likewise.
    """
    evidence = Evidence(constraints=constraints, predictors=chooser.predictors)
    loop = _Loop(chooser=chooser, bench=bench, where=where, evidence=evidence)
    begun_s, longest_s = clock_s(), 0.0
    best: VerifiedNetwork | None = None
    try:
        while len(loop.tried) < MAX_CERTIFIED:
            tried_s = clock_s()
            late = tried_s + 2 * longest_s > begun_s + LONGEST_CALL_S
            evidence.hurries = late and best is None
            config = loop.next_config(better_than=best)
            if config is None:
                break
            found = loop.certify(config)
            if found is not None and found.met:
                best = _better(constraints, best, found)
            now_s = clock_s()
            longest_s = max(longest_s, now_s - tried_s)
            late = now_s + longest_s > begun_s + PATIENCE_S
            if best is not None and (late or not loop.wasteful(best)):
                break
    except (BackendError, MeasurementError):
        if best is None:  # else what was shown stays shown
            raise
    if best is not None:
        return replace(best, candidates=evidence.candidates())
    if loop.failures and not evidence.certified:
        raise next(iter(loop.failures.values()))
    raise loop.refusal()


def _better(
    constraints: Constraints, best: VerifiedNetwork | None, found: VerifiedNetwork
) -> VerifiedNetwork:
    """The one to keep of two that keep everything."""
    if best is None or constraints.min_accuracy is not None:
        return found
    return found if found.accuracy.value > best.accuracy.value else best


@dataclass(slots=True, kw_only=True)
class _Loop:
    """What one call has learnt so far."""

    chooser: Chooser
    bench: Bench
    where: str
    evidence: Evidence
    # Networks that the runtime failed on only when it was to certify them.
    failures: dict[str, RunFailed] = field(default_factory=dict)
    offered: set[str] = field(default_factory=set)
    ladders: int = 0

    @property
    def constraints(self) -> Constraints:
        """What is asked."""
        return self.evidence.constraints

    @property
    def tried(self) -> set[str]:
        """Networks that were to be certified, whatever came of it."""
        certified = {found.config.id for found in self.evidence.certified}
        return certified | self.failures.keys()

    def certify(self, config: SubnetConfig) -> VerifiedNetwork | None:
        """Certify a network; None where the runtime fails: others may do better."""
        try:
            found = self.bench.certify(config)
        except RunFailed as error:
            self.failures[config.id] = error
            return None
        self.evidence.certified.append(found)
        return found

    def wasteful(self, found: VerifiedNetwork) -> bool:
        """Whether a network leaves so much room that a better one may fit."""
        if self.constraints.min_accuracy is not None:
            return False
        return binding(found.verdicts).used_share < 1 - WASTED_SHARE

    # -- what comes next ---------------------------------------------------------------

    def next_config(
        self, *, better_than: VerifiedNetwork | None
    ) -> SubnetConfig | None:
        """The network to certify next; None where there is none."""
        if better_than is None and len(self.tried) == MAX_CERTIFIED - 1:
            return self._last_resort() or self._next_ready(None)
        return self._next_ready(better_than)

    def _next_ready(self, better_than: VerifiedNetwork | None) -> SubnetConfig | None:
        looked = False
        while True:
            ready = self._ready(better_than)
            enough = looked or self.evidence.hurries
            if ready and (enough or not self._leaves_room(ready[0])):
                break
            looked = bool(ready)
            try:
                if self.ladders >= MAX_LADDERS or not self._confirm_more(better_than):
                    break
            except (BackendError, MeasurementError):
                if not ready:  # else there is one that was confirmed
                    raise
                break
        if ready:
            return ready[0]
        return None if better_than is not None else self._last_resort()

    def _leaves_room(self, config: SubnetConfig) -> bool:
        """Whether a confirmed network is expected to leave much of a latency."""
        budget_ms = self.constraints.budget_ms
        if budget_ms is None or not self._only_latency:
            return False
        quiet_ms = self.evidence.confirmed[config.id].quiet_ms
        return self.evidence.excess * quiet_ms < (1 - ROOM_SHARE) * budget_ms

    def _ready(self, better_than: VerifiedNetwork | None) -> list[SubnetConfig]:
        """Confirmed networks expected to keep everything, the best first."""
        configs = [
            SubnetConfig.from_id(name)
            for name in self.evidence.confirmed
            if name not in self.tried
        ]
        fitting = [config for config in configs if self.evidence.fits(config)]
        if self.constraints.min_accuracy is not None:
            return sorted(fitting, key=lambda c: self.evidence.confirmed[c.id].quiet_ms)
        return self._more_accurate(fitting, better_than)

    def _more_accurate(
        self, configs: Sequence[SubnetConfig], than: VerifiedNetwork | None
    ) -> list[SubnetConfig]:
        """Those that are, the most accurate first."""
        accuracy = self.evidence.accuracy
        least = -1.0 if than is None else accuracy(than.config)
        better = [config for config in configs if accuracy(config) > least]
        return sorted(better, key=accuracy, reverse=True)

    def _confirm_more(self, better_than: VerifiedNetwork | None) -> bool:
        """Confirm the networks that are now expected to be best; whether any is new.

        Where nothing is predicted to keep a latency, the fastest network is left to
        measure: it may.
        """
        self.ladders += 1
        try:
            new = self._new_configs(better_than)
        except InfeasibleBudget:
            if self.offered or self._only_latency:
                return False
            new = self._hopeful()
        return self._confirm(new)

    def _new_configs(
        self, better_than: VerifiedNetwork | None
    ) -> Sequence[SubnetConfig]:
        """Networks at the steps of a ladder that were not offered before.

        Where all were and none of them fits, or for the last time, of a wide one.

        Raises:
            InfeasibleBudget: There is none at any step.
        """
        rms = min(MOST_RMS, self.chooser.predictors.latency.residual_ratio)
        ladders = [tuple(1 + step * rms for step in LADDER)]
        if not self._ready(better_than):
            ladders.append(WIDE_LADDER)
        for steps in ladders[-1:] if self.ladders == MAX_LADDERS else ladders:
            found = ladder(
                self.chooser, self.evidence.limits, steps=steps, without=self._failed
            )
            if better_than is not None:
                found = self._more_accurate(found, better_than)
            if new := [config for config in found if config.id not in self.offered]:
                return new
        return []

    @property
    def _failed(self) -> frozenset[str]:
        """Networks that the runtime could not run."""
        confirmed = self.evidence.confirmed.keys()
        return frozenset(self.offered - confirmed | self.failures.keys())

    def _hopeful(self) -> list[SubnetConfig]:
        """Networks that the predictor's error and nothing else may let in.

        Raises:
            InfeasibleBudget: Not even such ones.
        """
        asked, predictors = self.constraints, self.chooser.predictors
        limits, slack = self.evidence.limits, predictors.latency.upper_ratio
        budget_ms = None if asked.budget_ms is None else asked.budget_ms * slack
        try:
            return self.chooser.best(
                replace(limits, latency_ms=budget_ms), count=2, without=self._failed
            )
        except InfeasibleBudget as error:
            nearest = error.nearest
            told = "" if nearest is None else self._told_of(nearest)
            raise InfeasibleBudget(
                f"no network of {predictors.space.name} is predicted to keep all that "
                f"is asked for on {self.where}: "
                + ", ".join(
                    f"{name} {in_words(name, limit)}"
                    for name, limit in asked.limits.items()
                )
                + f"{told}. Loosen what it misses",
                budget_ms=asked.budget_ms,
                fastest_ms=None,
                nearest=nearest,
            ) from error

    def _told_of(self, name: str) -> str:
        told = ", ".join(
            f"{verdict.constraint} {verdict.told(verdict.bound)}"
            for verdict in self.evidence.expected(name)
        )
        return f"; the nearest, {name}, is predicted to have {told}"

    def _confirm(self, configs: Sequence[SubnetConfig]) -> bool:
        self.offered |= {config.id for config in configs}
        if configs:
            self.evidence.confirmed |= self.bench.confirm(configs)
        return bool(configs)

    def _last_resort(self) -> SubnetConfig | None:
        """The fastest network: if it misses, all do."""
        if not self._only_latency:
            return None
        predictors = self.chooser.predictors
        fastest = predictors.space.decode(predictors.fastest())
        if fastest.id in self.tried:
            return None
        if fastest.id not in self.offered:
            self._confirm([fastest])
        return fastest if fastest.id in self.evidence.confirmed else None

    @property
    def _only_latency(self) -> bool:
        asked = self.constraints
        others = (asked.size_bytes, asked.peak_memory_mb, asked.min_accuracy)
        return all(limit is None for limit in others)

    # -- refusals ----------------------------------------------------------------------

    def refusal(self) -> InfeasibleBudget:
        """Of what was measured, and missed."""
        asked, name = self.constraints, self.chooser.predictors.space.name
        evidence = self.evidence
        known = {found.config.id: found.verdicts for found in evidence.certified}
        # What was not even certified was confirmed, and expected to miss.
        known = known or {each: evidence.expected(each) for each in evidence.confirmed}
        if not known:
            return InfeasibleBudget(
                f"no network of {name} runs on {self.where} here: all "
                f"{len(self.offered)} that were tried failed. See `ofa-deploy doctor`",
                budget_ms=asked.budget_ms,
                fastest_ms=None,
            )
        nearest, verdicts = min(
            known.items(), key=lambda entry: binding(entry[1]).used_share
        )
        missed = binding(verdicts)
        if self._only_latency and asked.budget_ms is not None:
            message = (
                f"no network of {name} meets {asked.budget_ms:g} ms on {self.where} "
                f"here: the fastest, exported and timed, took up to {missed.bound:.4g} "
                "ms, its uncertainty included. Ask for more; or the machine may be "
                "busy (see `ofa-deploy doctor`), or the latency table out of date "
                "(`ofa-deploy profile`)"
            )
        else:
            message = (
                f"no network of {name} keeps all limits on {self.where} here: the "
                f"nearest, {nearest}, exported and measured, has {missed.constraint} "
                f"{missed.told(missed.bound)}; {missed.told(missed.limit)} is asked "
                "for. Loosen that"
            )
        return InfeasibleBudget(
            message + self._failures_told,
            budget_ms=asked.budget_ms,
            fastest_ms=next(
                (found.bound for found in verdicts if found.constraint == "latency"),
                None,
            ),
            nearest=nearest,
        )

    @property
    def _failures_told(self) -> str:
        if not self.failures:
            return ""
        return (
            f". Besides, {self.where} failed on {len(self.failures)} others: "
            f"{next(iter(self.failures.values()))}"
        )
