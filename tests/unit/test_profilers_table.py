from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profilers import (
    Conditions,
    DeviceSpec,
    Drift,
    LatencyTable,
    Measurement,
    MeasureSettings,
    RuntimeSpec,
    Stability,
    Visit,
    WorkOrder,
    require_compatible,
)
from profilers.errors import FormatError, IncompatibleTables
from profilers.json_reader import parse_json
from tests.support import profilers_values as values

DEVICE = DeviceSpec(
    name="board",
    arch="aarch64",
    cpu_model="A76",
    core_count=4,
    accelerator=None,
    memory_mb=8000,
)
RUNTIME = RuntimeSpec(
    backend="fake", version="1", provider="CPU", threads=1, precision="f32"
)
NET = Measurement(
    name="net",
    visits=(
        Visit(
            time_ns=12,
            anchor_before_ns=250_000,
            anchor_after_ns=251_000,
            inner_loops=1,
            samples_ns=(700_123, 700_456),
        ),
    ),
    quiet_ms=0.7,
    standard_error_ratio=0.01,
    median_ms=0.71,
    stability=Stability(verdict="stable"),
)
CONDITIONS = Conditions(
    governor="performance",
    frequency_mhz=2400.0,
    temperature_c=None,
    load_average=0.1,
    affinity_core_count=4,
    cgroup_quota_cores=None,
    shared_host=False,
)
TABLE = LatencyTable(
    origin="synthetic",
    space_name="tiny",
    space_sha256="0" * 64,
    device=DEVICE,
    runtime=RUNTIME,
    settings=MeasureSettings.screen(),
    conditions_before=CONDITIONS,
    conditions_after=replace(CONDITIONS, load_average=0.9),
    drift=Drift(
        window_count=40, flagged_count=6, discarded_count=1, largest_ratio=0.06
    ),
    beta=0.72,
    anchor_reference_ns=250_000.0,
    created_at="2026-01-31T12:00:00Z",
    blocks={},
    networks={"net": NET},
    random_networks=(),
    failures={"bad": "ended by signal SIGSEGV"},
)

Document = dict[str, Any]


def save_and_load(table: LatencyTable) -> LatencyTable:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "table.json")
        table.save(path)
        return LatencyTable.load(path)


def load_text(text: str) -> LatencyTable:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "table.json")
        path.write_text(text, encoding="utf-8")
        return LatencyTable.load(path)


def saved_text(table: LatencyTable = TABLE) -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "table.json")
        table.save(path)
        return path.read_text(encoding="utf-8")


@given(values.tables)
@settings(max_examples=30, deadline=None)
def test_a_table_survives_its_file(table: LatencyTable) -> None:
    assert save_and_load(table) == table


