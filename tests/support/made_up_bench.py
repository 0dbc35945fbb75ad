"""A device that is made up: it times networks by a law, and writes no file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from ofa_deploy.assembly import VerifiedNetwork
from ofa_deploy.choosing import Chooser, Predictors, find_front
from ofa_deploy.constraints import Constraints
from ofa_deploy.errors import RunFailed
from ofa_deploy.evidence import Confirmed
from ofa_deploy.exporting import ExportedNetwork, NetworkFacts
from ofa_deploy.plan import lower
from ofa_deploy.predict.latency import fit_latency_predictor
from ofa_deploy.predict.sizes import network_sizes
from ofa_deploy.search.evolution import Evolution
from ofa_deploy.search.pareto import Nsga2
from ofa_deploy.space import SubnetConfig
from ofa_deploy.target import Target
from ofa_deploy.verify import AccuracyClaim, judge
from profilers import LatencyTable
from tests.support import tiny
from tests.support.tiny_session import fresh, table_here

TARGET = Target(backend="onnxruntime-cpu", threads=1)
# A network to a latency in ms.
Law = Callable[[SubnetConfig], float]
SIZE_OVERHEAD_BYTES = 5_000
MEMORY_OVERHEAD_MB = 3.0
# Of a certified network: enough for any percentile.
RUNS = 1_500


@lru_cache(maxsize=1)
def _table() -> LatencyTable:
    return table_here("onnxruntime-cpu")


def chooser(*, search: Nsga2 | None = None) -> Chooser:
    """By a table whose latencies grow with the work, on the tiny space."""
    latency = fit_latency_predictor(tiny.SPACE, _table())
    predictors = Predictors(
        latency=latency,
        accuracy=tiny.predictor().predict,
        sizes=network_sizes(tiny.SPACE),
    )
    search = search or Nsga2(population=40, generations=20, polish=20_000)
    return Chooser(
        predictors=predictors,
        front=find_front(predictors, search),
        evolution=Evolution(generations=20),
    )


@dataclass(frozen=True)
class MadeUpFiles:
    """Files of a size; they compress not at all."""

    loaded_bytes: int

    @property
    def compressed_bytes(self) -> int:
        return self.loaded_bytes


@dataclass(slots=True, kw_only=True)
class MadeUpBench:
    """A `Bench` that times by laws.

    Args:
        predictors: What was expected of the networks.
        constraints: What they are held against.
        quiet: Latency when confirmed.
        certified: Latency when certified, of the quiet one; by the number of networks
            certified before.
        error_ratio: Standard error of a certified latency, as a share of it; by the
            number of networks certified before.
        memory_mb: That is measured of a network.
        optimism: Predicted accuracies less measured ones; 0 where none is measured.
        broken: Ids of networks that the runtime fails on.
        breaking: Ids of networks that it fails on once they are to be certified.
        optimism_of: The same by the number of networks certified before; None to have
            `optimism` throughout.
        spread: Share by which the slowest run of a network takes longer than its
            latency; the others lie evenly between.
        fails_after: Networks certified until the device fails; None if it never does.
        failure: What it then raises.
        fails_to: What it then fails to do, `confirm` or `certify`.
        confirmed: Ids in order.
        tried: Networks certified, in order.
        failed: Ids of networks that it failed to certify, in order.
    """

    predictors: Predictors
    constraints: Constraints
    quiet: Law
    certified: Callable[[int], float] = lambda count: 1.0
    error_ratio: Callable[[int], float] = lambda count: 0.0
    memory_mb: Callable[[SubnetConfig], float] = lambda config: 1.0
    optimism: float = 0.0
    optimism_of: Callable[[int], float] | None = None
    broken: set[str] = field(default_factory=set)
    breaking: set[str] = field(default_factory=set)
    spread: float = 0.0
    fails_after: int | None = None
    failure: Exception | None = None
    fails_to: str = "certify"
    confirmed: list[str] = field(default_factory=list)
    tried: list[VerifiedNetwork] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def confirm(self, configs: Sequence[SubnetConfig]) -> Mapping[str, Confirmed]:
        """See `Bench`."""
        self._fail_at("confirm")
        self.confirmed += [config.id for config in configs]
        return {
            config.id: Confirmed(
                quiet_ms=self.quiet(config), size_bytes=self.size_bytes(config)
            )
            for config in configs
            if config.id not in self.broken
        }

    def certify(self, config: SubnetConfig) -> VerifiedNetwork:
        """See `Bench`."""
        self._fail_at("certify")
        if config.id in self.breaking:
            self.failed.append(config.id)
            raise RunFailed(f"{config.id} crashed")
        latency_ms = self.quiet(config) * self.certified(len(self.tried))
        plan = lower(tiny.SPACE, config)
        found = fresh(latency_ms, error_ratio=self.error_ratio(len(self.tried)))
        (visit,) = found.visits
        measurement = replace(
            found,
            visits=(replace(visit, samples_ns=self._samples_ns(latency_ms)),),
            memory_mb=self.memory_mb(config),
        )
        row = tiny.SPACE.encode(config)[None]
        optimism = self.optimism
        if self.optimism_of is not None:
            optimism = self.optimism_of(len(self.tried))
        value = float(self.predictors.accuracy(row)[0]) - optimism
        accuracy = AccuracyClaim(
            kind="measured" if optimism else "predicted",
            value=value,
            low=value,
            high=value,
            image_count=1,
        )
        self.tried.append(
            VerifiedNetwork(
                exported=ExportedNetwork(
                    facts=NetworkFacts.of(plan),
                    reference=lambda inputs: inputs,
                    target=TARGET,
                    folder=Path(),
                    model_file="model.onnx",
                ),
                measurement=measurement,
                predicted=self.predictors.latency.estimate(config),
                accuracy=accuracy,
                constraints=self.constraints,
                verdicts=judge(
                    self.constraints,
                    measurement=measurement,
                    files=MadeUpFiles(self.size_bytes(config)),
                    accuracy=accuracy,
                ),
                device=_table().device,
                runtime=_table().runtime,
            )
        )
        return self.tried[-1]

    def _fail_at(self, step: str) -> None:
        due = len(self.tried) == self.fails_after and self.fails_to == step
        if self.failure is not None and due:
            raise self.failure

    def _samples_ns(self, latency_ms: float) -> tuple[int, ...]:
        shares = np.linspace(0.0, self.spread, RUNS)
        return tuple(np.rint(latency_ms * 1e6 * (1 + shares)).astype(int).tolist())

    def size_bytes(self, config: SubnetConfig) -> int:
        """Of the file, were there one."""
        row = tiny.SPACE.encode(config)[None]
        return round(float(self.predictors.sizes.weight_bytes(row)[0])) + (
            SIZE_OVERHEAD_BYTES
        )
