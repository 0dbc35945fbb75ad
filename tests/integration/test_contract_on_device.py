"""Constraints, drift, fleets and fronts, on the real runtimes of this machine."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ofa_deploy import (
    Bundle,
    Constraints,
    InfeasibleBudget,
    Specializer,
    StaleTable,
    cli,
    device_bench,
    drift,
    frontier,
    pipeline,
    profiling,
    rebench,
    specialize,
)
from ofa_deploy.cli import main
from ofa_deploy.errors import DeployError, DeviceError, SpaceError
from ofa_deploy.fleet import MAX_DEVICES
from ofa_deploy.plan import lower
from ofa_deploy.profiling import anchor_network
from ofa_deploy.report.page import REPORT_FILE
from ofa_deploy.search.exhaustive import enumerate_genomes
from ofa_deploy.search.pareto import exhaustive_front
from ofa_deploy.space import SubnetConfig
from ofa_deploy.stored import read_supernet, write_supernet
from ofa_deploy.table_files import table_name
from profilers import LatencyTable, fresh
from profilers.backends import get_backend
from profilers.device import available_cores, read_conditions, this_device
from profilers.memory import MemoryGauge
from tests.support import tiny
from tests.support.quick import QUICK

BACKEND = "onnxruntime-cpu"
GENEROUS_MS = 10_000.0


@pytest.fixture(scope="module", autouse=True)
def _quick_timing() -> Iterator[None]:
    """Few runs: how precise the timing is, is not what these tests are about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift, "CONFIRM_SETTINGS", QUICK)
        patch.setattr(device_bench, "CERTIFY_SETTINGS", QUICK)
        patch.setattr(device_bench, "CERTIFY_PROCESSES", 1)
        patch.setattr(rebench, "CERTIFY_SETTINGS", QUICK)
        patch.setattr(rebench, "CERTIFY_PROCESSES", 1)
        patch.setattr(profiling, "PROFILE_SETTINGS", QUICK)
        yield


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supernet")
    write_supernet(folder, tiny.stored())
    return folder


def made_up_table(
    backend: str,
    *,
    anchor_ms: float | None = None,
    scale: float = 1.0,
    **changes: Any,
) -> LatencyTable:
    """A table for this machine; with an anchor model of that latency, if any."""

    def network_ms(config: SubnetConfig) -> float:
        if anchor_ms is not None and config == tiny.SPACE.middle():
            return anchor_ms
        blocks = lower(tiny.SPACE, config).blocks
        return scale * sum(tiny.work_ms(block) for block in blocks)

    runner = get_backend(backend)
    networks = tiny.random_configs(tiny.SPACE, 20)
    if anchor_ms is not None:
        networks = [*networks, tiny.SPACE.middle()]
    table = tiny.latency_table(
        tiny.SPACE,
        networks=networks,
        network_ms=network_ms,
        block_ms=lambda block: scale * tiny.work_ms(block),
        device=this_device(accelerator=runner.accelerator()),
        runtime=runner.runtime(threads=1),
        origin="measured",
    )
    return replace(table, **changes)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "table.json"
    made_up_table(BACKEND).save(path)
    return path


@pytest.fixture(scope="module")
def session(supernet: Path, table: Path) -> Specializer:
    return Specializer(BACKEND, supernet=supernet, table=table, on_drift="accept")


needs_memory_gauge = pytest.mark.skipif(
    MemoryGauge().peak_growth_mb() is None,
    reason="this system does not tell how much memory a process takes",
)


