"""Whether bundles meet their budgets, timed again after all of them are made."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from inputs import add_supernet, console, new_parser, open_session, time_models
from report import Section
from rich.progress import track

from ofa_deploy.bundle import Bundle
from ofa_deploy.errors import InfeasibleBudget
from ofa_deploy.pipeline import Specializer
from profilers.measurement import Measurement, MeasureSettings, ModelUnderTest

SEED = 3
SETTINGS = MeasureSettings.certify(seed=SEED)
BUDGET_COUNT = 10
LEAST_MET = 9
# The least budget, over the fastest network's prediction.
HEADROOM = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A budget, the bundle made for it (None: infeasible), and the time it took."""

    budget_ms: float
    bundle: Bundle | None
    seconds: float


def main() -> None:
    """Specialise for each budget, time all again, publish."""
    parser = new_parser(__doc__)
    add_supernet(parser)
    args = parser.parse_args()
    section = Section("budgets", "Budgets", results=args.results)
    session = open_session("openvino-cpu", args.supernet)
    reachable = session.reachable()
    budgets = np.geomspace(
        HEADROOM * reachable.fastest_ms, reachable.slowest_ms, BUDGET_COUNT
    )
    with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as folder:
        attempts = [
            attempt(session, float(budget_ms), Path(folder) / f"budget-{index}")
            for index, budget_ms in enumerate(
                track(budgets, "specialising", console=console, transient=True)
            )
        ]
        again = time_again(session, attempts)
    section.text(
        f"{BUDGET_COUNT} budgets, evenly spaced by ratio from {HEADROOM:g} times the "
        f"fastest network's prediction ({reachable.fastest_ms:.4f} ms) to the slowest "
        f"({reachable.slowest_ms:.4f} ms), on {session.runtime.backend}, "
        f"{session.target.threads} thread(s). *verified* is what the bundle records, "
        "timed in three fresh processes when it was made; *again* is an independent "
        "timing of all models in one shuffled run afterwards."
    )
    publish(section, attempts, again)


def attempt(session: Specializer, budget_ms: float, out: Path) -> Attempt:
    """Specialise once."""
    start_s = time.perf_counter()
    try:
        bundle = session.specialize(budget_ms, out=out)
    except InfeasibleBudget as error:
        console.print(f"{budget_ms:.4f} ms: {error}", markup=False)
        bundle = None
    return Attempt(
        budget_ms=budget_ms, bundle=bundle, seconds=time.perf_counter() - start_s
    )


def time_again(
    session: Specializer, attempts: list[Attempt]
) -> dict[float, Measurement]:
    """Measurements by budget, in the quiet state that the table speaks of."""
    bundles = {a.budget_ms: a.bundle for a in attempts if a.bundle is not None}
    models = [
        ModelUnderTest(name=str(budget_ms), model=bundle.model_path)
        for budget_ms, bundle in bundles.items()
    ]
    run = time_models(session, models, settings=SETTINGS)
    return dict(zip(bundles, run.measurements, strict=True))


def publish(
    section: Section, attempts: list[Attempt], again: dict[float, Measurement]
) -> None:
    """A row a budget, then how many were met."""
    section.table(
        [
            "budget ms",
            "network",
            "predicted",
            "verified quiet",
            "verified median",
            "verified p90",
            "again quiet",
            "again median",
            "accuracy, predicted",
            "seconds",
        ],
        [row(attempt, again.get(attempt.budget_ms)) for attempt in attempts],
    )
    quiet = sum(m.quiet_ms <= budget for budget, m in again.items())
    median = sum(m.median_ms <= budget for budget, m in again.items())
    for label, met in (("quiet-state latency", quiet), ("plain median", median)):
        section.bar(
            f"{label}, timed again, within the budget for at least {LEAST_MET} of "
            f"{BUDGET_COUNT}: {met}",
            passed=met >= LEAST_MET,
        )
    section.publish()


def row(attempt: Attempt, again: Measurement | None) -> list[str]:
    """Cells of one budget."""
    budget, seconds = f"{attempt.budget_ms:.4f}", f"{attempt.seconds:.1f}"
    if attempt.bundle is None or again is None:
        return [budget, "infeasible", *[""] * 7, seconds]
    manifest = attempt.bundle.manifest
    measured = manifest.measured
    p90 = "" if measured.p90_ms is None else f"{measured.p90_ms:.4f}"
    return [
        budget,
        f"`{manifest.config_id}`",
        f"{manifest.predicted.ms:.4f}",
        f"{measured.quiet_ms:.4f} ± {measured.standard_error_ratio:.1%}",
        f"{measured.median_ms:.4f}",
        p90,
        f"{again.quiet_ms:.4f}{_mark(again.quiet_ms, attempt.budget_ms)}",
        f"{again.median_ms:.4f}{_mark(again.median_ms, attempt.budget_ms)}",
        f"{manifest.accuracy.value:.2%}",
        seconds,
    ]


def _mark(ms: float, budget_ms: float) -> str:
    return "" if ms <= budget_ms else " (over)"


if __name__ == "__main__":
    main()
