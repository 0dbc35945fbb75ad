"""How far a latency wanders between processes: alone, and beside the anchor model."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from inputs import add_supernet, console, new_parser, random_plans
from report import Section
from rich.progress import track

from ofa_deploy.device_bench import CERTIFY_SETTINGS
from ofa_deploy.drift import write_anchor_model
from ofa_deploy.export.runtime_format import timed_network, write_timed
from ofa_deploy.plan import NetworkPlan
from ofa_deploy.target import Target
from ofa_deploy.zoo import open_supernet
from profilers.fresh import ProcessReport, report_of_fresh_process, visits_by_process
from profilers.summary import fit_visits

BACKENDS = ("openvino-cpu", "onnxruntime-cpu", "litert-cpu")
NETWORKS, PROCESSES = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Standard deviations between processes, as shares of a network's latency.

    Args:
        network: Its id.
        quiet_ms: Mean of the processes that timed it alone.
        alone: Of its quiet latency, in processes that timed nothing else.
        beside: Of its ratio to the anchor model, in processes that timed both.
        slower_beside: Its latency there over that alone, minus 1.
    """

    network: str
    quiet_ms: float
    alone: float
    beside: float
    slower_beside: float


def main() -> None:
    """Time some networks in many processes, in either way by turns."""
    parser = new_parser(__doc__)
    add_supernet(parser)
    args = parser.parse_args()
    section = Section(
        "anchor_model",
        "Beside the anchor model",
        results=args.results,
        packages=("ai-edge-litert",),
    )
    space = open_supernet(args.supernet).space
    plans = random_plans(space, count=NETWORKS, seed=3)
    rows, ratios = [], []
    for backend in BACKENDS:
        target = Target(backend=backend, threads=1)
        with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as name:
            folder = Path(name)
            anchor = write_anchor_model(space, target, folder)
            found = [
                examine(plan, target=target, anchor=anchor, folder=folder)
                for plan in track(plans, backend, console=console)
            ]
        rows += [
            [
                backend,
                f"`{one.network}`",
                f"{one.quiet_ms:.4f}",
                f"{one.alone:.2%}",
                f"{one.beside:.2%}",
                f"{one.slower_beside:+.2%}",
            ]
            for one in found
        ]
        ratios.append(median(one.beside / one.alone for one in found))
    section.text(
        f"{NETWORKS} random networks of `{args.supernet}`, 1 thread, each in "
        f"{PROCESSES} processes alone and {PROCESSES} beside the anchor model, by "
        "turns, timed as files are certified. *alone*: standard deviation between "
        "processes of the latency, its kernel's slow-downs taken out; *beside*: of its "
        "ratio to the anchor model's; *slower*: the latency beside it, over that alone."
    )
    section.table(["runtime", "network", "ms", "alone", "beside", "slower"], rows)
    told = ", ".join(
        f"{backend} {ratio:.2f}"
        for backend, ratio in zip(BACKENDS, ratios, strict=True)
    )
    section.text(f"Median of *beside* over *alone*: {told}.")
    section.publish()


def examine(plan: NetworkPlan, *, target: Target, anchor: Path, folder: Path) -> Spread:
    """One network, in either way by turns."""
    model = timed_network(
        plan, backend_name=target.backend, rng=np.random.default_rng(0)
    )
    path = write_timed(folder, plan.name, model, backend_name=target.backend)
    alone: list[ProcessReport] = []
    both: list[ProcessReport] = []
    for number in range(PROCESSES):
        for reports, beside in ((alone, None), (both, anchor)):
            reports.append(
                report_of_fresh_process(
                    path,
                    backend_name=target.backend,
                    threads=target.threads,
                    settings=CERTIFY_SETTINGS,
                    number=number,
                    beside=beside,
                )
            )
    by_process = [
        *visits_by_process(alone),
        *visits_by_process(both),
        *visits_by_process(both, place=1),
    ]
    effects = fit_visits(by_process, drift=False).effect_log
    single, model_log, anchor_log = np.split(effects, 3)
    return Spread(
        network=plan.name,
        quiet_ms=math.exp(float(single.mean())) / 1e6,
        alone=float(single.std(ddof=1)),
        beside=float((model_log - anchor_log).std(ddof=1)),
        slower_beside=math.expm1(float(model_log.mean() - single.mean())),
    )


if __name__ == "__main__":
    main()