@pytest.fixture(scope="module")
def everything(
    session: Specializer, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """A bundle with every constraint there is."""
    asked = Constraints(
        latency_ms=8.0,
        percentile=90,
        size_bytes=10**8,
        peak_memory_mb=2_000.0 if MemoryGauge().peak_growth_mb() is not None else None,
        min_accuracy=0.01,
        rate_hz=120.0,
        sustained_s=0.2,
    )
    return session.specialize(asked, out=tmp_path_factory.mktemp("out") / "bundle")


# -- constraints -----------------------------------------------------------------------


def test_a_bundle_tells_of_every_constraint(everything: Bundle) -> None:
    manifest = everything.manifest
    asked = set(manifest.constraints.limits)
    assert {verdict.constraint for verdict in manifest.verdicts} == asked
    assert asked >= {"latency", "size", "accuracy"}
    assert all(verdict.met for verdict in manifest.verdicts)
    assert manifest.binding in manifest.verdicts


def test_a_bundle_keeps_what_was_measured_on_the_way(everything: Bundle) -> None:
    manifest = everything.manifest
    own = [c for c in manifest.candidates if c.config_id == manifest.config_id]
    (candidate,) = own
    assert candidate.certified_ms == manifest.verdicts[0].bound
    assert candidate.predicted_ms == pytest.approx(manifest.predicted.ms)


def test_a_percentile_comes_from_enough_runs(everything: Bundle) -> None:
    measured = everything.manifest.measured
    assert measured.p90_ms is not None
    assert measured.sample_count >= 128
    latency = everything.manifest.verdicts[0]
    assert latency.found == measured.p90_ms < latency.bound


def test_a_size_is_that_of_what_the_runtime_loads(everything: Bundle) -> None:
    size = {v.constraint: v for v in everything.manifest.verdicts}["size"]
    assert size.bound == everything.model_path.stat().st_size


def test_a_bundle_has_its_report_among_its_files(everything: Bundle) -> None:
    assert REPORT_FILE in everything.manifest.files
    page = (everything.path / REPORT_FILE).read_text(encoding="utf-8")
    assert everything.manifest.config_id in page
    assert "p90 latency at 120 Hz after 0.2 s of load" in page


def test_a_manifest_survives_its_file(everything: Bundle) -> None:
    assert Bundle.open(everything.path).manifest == everything.manifest


def test_an_accuracy_alone_gives_a_fast_network(
    session: Specializer, tmp_path: Path
) -> None:
    genomes = enumerate_genomes(tiny.SPACE)
    accuracy = session.predictors.accuracy(genomes)
    least = float(np.quantile(accuracy, 0.6))
    bundle = session.specialize(
        Constraints(min_accuracy=least), out=tmp_path / "bundle"
    )
    (verdict,) = bundle.manifest.verdicts
    assert verdict.constraint == "accuracy"
    assert verdict.bound >= least
    slower = session.predictor.predict_ms(genomes[accuracy >= least])
    assert bundle.manifest.predicted.ms <= np.quantile(slower, 0.2)


def test_a_size_alone_gives_an_accurate_network_within_it(
    session: Specializer, tmp_path: Path
) -> None:
    genomes = enumerate_genomes(tiny.SPACE)
    accuracy = session.predictors.accuracy(genomes)
    weights = session.predictors.sizes.weight_bytes(genomes)
    limit = round(float(np.median(weights)))
    bundle = session.specialize(Constraints(size_bytes=limit), out=tmp_path / "bundle")
    (verdict,) = bundle.manifest.verdicts
    assert bundle.model_path.stat().st_size == verdict.bound <= limit
    assert bundle.manifest.accuracy.value >= np.median(accuracy[weights <= limit])
    assert bundle.manifest.measured.quiet_ms > 0


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        (
            {"size_bytes": 10},
            "keeps size 10 bytes: the one that comes nearest weighs",
        ),
        (
            {"peak_memory_mb": 1e-4},
            "keeps memory 0.0001 MB: the one that comes",
        ),
        (
            {"min_accuracy": 0.9999},
            "keeps accuracy 99.99%: the one that comes",
        ),
    ],
)
def test_what_no_network_keeps_is_refused_before_anything_is_exported(
    limits: dict[str, Any], told: str, session: Specializer, tmp_path: Path
) -> None:
    with pytest.raises(InfeasibleBudget) as caught:
        session.specialize(
            Constraints(latency_ms=GENEROUS_MS, **limits), out=tmp_path / "bundle"
        )
    assert told in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_table_of_what_can_be_reached_has_a_row_for_each(
    session: Specializer,
) -> None:
    rows = session.feasibility(Constraints(latency_ms=1e-9, min_accuracy=0.5))
    by_name = {row.constraint: row for row in rows}
    assert list(by_name) == ["latency", "size", "memory", "accuracy"]
    assert not by_name["latency"].satisfiable
    assert by_name["size"].limit is None
    assert by_name["size"].satisfiable
    for name in ("latency", "size", "memory"):
        row = by_name[name]
        assert row.best < row.median < row.worst
    accuracy = by_name["accuracy"]
    assert accuracy.best > accuracy.median > accuracy.worst
    latency = Constraints(latency_ms=1e-9)  # a number is that alone
    assert session.feasibility(1e-9) == session.feasibility(latency)


