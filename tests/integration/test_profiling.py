"""Profiling a space: by the command, resumed, and with blocks that fail."""

from __future__ import annotations

import datetime
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ofa_deploy import profiling
from ofa_deploy.cli import main
from ofa_deploy.errors import MeasurementError
from ofa_deploy.held_out import (
    HeldOutQuality,
    evaluate_predictor,
    measure_and_judge,
    unseen_networks,
)
from ofa_deploy.plan import all_blocks, lower
from ofa_deploy.predict.latency import fit_latency_predictor
from ofa_deploy.profiling import TimedModels, anchor_network, profile_space
from ofa_deploy.reporting import Silent
from ofa_deploy.search.exhaustive import enumerate_genomes
from ofa_deploy.space_file import encode_space, space_sha256
from profilers import LatencyTable, MeasureSettings, measurement, merge_tables
from profilers.backends import get_backend
from profilers.execute import execute
from tests.support import faulty_worker, tiny

NETWORKS = 4
ANCHOR = anchor_network(tiny.SPACE)
SETTINGS = MeasureSettings(
    visits=2,
    runs_per_visit=1,
    warmup_runs=1,
    warmup_windows=1,
    anchor_repeats=1,
    seed=0,
    target_relative_error=1e9,  # no extra visits
    max_seconds=1e-3,
)
pytestmark = [pytest.mark.slow, pytest.mark.quiet]

Progress = Callable[[int, int], None]


def profile(folder: Path, *, progress: Progress | None = None) -> LatencyTable:
    return profile_space(
        tiny.SPACE,
        backend=get_backend("onnxruntime-cpu"),
        threads=1,
        settings=SETTINGS,
        journal_path=folder / "journal",
        network_count=NETWORKS,
        progress=progress,
    )


@pytest.fixture(scope="module", autouse=True)
def _restless_machines_do_not_matter() -> Iterator[None]:
    """No visit counts as disturbed: how many there are must not depend on luck."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "DISTURBED_ANCHOR_RATIO", 1e9)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> LatencyTable:
    """A table that nothing interrupted."""
    return profile(tmp_path_factory.mktemp("whole"))


def test_a_table_holds_every_block_and_as_many_networks_as_were_asked_for(
    whole: LatencyTable,
) -> None:
    assert set(whole.blocks) == set(all_blocks(tiny.SPACE))
    assert len(whole.networks) == NETWORKS
    assert whole.failures == {}


def test_progress_counts_the_networks_from_the_start_and_ends_at_its_total(
    tmp_path: Path,
) -> None:
    told: list[tuple[int, int]] = []
    profile(tmp_path, progress=lambda *now: told.append(now))
    # The anchor model is visited as often as there are sessions: nobody waits for it.
    visits = SETTINGS.visits * (len(all_blocks(tiny.SPACE)) + NETWORKS - 1)
    assert {total for _, total in told} == {visits}
    assert list(dict.fromkeys(done for done, _ in told)) == list(range(1, visits + 1))


@pytest.mark.parametrize("stop_at", [0.3, 0.999, 1.001])
def test_a_profile_broken_off_goes_on_to_the_same_networks(
    stop_at: float, tmp_path: Path
) -> None:
    block_visits = SETTINGS.visits * len(all_blocks(tiny.SPACE))

    def stop(done: int, total: int) -> None:
        if done >= stop_at * block_visits:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(tmp_path, progress=stop)
    kept = (tmp_path / "journal").read_bytes()
    table = profile(tmp_path)
    assert (tmp_path / "journal").read_bytes().startswith(kept)
    assert set(table.blocks) == set(all_blocks(tiny.SPACE))
    assert len(table.networks) == NETWORKS
    for entry in (*table.blocks.values(), *table.networks.values()):
        assert len(entry.visits) == SETTINGS.visits or entry.name == ANCHOR


def age(journal: Path, *, hours: float) -> None:
    """Let a journal's sessions have begun so much earlier."""
    header, *lines = journal.read_bytes().splitlines()
    aged = [header]
    for line in lines:
        record = json.loads(line[9:])
        if "session" in record:
            record["session"]["began_s"] -= 3600 * hours
        text = json.dumps(record, sort_keys=True).encode()
        aged.append(b"%08x %s" % (zlib.crc32(text), text))
    journal.write_bytes(b"".join(line + b"\n" for line in aged))


