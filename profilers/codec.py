"""JSON forms of the values that files and messages share, both ways.

`decode_x(JsonNode(encode_x(value)))` is `value`. A decoder refuses unknown keys.
"""

from __future__ import annotations

import dataclasses
from typing import cast, get_args

from profilers.device import Conditions, DeviceSpec, RuntimeSpec
from profilers.json_reader import Json, JsonNode
from profilers.measurement import (
    Drift,
    Measurement,
    MeasurementRun,
    MeasureSettings,
    Stability,
    StabilityVerdict,
    Visit,
)

__all__ = [
    "decode_conditions",
    "decode_device",
    "decode_drift",
    "decode_measurement",
    "decode_run",
    "decode_runtime",
    "decode_settings",
    "decode_visit",
    "encode_flat",
    "encode_measurement",
    "encode_run",
    "encode_visit",
]

Flat = DeviceSpec | RuntimeSpec | Conditions | MeasureSettings | Drift


def encode_flat(value: Flat) -> dict[str, Json]:
    """Encode a value whose fields are plain: one key per field, by its name."""
    return cast("dict[str, Json]", dataclasses.asdict(value))


def decode_device(node: JsonNode) -> DeviceSpec:
    """Decode a `DeviceSpec`."""
    fields = node.fields(*_names(DeviceSpec))
    return DeviceSpec(
        name=fields["name"].text(),
        arch=fields["arch"].text(),
        cpu_model=fields["cpu_model"].text(),
        core_count=fields["core_count"].integer(minimum=1),
        accelerator=fields["accelerator"].optional(JsonNode.text),
        memory_mb=fields["memory_mb"].integer(minimum=1),
    )


def decode_runtime(node: JsonNode) -> RuntimeSpec:
    """Decode a `RuntimeSpec`."""
    fields = node.fields(*_names(RuntimeSpec))
    return RuntimeSpec(
        backend=fields["backend"].text(),
        version=fields["version"].text(),
        provider=fields["provider"].text(),
        threads=fields["threads"].integer(minimum=1),
        precision=fields["precision"].text(),
    )


def decode_conditions(node: JsonNode) -> Conditions:
    """Decode `Conditions`."""
    fields = node.fields(*_names(Conditions))
    return Conditions(
        governor=fields["governor"].optional(JsonNode.text),
        frequency_mhz=fields["frequency_mhz"].optional(JsonNode.positive),
        temperature_c=fields["temperature_c"].optional(JsonNode.number),
        load_average=fields["load_average"].optional(_at_least_zero),
        affinity_core_count=fields["affinity_core_count"].optional(_at_least_one),
        cgroup_quota_cores=fields["cgroup_quota_cores"].optional(JsonNode.positive),
        shared_host=fields["shared_host"].boolean(),
    )


def decode_settings(node: JsonNode) -> MeasureSettings:
    """Decode `MeasureSettings`."""
    fields = node.fields(*_names(MeasureSettings))
    return node.build(
        lambda: MeasureSettings(
            visits=fields["visits"].integer(minimum=2),
            runs_per_visit=fields["runs_per_visit"].integer(minimum=1),
            warmup_runs=fields["warmup_runs"].integer(minimum=1),
            warmup_windows=fields["warmup_windows"].integer(minimum=1),
            anchor_repeats=fields["anchor_repeats"].integer(minimum=1),
            seed=fields["seed"].integer(minimum=0),
            target_relative_error=fields["target_relative_error"].positive(),
            max_seconds=fields["max_seconds"].positive(),
            pass_seconds=fields["pass_seconds"].number(minimum=0),
        )
    )


def decode_drift(node: JsonNode) -> Drift:
    """Decode a `Drift`."""
    fields = node.fields(*_names(Drift))
    return node.build(
        lambda: Drift(
            window_count=fields["window_count"].integer(minimum=1),
            flagged_count=fields["flagged_count"].integer(minimum=0),
            discarded_count=fields["discarded_count"].integer(minimum=0),
            largest_ratio=fields["largest_ratio"].number(minimum=0),
        )
    )


