"""What `specialize` does with what it measures, on devices that are made up."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ofa_deploy import pipeline
from ofa_deploy.bundle import Bundle
from ofa_deploy.errors import InfeasibleBudget
from ofa_deploy.exporting import ExportedNetwork
from ofa_deploy.pipeline import Specializer
from ofa_deploy.plan import NetworkPlan
from ofa_deploy.search.evolution import Evolution
from ofa_deploy.space import SubnetConfig
from ofa_deploy.verify import ParityReport
from profilers import FreshMeasurement
from tests.support import tiny
from tests.support.tiny_session import fresh, open_session

MODEL_FILE = "model.onnx"
PARITY = ParityReport(
    max_relative_error=0.0, top1_agreement=1.0, image_count=256, tolerance=1e-4
)

# A network, and how often one was timed before it in this call, to a latency in ms.
Law = Callable[[SubnetConfig, int], float]


class Device:
    """Writes a network's id for its model, and times it by a law.

    Attributes:
        exported: Ids of the networks exported, in order.
        timed: Ids and latencies of the networks timed, in order.
    """

    def __init__(self, law: Law) -> None:
        self._law = law
        self.exported: list[str] = []
        self.timed: list[tuple[str, float]] = []

    def export(
        self, _: object, plan: NetworkPlan, *, folder: Path, **options: object
    ) -> ExportedNetwork:
        """Stand in for `export_network`."""
        self.exported.append(plan.config.id)
        (folder / MODEL_FILE).write_text(plan.config.id)
        return ExportedNetwork(
            plan=plan, folder=folder, model_file=MODEL_FILE, parity=PARITY
        )

    def time(self, model_path: Path, **options: object) -> FreshMeasurement:
        """Stand in for `measure_in_fresh_process`."""
        name = model_path.read_text()
        latency_ms = self._law(SubnetConfig.from_id(name), len(self.timed))
        self.timed.append((name, latency_ms))
        return fresh(latency_ms)

    def within(self, budget_ms: float) -> set[str]:
        """Ids of the networks that were timed within a budget."""
        return {name for name, latency_ms in self.timed if latency_ms <= budget_ms}


@pytest.fixture(scope="module", autouse=True)
def _quick_search() -> Iterator[None]:
    """How good the networks are that a search finds, is not the subject here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Evolution", lambda: Evolution(generations=8))
        yield


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Specializer:
    return open_session(tmp_path_factory.mktemp("session"))