def broken_off(folder: Path, *, hours_ago: float) -> bytes:
    """A profile that all blocks but the last were visited for; what it left."""
    block_visits = SETTINGS.visits * len(all_blocks(tiny.SPACE))

    def stop(done: int, total: int) -> None:
        if done == block_visits - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(folder, progress=stop)
    age(folder / "journal", hours=hours_ago)
    return (folder / "journal").read_bytes()


def age_h(table: LatencyTable) -> float:
    made = datetime.datetime.fromisoformat(table.created_at)
    now = datetime.datetime.now(datetime.timezone.utc)
    return (now - made) / datetime.timedelta(hours=1)


def test_a_table_tells_which_networks_were_drawn(whole: LatencyTable) -> None:
    drawn = set(whole.random_networks)
    assert len(drawn) == len(whole.networks) // 3
    assert drawn < whole.networks.keys()


def test_a_table_is_as_old_as_the_oldest_part_of_it(tmp_path: Path) -> None:
    kept = broken_off(tmp_path, hours_ago=15)  # power came back the next morning
    table = profile(tmp_path)
    assert (tmp_path / "journal").read_bytes().startswith(kept)
    assert age_h(table) == pytest.approx(15, abs=1)


@pytest.mark.parametrize(
    ("hours_ago", "told"),
    [(24 * 21, "504 hours ago"), (-48, "48 hours ahead of now, by its clock")],
)
def test_what_was_measured_long_ago_is_told_of_and_measured_anew(
    hours_ago: float, told: str, tmp_path: Path
) -> None:
    kept = broken_off(tmp_path, hours_ago=hours_ago)
    with pytest.warns(UserWarning, match=f"journal was begun {told}; the machine may"):
        table = profile(tmp_path)
    header, visits = kept.split(b"\n", maxsplit=1)
    anew = (tmp_path / "journal").read_bytes()
    assert anew.startswith(header)
    assert not set(visits.splitlines()) & set(anew.splitlines())
    assert age_h(table) == pytest.approx(0, abs=1)
    assert set(table.blocks) == set(all_blocks(tiny.SPACE))


def damaging(*keys: str) -> Callable[[TimedModels, str, Path], Path]:
    """A `write_model` that writes some models so that no runtime loads them."""
    write = TimedModels.write_model

    def write_damaged(self: TimedModels, name: str, folder: Path) -> Path:
        path = write(self, name, folder)
        if name.endswith(keys):
            path.write_bytes(b"damaged")
        return path

    return write_damaged


def crashing(*keys: str) -> Callable[[TimedModels, str, Path], Path]:
    """A `write_model` for the faulty backend, which crashes on some blocks.

    And on the networks that have one, as a runtime would.
    """

    def write(self: TimedModels, name: str, folder: Path) -> Path:
        key = name.partition(":")[2]
        network = self.networks.get(key)
        inside = {key} if network is None else {b.key for b in network.blocks}
        fault = "crash" if inside & {*keys} else ""
        path = folder / str(len(list(folder.iterdir())))
        return faulty_worker.write_model(path, us=50 + 10 * len(inside), fault=fault)

    return write


# Of the anchor model and many others.
CRASHING = lower(tiny.SPACE, tiny.SPACE.middle()).blocks[-2].key


def test_a_block_that_crashes_its_runtime_costs_itself_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TimedModels, "write_model", crashing(CRASHING))
    monkeypatch.setattr(
        profiling, "execute", partial(execute, command=faulty_worker.COMMAND)
    )
    table = profile_space(
        tiny.SPACE,
        backend=faulty_worker.FaultyBackend(),
        threads=1,
        settings=SETTINGS,
        journal_path=tmp_path / "journal",
        network_count=NETWORKS,
    )
    assert set(table.failures) == {CRASHING, ANCHOR}
    assert "SIGSEGV" in table.failures[CRASHING]
    assert set(table.blocks) == set(all_blocks(tiny.SPACE)) - {CRASHING}
    assert len(table.networks) == NETWORKS
    predictor = fit_latency_predictor(tiny.SPACE, table)
    genomes = enumerate_genomes(tiny.SPACE)
    plans = [lower(tiny.SPACE, tiny.SPACE.decode(row)) for row in genomes]
    runs = [CRASHING not in {block.key for block in plan.blocks} for plan in plans]
    np.testing.assert_array_equal(np.isfinite(predictor.predict_ms(genomes)), runs)
    unseen = unseen_networks(tiny.SPACE, table, count=50, seed=0)
    assert np.isfinite(predictor.predict_ms(unseen)).all()
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table