def encode_measurement(measurement: Measurement) -> dict[str, Json]:
    """Encode a `Measurement`; its name is a field like the others."""
    fields = cast("dict[str, Json]", _with_lists(dataclasses.asdict(measurement)))
    return {**fields, "visits": [encode_visit(visit) for visit in measurement.visits]}


def decode_measurement(node: JsonNode) -> Measurement:
    """Decode a `Measurement`."""
    fields = node.fields(*_names(Measurement))
    return node.build(
        lambda: Measurement(
            name=fields["name"].text(),
            visits=tuple(decode_visit(visit) for visit in fields["visits"].items()),
            quiet_ms=fields["quiet_ms"].positive(),
            standard_error_ratio=fields["standard_error_ratio"].number(minimum=0),
            median_ms=fields["median_ms"].positive(),
            stability=_decode_stability(fields["stability"]),
        )
    )


def encode_visit(visit: Visit) -> dict[str, Json]:
    """Encode a `Visit`; there are hundreds, so what is None or not so is left out."""
    fields = cast("dict[str, Json]", _with_lists(dataclasses.asdict(visit)))
    return {
        name: value
        for name, value in fields.items()
        if value is not None and value is not False
    }


def decode_visit(node: JsonNode) -> Visit:
    """Decode a `Visit`."""
    fields = node.fields(*_names(Visit), may_lack=("fallback", "device_timed"))
    return node.build(
        lambda: Visit(
            time_ns=fields["time_ns"].integer(minimum=0),
            anchor_before_ns=fields["anchor_before_ns"].integer(minimum=1),
            anchor_after_ns=fields["anchor_after_ns"].integer(minimum=1),
            inner_loops=fields["inner_loops"].integer(minimum=1),
            samples_ns=fields["samples_ns"].integers(minimum=1),
            fallback=fields["fallback"].optional(JsonNode.text),
            session=fields["session"].integer(minimum=0),
            device_timed=fields["device_timed"].optional(JsonNode.boolean) or False,
        )
    )


def encode_run(run: MeasurementRun) -> dict[str, Json]:
    """Encode a `MeasurementRun`."""
    fields = cast("dict[str, Json]", _with_lists(dataclasses.asdict(run)))
    return {**fields, "measurements": [*map(encode_measurement, run.measurements)]}


def decode_run(node: JsonNode) -> MeasurementRun:
    """Decode a `MeasurementRun`."""
    fields = node.fields(*_names(MeasurementRun))
    return node.build(
        lambda: MeasurementRun(
            measurements=tuple(map(decode_measurement, fields["measurements"].items())),
            beta=fields["beta"].number(minimum=0),
            anchor_reference_ns=fields["anchor_reference_ns"].positive(),
            conditions=decode_conditions(fields["conditions"]),
            duration_s=fields["duration_s"].positive(),
            indicative=fields["indicative"].boolean(),
        )
    )


def _decode_stability(node: JsonNode) -> Stability:
    fields = node.fields(*_names(Stability))
    return node.build(
        lambda: Stability(
            verdict=fields["verdict"].choice(get_args(StabilityVerdict)),
            reasons=tuple(reason.text() for reason in fields["reasons"].items()),
        )
    )


def _at_least_zero(node: JsonNode) -> float:
    return node.number(minimum=0)


def _at_least_one(node: JsonNode) -> int:
    return node.integer(minimum=1)


def _names(kind: type) -> tuple[str, ...]:
    # The dataclass is the schema: a field that a decoder forgets is a missing argument.
    return tuple(field.name for field in dataclasses.fields(kind))


def _with_lists(value: object) -> object:
    # JSON knows no tuples; equality with what was read back needs lists.
    if isinstance(value, dict):
        return {key: _with_lists(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_with_lists(entry) for entry in value]
    return value
