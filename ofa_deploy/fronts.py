"""The whole Pareto front of a supernet on a device, from one profile: `frontier`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ofa_deploy.choosing import ERROR, LATENCY_MS, WEIGHT_BYTES
from ofa_deploy.pipeline import (
    DEFAULT_SUPERNET,
    OnDrift,
    Specializer,
    require_seed,
)
from ofa_deploy.report.page import front_report
from ofa_deploy.reporting import Reporter
from ofa_deploy.search.pareto import Front, Nsga2, nondominated
from ofa_deploy.stored import StoredSupernet
from profilers.files import write_atomically

SEARCH = Nsga2()


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontNetwork:
    """A network that no other is better than in everything, by prediction.

    Args:
        config_id: Which.
        latency_ms: In the quiet state.
        accuracy: Top-1, 0..1.
        weight_bytes: Of its float32 weights.
        on_latency_front: No other is both faster and more accurate, sizes aside.
    """

    config_id: str
    latency_ms: float
    accuracy: float
    weight_bytes: int
    on_latency_front: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frontier:
    """A front, and the session that it belongs to.

    Args:
        session: Specialises for any budget, without another search.
        front: What was found.
    """

    session: Specializer
    front: Front

    @property
    def networks(self) -> list[FrontNetwork]:
        """All of it, fastest first."""
        space, costs = self.session.supernet.space, self.front.costs
        fast = nondominated(costs[:, [LATENCY_MS, ERROR]])
        return [
            FrontNetwork(
                config_id=space.decode(genome).id,
                latency_ms=float(cost[LATENCY_MS]),
                accuracy=float(np.clip(1 - cost[ERROR], 0.0, 1.0)),
                weight_bytes=round(float(cost[WEIGHT_BYTES])),
                on_latency_front=bool(on_front),
            )
            for genome, cost, on_front in zip(
                self.front.genomes, costs, fast, strict=True
            )
        ]

    def write_report(self, path: str | Path) -> None:
        """Write the page to look at: one HTML file, which needs no network."""
        page = front_report(
            predictor=self.session.predictor,
            table=self.session.table,
            front=self.front,
        )
        write_atomically(Path(path), page.encode())


def frontier(
    device: str,
    *,
    supernet: str | Path | StoredSupernet = DEFAULT_SUPERNET,
    threads: int | None = None,
    table: str | Path | None = None,
    on_drift: OnDrift = "refuse",
    search: Nsga2 = SEARCH,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Frontier:
    """The Pareto front of latency, accuracy and size, by prediction.

    The first call on a machine measures its latency table; later ones make sure that
    the machine is still what the table says.

    Args:
        device: Such as `openvino-cpu` or `openvino-cpu?threads=2`.
        supernet: Name in the zoo, folder of one that was trained, or one that is open.
        threads: Of one inference, instead of naming them in `device`.
        table: A latency table's file to use instead of looking for one.
        on_drift: See `Specializer`.
        search: And its settings.
        seed: Of the search.
        reporter: Told of progress.

    Raises:
        SpaceError: The seed is below 0.
        StaleTable: The machine is no longer what its table says.
        DeployError: The device, supernet or table cannot be used.
    """
    require_seed(seed)
    session = Specializer(
        device,
        supernet=supernet,
        threads=threads,
        table=table,
        on_drift=on_drift,
        reporter=reporter,
    )
    session.require_current()
    return Frontier(session=session, front=session.search_front(search, seed=seed))