def test_blocks_whose_failing_leaves_no_network_are_tried_again_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [tiny.SPACE.smallest(), tiny.SPACE.largest()]  # of both resolutions
    stems = sorted(lower(tiny.SPACE, config).blocks[0].key for config in configs)
    with monkeypatch.context() as patch:
        patch.setattr(TimedModels, "write_model", damaging(*stems))
        with pytest.raises(MeasurementError) as caught:
            profile(tmp_path)
    told = str(caught.value)
    assert told.startswith(
        "2 blocks could not be measured, and hardly a network has none of them; "
        f"block:{stems[0]}: "
    )
    assert told.endswith("these are tried anew, and the others are kept")
    kept = (tmp_path / "journal").read_bytes()
    table = profile(tmp_path)
    assert (tmp_path / "journal").read_bytes().startswith(kept)
    assert set(table.blocks) == set(all_blocks(tiny.SPACE))
    assert table.failures == {}


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(tiny.SPACE.largest().id, id="largest"),
        pytest.param(ANCHOR, id="anchor"),
    ],
)
def test_a_network_that_fails_is_named_as_the_table_names_networks(
    bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TimedModels, "write_model", damaging(bad))
    table = profile(tmp_path)
    assert set(table.failures) == {bad}
    assert bad not in table.networks
    assert len(table.networks) == NETWORKS - 1


