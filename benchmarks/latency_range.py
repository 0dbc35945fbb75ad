"""How far apart the networks of a space are in time, and how well that is predicted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from inputs import (
    add_supernet,
    fused_model,
    new_parser,
    open_session,
    time_models,
)
from numpy.typing import NDArray
from report import Section

from ofa_deploy.pipeline import Specializer
from ofa_deploy.plan import lower
from ofa_deploy.predict.evaluation import kendall_tau
from ofa_deploy.search.evolution import descend
from ofa_deploy.space import SubnetConfig
from profilers.measurement import MeasurementRun, MeasureSettings, ModelUnderTest
from profilers.summary import fit_visits

SEED = 2
SETTINGS = MeasureSettings.certify(seed=SEED)
LEAST_RATIO = 3.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A network to measure, and why."""

    role: str
    config: SubnetConfig
    in_table: bool


def main() -> None:
    """Measure a dozen networks together, and publish."""
    parser = new_parser(__doc__)
    add_supernet(parser)
    parser.add_argument("--random", type=int, default=8, help="random networks")
    args = parser.parse_args()
    section = Section("latency_range", "Latency range", results=args.results)
    session = open_session("openvino-cpu", args.supernet)
    choices = choose(session, random_count=args.random)
    run = measure(session, choices)
    publish(section, session, choices, run)


def choose(session: Specializer, *, random_count: int) -> list[Choice]:
    """The extremes, and random networks spread over the predicted range."""
    space = session.supernet.space
    rng = np.random.default_rng(SEED)
    fastest, _ = descend(space, session.predictor.predict_ms, rng)
    named = {
        "fastest predicted": space.decode(fastest),
        "smallest": space.smallest(),
        "largest": space.largest(),
    }
    drawn = np.unique(space.sample(200 * random_count, rng), axis=0)
    ordered = drawn[np.argsort(session.predictor.predict_ms(drawn), kind="stable")]
    taken = {config.id for config in named.values()}
    unseen = [
        config
        for config in map(space.decode, ordered)
        if config.id not in session.table.networks and config.id not in taken
    ]
    places = np.linspace(0, len(unseen) - 1, random_count + 2).astype(int)[1:-1]
    roles = [*named.items(), *(("random", unseen[place]) for place in places)]
    found: dict[SubnetConfig, str] = {}
    for role, config in roles:
        found[config] = f"{found[config]}, {role}" if config in found else role
    return [
        Choice(role=role, config=config, in_table=config.id in session.table.networks)
        for config, role in found.items()
    ]


def measure(session: Specializer, choices: list[Choice]) -> MeasurementRun:
    """All of them in one shuffled run, in the quiet state that the table speaks of."""
    space = session.supernet.space
    models = [
        ModelUnderTest(
            name=choice.config.id,
            model=fused_model(session.supernet, lower(space, choice.config)),
        )
        for choice in choices
    ]
    return time_models(session, models, settings=SETTINGS)


def publish(
    section: Section, session: Specializer, choices: list[Choice], run: MeasurementRun
) -> None:
    """The networks from fast to slow, then the errors of their predictions."""
    space = session.supernet.space
    quiet = np.array([m.quiet_ms for m in run.measurements])
    genomes = np.stack([space.encode(choice.config) for choice in choices])
    predicted = session.predictor.predict_ms(genomes)
    rows = []
    for index in np.argsort(quiet):
        choice, measurement = choices[index], run.measurements[index]
        rows.append(
            [
                f"{choice.role} (`{choice.config.id}`)",
                f"{lower(space, choice.config).mac_count / 1e6:.1f}",
                f"{quiet[index]:.4f} ± {measurement.standard_error_ratio:.1%}",
                f"{measurement.median_ms:.4f}",
                f"{predicted[index]:.4f}",
                f"{predicted[index] / quiet[index] - 1:+.1%}",
                "yes" if choice.in_table else "no",
            ]
        )
    section.text(
        f"{len(choices)} networks exported, fused, and timed in one shuffled run on "
        f"{session.runtime.backend}, {session.target.threads} thread(s), batch 1."
    )
    headers = ["network", "MMACs", "quiet ms", "median ms", "predicted ms", "error"]
    section.table([*headers, "in the table"], rows)
    unseen = np.array([not choice.in_table for choice in choices])
    describe_errors(section, predicted[unseen], quiet[unseen], floor=noise_floor(run))
    ratio = float(quiet.max() / quiet.min())
    section.bar(
        f"slowest at least {LEAST_RATIO:g} times the fastest: {ratio:.2f}",
        passed=ratio >= LEAST_RATIO,
    )
    section.publish()


def describe_errors(
    section: Section, predicted: Floats, measured: Floats, *, floor: float
) -> None:
    """Errors on the networks that the predictor was not calibrated with."""
    error = np.abs(predicted / measured - 1)
    section.text(
        f"On the {len(error)} networks that the predictor was not calibrated with: "
        f"RMSPE {float(np.sqrt((error**2).mean())):.2%}, "
        f"{float((error <= 0.05).mean()):.0%} within ±5 %, "
        f"{float((error <= 0.10).mean()):.0%} within ±10 %, Kendall's tau-b "
        f"{kendall_tau(predicted, measured):.3f}. Noise floor: two independent halves "
        f"of the same visits differ by {floor:.2%} (root mean square)."
    )


def noise_floor(run: MeasurementRun) -> float:
    """Root mean square relative difference of the even from the odd visits."""
    halves = [
        fit_visits(
            [measurement.visits[start::2] for measurement in run.measurements],
            beta=run.beta,
            anchor_reference_ns=run.anchor_reference_ns,
        ).effect_log
        for start in (0, 1)
    ]
    return math.sqrt(float(((halves[0] - halves[1]) ** 2).mean()))


if __name__ == "__main__":
    main()