def specialize_on(device: Device, session: Specializer, budget_ms: float) -> str:
    """Id of the network in the bundle."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as home:
        patch.setattr(pipeline, "export_network", device.export)
        patch.setattr(pipeline, "measure_in_fresh_process", device.time)
        try:
            session.specialize(budget_ms, out=Path(home) / "bundle")
        except InfeasibleBudget:
            assert list(Path(home).iterdir()) == []
            raise
        bundle = Bundle.open(Path(home) / "bundle")
        assert (bundle.path / MODEL_FILE).read_text() == bundle.manifest.config_id
        assert bundle.manifest.measured.quiet_ms <= bundle.manifest.budget_ms
        return bundle.manifest.config_id


def predicted_ms(session: Specializer, config: SubnetConfig) -> float:
    return session.predictor.estimate(config).ms


def middle_budget_ms(session: Specializer) -> float:
    return session.reachable().middle_ms


# -- examples --------------------------------------------------------------------------


def test_the_first_candidate_is_the_bundle_if_it_is_measured_within_the_budget(
    session: Specializer,
) -> None:
    device = Device(lambda config, count: 1e-3)
    found = specialize_on(device, session, middle_budget_ms(session))
    assert device.exported == [found]


def test_after_a_candidate_too_slow_the_bundle_is_of_one_within_the_budget(
    session: Specializer,
) -> None:
    budget_ms = middle_budget_ms(session)
    device = Device(lambda config, count: budget_ms * (0.9 if count else 1.1))
    found = specialize_on(device, session, budget_ms)
    (first, _), *later = device.timed
    assert found != first
    assert found in dict(later)


def test_a_bundle_is_of_the_most_accurate_network_measured_within_the_budget(
    session: Specializer,
) -> None:
    budget_ms = middle_budget_ms(session)
    device = Device(lambda config, count: budget_ms * (0.9 if count else 1.1))
    found = specialize_on(device, session, budget_ms)

    def accuracy(name: str) -> float:
        genome = tiny.SPACE.encode(SubnetConfig.from_id(name))
        return float(tiny.predictor().predict(genome[None])[0])

    assert found == max(device.within(budget_ms), key=accuracy)


def test_a_device_a_little_slower_than_its_table_still_leads_to_a_bundle(
    session: Specializer,
) -> None:
    # Slower than the predictor's own uncertainty, so that the first candidate misses.
    factor = session.predictor.upper_ratio * 1.1
    device = Device(lambda config, count: predicted_ms(session, config) * factor)
    found = specialize_on(device, session, middle_budget_ms(session))
    assert found in device.within(middle_budget_ms(session))
    assert len(device.exported) > 1


def test_a_budget_that_every_candidate_exceeds_is_infeasible(
    session: Specializer,
) -> None:
    budget_ms = middle_budget_ms(session)
    device = Device(lambda config, count: predicted_ms(session, config) * 100)
    with pytest.raises(InfeasibleBudget) as caught:
        specialize_on(device, session, budget_ms)
    least_ms = min(latency_ms for _, latency_ms in device.timed)
    assert caught.value.budget_ms == budget_ms
    assert caught.value.fastest_ms == pytest.approx(least_ms)


def test_a_call_ends_with_the_fastest_network_if_all_others_miss(
    session: Specializer,
) -> None:
    budget_ms = middle_budget_ms(session)
    fastest = session._fastest_config(seed=0)
    device = Device(lambda config, count: budget_ms * (2 - 1.5 * (config == fastest)))
    assert specialize_on(device, session, budget_ms) == fastest.id
    assert 2 <= len(device.timed) <= pipeline.MAX_CANDIDATES


def test_a_device_twice_as_slow_as_its_table_gets_more_than_its_fastest_network(
    session: Specializer,
) -> None:
    budget_ms = budget_at(session, 0.9)
    device = Device(lambda config, count: 2 * predicted_ms(session, config))
    found = specialize_on(device, session, budget_ms)
    assert found != session._fastest_config(seed=0).id


# -- laws ------------------------------------------------------------------------------

# Measured over predicted, of one timing after the other; the last one stays.
factors = st.lists(st.floats(0.5, 4), min_size=1, max_size=8)
# Where the budget lies between the fastest and the slowest prediction.
places = st.floats(0.01, 1)
# The first network misses, the fastest meets the budget, and all after it miss.
ONCE_FAST = [4.0, 0.5, 4.0]


def drifting_device(session: Specializer, by_timing: list[float]) -> Device:
    """A device that is off its table by another factor at each timing."""

    def law(config: SubnetConfig, count: int) -> float:
        factor = by_timing[min(count, len(by_timing) - 1)]
        return predicted_ms(session, config) * factor

    return Device(law)


def budget_at(session: Specializer, place: float) -> float:
    reachable = session.reachable()
    ratio = reachable.slowest_ms / reachable.fastest_ms
    return float(reachable.fastest_ms * ratio**place)


@settings(max_examples=30)
@given(factors, places)
@example(ONCE_FAST, 0.5)
@example(ONCE_FAST, 0.1)
def test_no_network_is_exported_or_timed_twice_in_one_call(
    session: Specializer, by_timing: list[float], place: float
) -> None:
    device = drifting_device(session, by_timing)
    with suppress(InfeasibleBudget):
        specialize_on(device, session, budget_at(session, place))
    timed = [name for name, _ in device.timed]
    assert sorted(device.exported) == sorted(set(device.exported))
    assert sorted(timed) == sorted(set(timed))


@settings(max_examples=30)
@given(factors, places)
@example(ONCE_FAST, 0.5)
@example(ONCE_FAST, 0.1)
def test_a_budget_is_refused_exactly_if_every_timed_network_exceeds_it(
    session: Specializer, by_timing: list[float], place: float
) -> None:
    device = drifting_device(session, by_timing)
    budget_ms = budget_at(session, place)
    try:
        found = {specialize_on(device, session, budget_ms)}
    except InfeasibleBudget:
        found = set()
    within = device.within(budget_ms)
    assert found <= within
    assert bool(found) == bool(within)


@settings(max_examples=30)
@given(factors, places)
@example([1.5, 4.0], 0.5)
def test_a_refusal_names_the_least_latency_that_was_measured(
    session: Specializer, by_timing: list[float], place: float
) -> None:
    device = drifting_device(session, by_timing)
    budget_ms = budget_at(session, place)
    try:
        specialize_on(device, session, budget_ms)
    except InfeasibleBudget as error:
        refusal = error
    else:
        return
    least_ms = min(latency_ms for _, latency_ms in device.timed)
    assert refusal.budget_ms == budget_ms
    assert refusal.fastest_ms == pytest.approx(least_ms)