def test_threads_may_be_named_once(supernet: Path, table: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="names its threads, and threads=1 is given"):
        specialize(
            f"{BACKEND}?threads=1",
            threads=1,
            latency_ms=1.0,
            out=tmp_path / "bundle",
            supernet=supernet,
            table=table,
        )


@needs_memory_gauge
def test_a_memory_is_measured_in_the_processes_that_time(everything: Bundle) -> None:
    memory = {v.constraint: v for v in everything.manifest.verdicts}["memory"]
    assert memory.evidence == "measured"
    assert memory.bound == everything.manifest.measured.memory_mb
    assert memory.bound > 0


@pytest.mark.parametrize("killed_in", ["certify", "write"])
def test_a_call_that_was_killed_goes_on_from_the_last_process(
    killed_in: str,
    supernet: Path,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache"

    def session() -> Specializer:
        return Specializer(
            BACKEND, supernet=supernet, table=table, cache=cache, on_drift="accept"
        )

    monkeypatch.setattr(device_bench, "CERTIFY_PROCESSES", 3)
    run, numbers = fresh.report_of_fresh_process, []

    def start(*arguments: Any, number: int, **options: Any) -> Any:
        numbers.append(number)
        if killed_in == "certify" and numbers == [0, 1, 2]:
            raise KeyboardInterrupt
        return run(*arguments, number=number, **options)

    def write(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    # Of a larger limit the same network is the best one, whatever the timing says.
    asked = Constraints(latency_ms=GENEROUS_MS)
    monkeypatch.setattr(fresh, "report_of_fresh_process", start)
    with monkeypatch.context() as patch:
        if killed_in == "write":
            patch.setattr(pipeline, "assemble_bundle", write)
        with pytest.raises(KeyboardInterrupt):
            session().specialize(asked, out=tmp_path / "bundle")
    assert list((cache / "unfinished").iterdir())
    bundle = session().specialize(asked, out=tmp_path / "bundle")
    assert numbers == ([0, 1, 2, 2] if killed_in == "certify" else [0, 1, 2])
    assert bundle.manifest.measured.process_count == 3
    assert not list((cache / "unfinished").iterdir())


# -- drift -----------------------------------------------------------------------------


@pytest.fixture
def stale(supernet: Path, tmp_path: Path) -> Path:
    """A table whose anchor model was a thousand times as slow as it is."""
    path = tmp_path / "stale.json"
    made_up_table(BACKEND, anchor_ms=1_000.0).save(path)
    return path


def test_a_machine_that_is_not_what_it_was_is_told(
    stale: Path, supernet: Path, tmp_path: Path
) -> None:
    session = Specializer(BACKEND, supernet=supernet, table=stale)
    with pytest.raises(StaleTable) as caught:
        session.specialize(GENEROUS_MS, out=tmp_path / "bundle")
    assert caught.value.ratio is not None
    assert caught.value.ratio < 0.1
    assert not (tmp_path / "bundle").exists()


def test_the_cure_of_a_stale_table_is_of_what_was_stale(
    stale: Path, supernet: Path
) -> None:
    table, threads = LatencyTable.load(stale), available_cores()
    table = replace(table, runtime=replace(table.runtime, threads=threads))
    table.save(stale)
    with pytest.raises(StaleTable) as caught:
        frontier(BACKEND, threads=threads, supernet=supernet, table=stale)
    device = f"'{BACKEND}?threads={threads}'"
    command = f"--device {device} --supernet {supernet} --out {stale}"
    assert f"`ofa-deploy profile {command}`" in str(caught.value)
    for cure in ("reprofile", "accept"):
        assert f'on_drift="{cure}" (--{cure}' in str(caught.value)


@pytest.mark.parametrize("anchored", [True, False])
def test_a_front_of_a_stale_table_is_told_whatever_networks_the_table_has(
    anchored: bool,
    supernet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = made_up_table(BACKEND, anchor_ms=1_000.0 if anchored else None)
    slow = {name: tiny.measurement(name, 1_000.0) for name in table.networks}
    assert (anchor_network(tiny.SPACE) in slow) == anchored
    path = tmp_path / "stale.json"
    replace(table, networks=slow).save(path)
    with pytest.raises(StaleTable, match="is out of date: its anchor model takes -"):
        frontier(BACKEND, supernet=supernet, table=path)
    assert frontier(BACKEND, supernet=supernet, table=path, on_drift="accept").networks
    page = tmp_path / "front.html"
    words = ("--device", BACKEND, "--supernet", supernet, "--table", path)
    refused = Outcome(monkeypatch, capsys, "frontier", "--out", page, *words)
    assert refused.code == 1
    assert "--accept-drift" in refused.told
    assert not page.exists()


def test_an_anchor_model_that_does_not_run_any_more_is_told(
    supernet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_damaged(folder: Path, name: str, *_: object, **__: object) -> Path:
        path = folder / "damaged.onnx"
        path.write_bytes(b"damaged")
        return path

    path = tmp_path / "table.json"
    made_up_table(BACKEND).save(path)
    monkeypatch.setattr(drift, "write_timed", write_damaged)
    session = Specializer(BACKEND, supernet=supernet, table=path)
    told = "cannot be held against this machine: its anchor model, .*, does not run"
    for call in (
        session.require_current,
        lambda: session.specialize(GENEROUS_MS, out=tmp_path / "bundle"),
    ):
        with pytest.raises(StaleTable, match=told) as caught:
            call()
        assert caught.value.ratio is None
    session.on_drift = "accept"
    with session.specialize(GENEROUS_MS, out=tmp_path / "bundle") as bundle:
        assert bundle.manifest.anchor_ratio is None


@pytest.mark.parametrize("went_on", [False, True], ids=["anew", "went on"])
def test_a_front_is_of_the_table_that_was_measured_anew_and_holds(
    went_on: bool, stale: Path, supernet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[LatencyTable] = []

    def measure(*_: object, **__: object) -> LatencyTable:
        ago = datetime.timedelta(hours=12 if went_on else 0)
        made_at = datetime.datetime.now(datetime.timezone.utc) - ago
        made.append(made_up_table(BACKEND, anchor_ms=1e6))
        made[0] = replace(made[0], created_at=made_at.isoformat())
        return made[0]

    monkeypatch.setattr(pipeline, "measure_table", measure)
    options: dict[str, Any] = {"supernet": supernet, "on_drift": "reprofile"}
    if went_on:  # with what is as stale
        with pytest.raises(StaleTable) as caught:
            frontier(BACKEND, table=stale, **options)
        assert f"table of {made[0].created_at[:16]} is out" in str(caught.value)
    else:
        assert frontier(BACKEND, table=stale, **options).session.table is made[0]
    assert len(made) == 1


def test_a_stale_table_has_no_say_in_what_is_impossible(
    stale: Path, supernet: Path, tmp_path: Path
) -> None:
    session = Specializer(BACKEND, supernet=supernet, table=stale)
    with pytest.raises(StaleTable):
        session.specialize(1e-6, out=tmp_path / "bundle")
    accepting = Specializer(BACKEND, supernet=supernet, table=stale, on_drift="accept")
    with pytest.raises(InfeasibleBudget):
        accepting.specialize(1e-6, out=tmp_path / "bundle")


def test_a_machine_that_has_become_faster_keeps_what_its_table_calls_impossible(
    supernet: Path, tmp_path: Path
) -> None:
    slow = tmp_path / "slow.json"
    made_up_table(BACKEND, scale=1e4).save(slow)
    session = Specializer(BACKEND, supernet=supernet, table=slow, on_drift="accept")
    budget_ms = 0.5 * session.reachable().fastest_ms / session.predictor.upper_ratio
    bundle = session.specialize(budget_ms, out=tmp_path / "bundle")
    assert bundle.manifest.binding.met
    assert bundle.manifest.binding.limit == budget_ms


def test_drift_that_is_accepted_leads_to_a_bundle(
    stale: Path, supernet: Path, tmp_path: Path
) -> None:
    session = Specializer(BACKEND, supernet=supernet, table=stale, on_drift="accept")
    assert session.specialize(GENEROUS_MS, out=tmp_path / "bundle").check().agrees


@pytest.mark.slow
def test_a_stale_table_is_measured_anew(
    stale: Path, supernet: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    session = Specializer(
        BACKEND, supernet=supernet, table=stale, on_drift="reprofile", cache=cache
    )
    bundle = session.specialize(GENEROUS_MS, out=tmp_path / "bundle")
    assert bundle.check().agrees
    name = table_name(tiny.SPACE, session.device, session.runtime)
    assert LatencyTable.load(cache / name) == session.table


# -- timing again ----------------------------------------------------------------------


def test_a_bundle_is_timed_again_where_it_was_made(everything: Bundle) -> None:
    found = rebench.rebench(everything)
    assert found.elsewhere == ()
    assert found.verdict is not None
    if found.measurement.indicative:  # a machine of one's own is as slow as it is
        assert found.measurement.anchor_reference_ns == pytest.approx(
            everything.manifest.measured.anchor_reference_ns
        )


@pytest.mark.quiet
def test_a_bundle_that_was_certified_beside_an_anchor_model_is_timed_beside_it(
    everything: Bundle, supernet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = everything.manifest
    measured = replace(manifest.measured, anchor_model_ms=7.0)
    asked = Constraints(latency_ms=24.0)
    bundle = Bundle(
        everything.path, replace(manifest, measured=measured, constraints=asked)
    )
    shared = replace(read_conditions(), shared_host=True)
    monkeypatch.setattr(rebench, "read_conditions", lambda: shared)
    unknown = rebench.rebench(bundle)
    assert unknown.measurement.anchor_model_ms is None
    assert "timed alone now" in unknown.level_told
    stored = read_supernet(supernet)
    monkeypatch.setattr(
        rebench, "find_in_zoo", {manifest.supernet_sha256: stored}.__getitem__
    )
    # Nowhere does the tiny anchor model take so long: this is not that machine.
    faster = rebench.rebench(bundle)
    assert faster.measurement.anchor_model_ms is None
    assert "this machine is not what it was" in faster.level_told
    found_ms = faster.measurement.anchor_found_ms
    assert found_ms is not None
    monkeypatch.setattr(rebench, "MAX_DRIFT_RATIO", 0.5)  # of a noisy minute
    there = replace(measured, anchor_model_ms=found_ms)
    bundle = Bundle(bundle.path, replace(bundle.manifest, measured=there))
    beside = rebench.rebench(bundle)
    assert beside.measurement.anchor_model_ms == found_ms
    assert "the model is held against it" in beside.level_told
    # Single runs beside another model's are not those of the model alone.
    slow = rebench.rebench(bundle, latency_ms=1e3, percentile=90)
    assert slow.measurement.anchor_model_ms is None
    elsewhere = rebench.rebench(moved(bundle))
    assert elsewhere.measurement.anchor_model_ms is None
    assert not elsewhere.level_told
    own = replace(shared, shared_host=False)
    monkeypatch.setattr(rebench, "read_conditions", lambda: own)
    assert rebench.rebench(bundle).measurement.anchor_model_ms is None


def moved(bundle: Bundle) -> Bundle:
    """As if it had been made on another machine, with another runtime's version."""
    manifest = bundle.manifest
    changed = replace(
        manifest,
        device=replace(manifest.device, cpu_model="another processor"),
        runtime=replace(manifest.runtime, version="0.1"),
    )
    return Bundle(bundle.path, changed)


def test_a_bundle_that_was_moved_says_that_its_timing_was_taken_elsewhere(
    everything: Bundle,
) -> None:
    found = rebench.rebench(moved(everything))
    device, runtime = everything.manifest.device, everything.manifest.runtime
    assert found.elsewhere == (
        f"device cpu_model is {device.cpu_model!r} here and was 'another processor' "
        "there",
        f"runtime version is {runtime.version!r} here and was '0.1' there",
    )
    assert moved(everything).check().agrees


def test_a_machine_with_other_memory_alone_is_told_by_its_memory(
    everything: Bundle,
) -> None:
    manifest = everything.manifest
    there = replace(manifest.device, memory_mb=4 * manifest.device.memory_mb)
    with Bundle(everything.path, replace(manifest, device=there)) as bundle:
        assert rebench.differences(bundle) == (
            f"device memory_mb is {manifest.device.memory_mb} here and was "
            f"{there.memory_mb} there",
        )


class Outcome:
    """What a command left."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        *arguments: str | Path,
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["ofa-deploy", *map(str, arguments)])
        monkeypatch.setattr(cli._console, "width", 1000)
        capsys.readouterr()
        self.code = 0
        try:
            main()
        except SystemExit as ended:
            self.code = int(ended.code or 0)
        captured = capsys.readouterr()
        self.output, self.told = captured.out, captured.err


@pytest.mark.parametrize(("max_ms", "code"), [("8", 0), ("1e-6", 1)])
def test_a_latency_is_asserted_by_the_exit_code(
    max_ms: str,
    code: int,
    everything: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcome = Outcome(
        monkeypatch,
        capsys,
        *("assert-latency", everything.path, "--max-ms", max_ms),
    )
    assert outcome.code == code
    assert ("NOT kept" in outcome.told) == bool(code)


def test_a_bench_in_json_is_nothing_but_json(
    everything: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcome = Outcome(monkeypatch, capsys, "bench", everything.path, "--json")
    assert (outcome.code, outcome.told) == (0, "")
    content = json.loads(outcome.output)
    assert content["elsewhere"] == []
    assert content["now"]["quiet_ms"] > 0
    assert content["then"]["quiet_ms"] == everything.manifest.measured.quiet_ms


def test_a_bench_shows_then_and_now(
    everything: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcome = Outcome(monkeypatch, capsys, "bench", everything.path)
    assert outcome.code == 0
    assert "quiet state, ms" in outcome.told
    assert "ms is allowed" in outcome.told


# -- fronts ----------------------------------------------------------------------------


def test_the_front_of_a_tiny_space_is_the_exhaustive_one(
    supernet: Path, table: Path
) -> None:
    found = frontier(BACKEND, supernet=supernet, table=table, on_drift="accept")
    genomes = enumerate_genomes(tiny.SPACE)
    whole = exhaustive_front(genomes, found.session.predictors.costs(genomes))
    # Predictions in float32 differ in the last digits by how many are made together;
    # what is on one front only must be as good as something on the other.
    sides = found.front.costs, whole.costs
    for one, other in (sides, sides[::-1]):
        beyond = other[None, :, :] > one[:, None, :] * (1 + 1e-6)
        matched = np.logical_not(np.any(beyond, axis=2))
        assert np.all(np.any(matched, axis=1))


def test_a_budget_after_a_front_needs_no_search(
    supernet: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = frontier(BACKEND, supernet=supernet, table=table, on_drift="accept")

    def search(*_: object, **__: object) -> None:
        raise AssertionError("searched once more")

    monkeypatch.setattr("ofa_deploy.search.evolution.Evolution.search", search)
    monkeypatch.setattr("ofa_deploy.search.pareto.Nsga2.search", search)
    bundle = found.session.specialize(GENEROUS_MS, out=tmp_path / "bundle")
    best = max(found.networks, key=lambda network: network.accuracy)
    assert bundle.manifest.config_id == best.config_id


def test_a_front_writes_its_page(
    supernet: Path,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "front.html"
    options = ("--device", BACKEND, "--supernet", supernet, "--table", table)
    outcome = Outcome(
        monkeypatch,
        capsys,
        *("frontier", "--out", page, *options, "--accept-drift", "--json"),
    )
    assert outcome.code == 0
    networks = json.loads(outcome.output)["networks"]
    assert networks[0]["config_id"] in page.read_text(encoding="utf-8")
    latencies_ms = [network["latency_ms"] for network in networks]
    assert latencies_ms == sorted(latencies_ms)


def test_a_seed_below_zero_is_refused(
    session: Specializer, supernet: Path, table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for call in (
        lambda: frontier(BACKEND, supernet=supernet, table=table, seed=-1),
        lambda: session.specialize(GENEROUS_MS, out=out, seed=-1),
        lambda: specialize(BACKEND, latency_ms=1.0, out=out, seed=-1),
        lambda: specialize(devices={BACKEND: 1.0}, out=out, seed=-1),
    ):
        with pytest.raises(SpaceError) as caught:
            call()
        assert str(caught.value) == "seed=-1; give a whole number, 0 or above"
    assert not out.exists()


# -- fleets ----------------------------------------------------------------------------


@pytest.fixture
def two_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[str, str]:
    """Two devices of this machine, whose tables are found by themselves."""
    cache = tmp_path / "cache"
    cache.mkdir()
    names = (BACKEND, "openvino-cpu")
    for name in names:
        table = made_up_table(name)
        table.save(cache / table_name(tiny.SPACE, table.device, table.runtime))
    monkeypatch.setattr("ofa_deploy.pipeline.cache_folder", lambda: cache)
    return names


@pytest.mark.parametrize("max_models", [1, 2, None])
def test_a_fleet_gets_a_bundle_for_each_device(
    max_models: int | None,
    two_tables: tuple[str, str],
    supernet: Path,
    tmp_path: Path,
) -> None:
    devices = dict.fromkeys(two_tables, GENEROUS_MS)
    fleet = specialize(
        devices=devices,
        max_models=max_models,
        out=tmp_path / "fleet",
        supernet=supernet,
        on_drift="accept",
    )
    assert [member.device for member in fleet.members] == list(two_tables)
    networks = {member.config_id for member in fleet.members}
    assert fleet.model_count == len(networks)
    if max_models == 1:
        assert fleet.model_count == 1
    numbers = {member.model_number for member in fleet.members}
    assert numbers == set(range(1, fleet.model_count + 1))
    for member in fleet.members:
        with fleet.bundle(member.device) as bundle:
            assert bundle.manifest.runtime.backend == member.device
            assert bundle.manifest.config_id == member.config_id
            assert bundle.check().agrees
        assert member.measured_ms <= member.latency_ms
    content = json.loads((fleet.path / "fleet.json").read_text())
    assert content["members"] == [asdict(member) for member in fleet.members]
    with pytest.raises(DeployError, match="device 'tpu' is not in the fleet"):
        fleet.bundle("tpu")


def test_a_fleet_that_cannot_be_leaves_nothing(
    two_tables: tuple[str, str], supernet: Path, tmp_path: Path
) -> None:
    devices = {two_tables[0]: GENEROUS_MS, two_tables[1]: 1e-9}
    with pytest.raises(InfeasibleBudget, match="of openvino-cpu; the fastest takes"):
        specialize(
            devices=devices,
            out=tmp_path / "fleet",
            supernet=supernet,
            on_drift="accept",
        )
    assert not (tmp_path / "fleet").exists()


def test_a_fleet_without_sense_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "fleet"
    with pytest.raises(SpaceError, match="0 devices; give 1 to"):
        specialize(devices={}, out=out)
    many = {f"d{index}": 1.0 for index in range(MAX_DEVICES + 1)}
    with pytest.raises(SpaceError, match=f"{MAX_DEVICES + 1} devices"):
        specialize(devices=many, out=out)
    with pytest.raises(SpaceError, match="max_models=0; give at least 1"):
        specialize(devices={BACKEND: 1.0}, max_models=0, out=out)
    with pytest.raises(DeviceError, match="give either a device"):
        specialize(out=out)  # type: ignore[call-overload]
    with pytest.raises(DeviceError, match="give either a device"):
        specialize(BACKEND, devices={BACKEND: 1.0}, out=out)  # type: ignore[call-overload]
    with pytest.raises(SpaceError, match="devices carry their own budgets"):
        specialize(devices={BACKEND: 1.0}, latency_ms=1.0, out=out)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["openvino-cpu"], "give a device and its budget in milliseconds"),
        (["openvino-cpu=fast"], "give a device and its budget in milliseconds"),
        (["=0.5"], "give a device and its budget in milliseconds"),
        (["a=1", "a=2"], "--device a is given twice"),
    ],
)
def test_a_fleet_of_texts_without_sense_is_refused(texts: list[str], told: str) -> None:
    with pytest.raises(DeviceError, match=told):
        cli.bundles.budgets_by_device(texts)


def test_a_budget_of_a_device_with_options_is_read() -> None:
    found = cli.bundles.budgets_by_device(["openvino-cpu?threads=2=0.5", "b=2"])
    assert found == {"openvino-cpu?threads=2": 0.5, "b": 2.0}