def test_the_command_profiles_a_space_without_a_supernet(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    space, out = tmp_path / "space.json", tmp_path / "table.json"
    space.write_text(json.dumps(encode_space(tiny.SPACE)))
    monkeypatch.setattr(profiling, "PROFILE_SETTINGS", SETTINGS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["profile", "--device", "onnxruntime-cpu", "--space", str(space)]
    words += ["--networks", str(NETWORKS), "--evaluate", "5"]
    words += ["--out", str(out), "--json"]
    monkeypatch.setattr(sys, "argv", ["ofa-deploy", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    table = LatencyTable.load(out)
    assert table.space_sha256 == space_sha256(tiny.SPACE)
    assert told["block_count"] == len(table.blocks)
    assert told["network_count"] == len(table.networks) == NETWORKS
    assert told["fastest_ms"] <= told["median_ms"] <= told["slowest_ms"]
    assert told["held_out"]["predicted"]["count"] == 5
    (kept,) = (tmp_path / "cache").rglob("*.json")
    assert LatencyTable.load(kept).networks == table.networks


def held_out(
    folder: Path, table: LatencyTable, *, stop: bool = False
) -> HeldOutQuality:
    class Stopping(Silent):
        def advance(self, done: int, total: int) -> None:
            if stop and done > total // 2:
                raise KeyboardInterrupt

    return evaluate_predictor(
        tiny.SPACE,
        table,
        count=6,
        settings=SETTINGS,
        folder=folder,
        reporter=Stopping(),
    )


def test_held_out_networks_are_different_and_not_in_the_table(
    whole: LatencyTable,
) -> None:
    genomes = unseen_networks(tiny.SPACE, whole, count=100, seed=1)
    names = {tiny.SPACE.decode(row).id for row in genomes}
    assert len(names) == len(genomes) == 100
    assert not names & set(whole.networks)


def test_judging_a_predictor_goes_on_after_a_kill_and_repeats_nothing(
    whole: LatencyTable, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        held_out(tmp_path, whole, stop=True)
    (journal,) = tmp_path.iterdir()
    kept = journal.read_bytes()
    quality = held_out(tmp_path, whole)
    assert journal.read_bytes().startswith(kept)
    assert quality.predicted.count == quality.noise.count == 6
    assert quality.left_out == 0
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(files) == 2
    assert held_out(tmp_path, whole) == quality
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def judged(folder: Path, reporter: Silent) -> tuple[LatencyTable, HeldOutQuality]:
    return measure_and_judge(
        tiny.SPACE,
        backend=get_backend("onnxruntime-cpu"),
        threads=1,
        folder=folder,
        network_count=NETWORKS,
        count=5,
        reporter=reporter,
    )


@pytest.mark.parametrize("stop_in", ["profiling", "held-out networks, run 2"])
def test_measuring_and_judging_broken_off_goes_on_and_measures_no_table_twice(
    stop_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "PROFILE_SETTINGS", SETTINGS)

    class Stopping(Silent):
        stage = ""

        def begin(self, stage: str) -> None:
            self.stage = stage

        def advance(self, done: int, total: int) -> None:
            if stop_in in self.stage and done > total // 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judged(tmp_path, Stopping())
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.journal")}
    tables = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    assert len(kept) == (1 if stop_in == "profiling" else 2)
    seen = {}

    class Watching(Silent):
        def advance(self, done: int, total: int) -> None:
            found = {path: path.read_bytes() for path in tmp_path.rglob("*.journal")}
            seen.update(found)

    _, quality = judged(tmp_path, Watching())
    assert quality.predicted.count == 5
    for path, content in kept.items():
        assert seen[path].startswith(content)
    for path, content in tables.items():
        assert path.read_bytes() == content
    assert [path.suffix for path in tmp_path.rglob("*")] == [".json"]


@pytest.mark.parametrize("meanwhile", ["deleted", "another"])
def test_a_table_that_is_not_the_one_that_was_made_is_measured_anew(
    meanwhile: str, whole: LatencyTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "PROFILE_SETTINGS", SETTINGS)
    made: list[str] = []

    class Stopping(Silent):
        def begin(self, stage: str) -> None:
            made.append(stage)
            if "held-out" in stage and len(made) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judged(tmp_path, Stopping())
    (path,) = tmp_path.glob("*.json")
    path.unlink()
    if meanwhile == "another":
        whole.save(path)
    table, _ = judged(tmp_path, Stopping())
    assert len(table.networks) == NETWORKS
    assert [stage.split()[0] for stage in made] == [
        *("profiling", "measuring"),
        *("profiling", "measuring", "measuring"),
    ]


def test_a_table_merged_alone_is_itself(whole: LatencyTable) -> None:
    merged = merge_tables([whole])
    for one, other in (
        (whole.blocks, merged.blocks),
        (whole.networks, merged.networks),
    ):
        assert one.keys() == other.keys()
        for name, entry in one.items():
            assert other[name].quiet_ms == pytest.approx(entry.quiet_ms, rel=1e-3)


def test_a_predictor_is_not_judged_by_less_than_two_networks(
    whole: LatencyTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tiny.SPACE.decode(
        unseen_networks(tiny.SPACE, whole, count=6, seed=SETTINGS.seed)[0]
    )
    spoil, write = damaging(""), TimedModels.write_model

    def write_one(self: TimedModels, name: str, folder: Path) -> Path:
        return (write if name.endswith(good.id) else spoil)(self, name, folder)

    monkeypatch.setattr(TimedModels, "write_model", write_one)
    with pytest.raises(MeasurementError, match="1 of 6 held-out networks"):
        held_out(tmp_path, whole)


def test_a_space_that_the_table_knows_whole_judges_nothing(
    whole: LatencyTable, tmp_path: Path
) -> None:
    every = [tiny.SPACE.decode(row).id for row in enumerate_genomes(tiny.SPACE)]
    one = next(iter(whole.networks.values()))
    full = replace(whole, networks={name: replace(one, name=name) for name in every})
    with pytest.raises(MeasurementError) as caught:
        held_out(tmp_path, full)
    assert str(caught.value) == (
        "0 networks of space tiny are not in the table; at least 2 are needed to judge "
        "a predictor. Profile fewer, or a larger space"
    )
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_to_judge_by_one_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ofa-deploy", "profile", "--evaluate", "1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    told = " ".join(capsys.readouterr().err.split())
    assert told == ("error: --evaluate 1: one network judges nothing; give 2, or 0")