def test_a_table_of_the_format_before_is_read_and_checked() -> None:
    document = json.loads(saved_text())
    del document["random_networks"], document["sha256"]
    document["format_version"] = 5
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    document["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    assert load_text(json.dumps(document)) == TABLE
    with pytest.raises(FormatError, match="the digest does not match"):
        load_text(json.dumps({**document, "beta": 0.123}))
    with pytest.raises(FormatError, match="'random_networks' is unknown"):
        load_text(json.dumps({**document, "random_networks": []}))


def test_equal_tables_make_equal_files() -> None:
    assert saved_text(replace(TABLE)) == saved_text(save_and_load(TABLE))


def test_a_visit_is_one_line() -> None:
    (line,) = [line for line in saved_text().splitlines() if "samples_ns" in line]
    assert json.loads(line)["samples_ns"] == [700_123, 700_456]


def test_saving_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("old", encoding="utf-8")
    TABLE.save(path)
    assert LatencyTable.load(path) == TABLE
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_does_not_change_with_the_dictionary_it_was_made_from() -> None:
    networks = {"net": NET}
    table = replace(TABLE, networks=networks)
    networks.clear()
    assert table == TABLE


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_file_cut_off_anywhere_is_refused(data: st.DataObject) -> None:
    text = saved_text().rstrip()
    length = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(FormatError, match=r"table\.json: .*"):
        load_text(text[:length])


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_changed_digit_never_changes_the_table(data: st.DataObject) -> None:
    text = saved_text()
    places = [index for index, character in enumerate(text) if character.isdigit()]
    place = data.draw(st.sampled_from(places))
    digit = data.draw(st.sampled_from("0123456789"))
    try:
        table = load_text(text[:place] + digit + text[place + 1 :])
    except FormatError:
        return
    # The same digit, or one that makes the same number.
    assert table == TABLE


def test_a_flipped_digit_of_a_sample_is_found_by_the_digest() -> None:
    with pytest.raises(FormatError, match="re-run `ofa-deploy profile`") as refused:
        load_text(saved_text().replace("700123", "700124"))
    assert refused.value.path == "sha256"


def put(*keys: str | int, value: object) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        place: Any = document
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


def drop(*keys: str) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        place: Any = document
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return change


VISIT = ("networks", "net", "visits", 0)
VISIT_PATH = 'networks["net"].visits[0]'


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        (put("surprise", value=1), "", "'surprise' is unknown"),
        (drop("beta"), "", "'beta' is missing"),
        (put("format_version", value=1), "format_version", "1 is not supported"),
        (put("format_version", value=True), "format_version", "whole number belongs"),
        (put("origin", value="guessed"), "origin", "'guessed' is not allowed"),
        (put("beta", value="0.7"), "beta", "'0.7' is a text; a number belongs"),
        (put("beta", value=True), "beta", "True is true or false; a number belongs"),
        (put("beta", value=-0.5), "beta", "too small"),
        (put("anchor_reference_ns", value=0), "anchor_reference_ns", "not positive"),
        (put("device", value=[]), "device", "a list; an object belongs"),
        (put("device", "name", value=""), "device.name", "empty"),
        (put("device", "core_count", value=1.5), "device.core_count", "whole number"),
        (
            put("conditions_after", "shared_host", value=0),
            "conditions_after.shared_host",
            "true or false belongs",
        ),
        (put("created_at", value="yesterday"), "", "give ISO 8601"),
        (put("random_networks", value=["none"]), "", "'none', which is none of the"),
        (put("random_networks", value=[1]), "random_networks[0]", "a text belongs"),
        (put("space_sha256", value="abc"), "", "64 lowercase hex digits"),
        (put("settings", "visits", value=1), "settings.visits", "at least 2"),
        (
            put(*VISIT, "samples_ns", 1, value=0),
            f"{VISIT_PATH}.samples_ns[1]",
            "at least 1",
        ),
        (
            put(*VISIT, "samples_ns", 1, value=True),
            f"{VISIT_PATH}.samples_ns[1]",
            "whole number belongs",
        ),
        (
            put(*VISIT, "samples_ns", 0, value=10**400),
            f"{VISIT_PATH}.samples_ns[0]",
            "too large",
        ),
        (put(*VISIT, "samples_ns", value=[]), VISIT_PATH, "samples_ns is empty"),
        (put(*VISIT, "extra", value=1), VISIT_PATH, "'extra' is unknown"),
        (
            put("networks", "net", "quiet_ms", value=0.0),
            'networks["net"].quiet_ms',
            "not positive",
        ),
        (
            put("networks", "net", "stability", "verdict", value="fine"),
            'networks["net"].stability.verdict',
            "'fine' is not allowed",
        ),
        (put("networks", "net", "name", value="other"), "", "under the name 'net'"),
        (put("sha256", value="0" * 64), "sha256", "does not match the content"),
    ],
)
def test_a_hostile_value_is_refused_with_its_place(
    change: Callable[[Document], None], path: str, message: str
) -> None:
    document: Document = json.loads(saved_text())
    change(document)
    with pytest.raises(FormatError, match=message) as refused:
        load_text(json.dumps(document))
    assert refused.value.path == path


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(number: float) -> None:
    document: Document = json.loads(saved_text())
    document["beta"] = number
    with pytest.raises(FormatError, match="finite"):
        load_text(json.dumps(document))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("null", id="null"),
        pytest.param("[1, 2]", id="a list"),
        pytest.param('{"format_version": 2, "format_version": 2}', id="a key twice"),
        pytest.param("[" * 100_000, id="deep nesting"),
        pytest.param("1e999", id="an overflow"),
        pytest.param("9" * 10_000, id="a very long number"),
    ],
)
def test_what_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        load_text(text)


def test_bytes_that_are_no_text_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(FormatError, match=r"cannot be read \("):
        LatencyTable.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match=r"cannot be read \("):
        LatencyTable.load(path)


def test_a_number_too_large_for_a_float_is_not_finite() -> None:
    with pytest.raises(FormatError, match="not finite"):
        parse_json("1e999").number()


def test_a_table_fits_its_own_device_whatever_that_is_called() -> None:
    require_compatible(TABLE, DEVICE, RUNTIME)
    require_compatible(TABLE, replace(DEVICE, name="other"), RUNTIME)
    # The kernel keeps a varying share of the memory for itself.
    require_compatible(TABLE, replace(DEVICE, memory_mb=8010), RUNTIME)


def test_every_difference_is_named_with_both_values() -> None:
    with pytest.raises(IncompatibleTables) as refused:
        require_compatible(
            TABLE,
            replace(DEVICE, core_count=8),
            replace(RUNTIME, version="2", threads=2),
        )
    message = str(refused.value)
    assert "device core_count is 4 in the table and 8 here" in message
    assert "runtime version is '1' in the table and '2' here" in message
    assert "runtime threads is 1 in the table and 2 here" in message
    assert "cpu_model" not in message
    assert "ofa-deploy profile" in message


ORDER = WorkOrder(
    names=("a", "b"), backend="fake", threads=1, settings=MeasureSettings.screen()
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ()}, "0 models with 0 different names"),
        ({"names": ("a", "a")}, "2 models with 1 different names"),
        ({"threads": 0}, "threads=0"),
        ({"limit_s": float("nan")}, "limit_s=nan"),
        ({"group_size": 0}, "group_size=0"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ORDER, **change)
