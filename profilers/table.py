"""Latency tables: measurements with the conditions they hold under, as JSON files.

A table is written whole or not at all, checked against its own digest when read, and
diffs well: keys are sorted, one visit is one line. Tables of different hardware or
software do not mix; `require_compatible` says why.
"""

from __future__ import annotations

import hashlib
import json
import math
import string
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from profilers.codec import (
    decode_conditions,
    decode_device,
    decode_drift,
    decode_measurement,
    decode_runtime,
    decode_settings,
    encode_flat,
    encode_measurement,
)
from profilers.device import Conditions, DeviceSpec, RuntimeSpec, differing_fields
from profilers.errors import IncompatibleTables
from profilers.files import write_atomically
from profilers.json_reader import Json, JsonNode, read_json
from profilers.measurement import Drift, Measurement, MeasureSettings

__all__ = ["FORMAT_VERSION", "LatencyTable", "Origin", "require_compatible"]

FORMAT_VERSION = 6
# Read as well: it did not tell which networks are random.
OLD_FORMAT_VERSION = 5

Origin = Literal["measured", "emulated", "synthetic"]

_REMEASURE = "delete the file and re-run `ofa-deploy profile`"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTable:
    """Measured latencies of a space's blocks and networks on one device.

    Attributes:
        format_version: Of the file; always `FORMAT_VERSION` in memory.
        origin: `measured` on the device; `emulated` on another one slowed down;
            `synthetic` from a formula, for tests.
        space_name: The search space measured.
        space_sha256: Digest of that space's definition.
        device: Hardware.
        runtime: Software.
        settings: How it was measured.
        conditions_before: State of the device when measuring began.
        conditions_after: When it ended.
        drift: Of the windows in which the networks were measured.
        beta: Of the quiet-state fit to the networks.
        anchor_reference_ns: The anchor's quiet level, which all latencies speak of.
        created_at: ISO 8601 date and time at which its oldest visits began.
        blocks: By name; fused blocks.
        networks: By name; whole networks.
        random_networks: Names of the networks that were drawn at random, and not
            chosen for what they tell: what a predictor errs by on random networks,
            these alone show. Empty where that is not known.
        failures: Reasons by name, of the models that could not be measured.
    """

    format_version: int = FORMAT_VERSION
    origin: Origin
    space_name: str
    space_sha256: str
    device: DeviceSpec
    runtime: RuntimeSpec
    settings: MeasureSettings
    conditions_before: Conditions
    conditions_after: Conditions
    drift: Drift
    beta: float
    anchor_reference_ns: float
    created_at: str
    blocks: Mapping[str, Measurement]
    networks: Mapping[str, Measurement]
    random_networks: tuple[str, ...]
    failures: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version={self.format_version}; this version has "
                f"{FORMAT_VERSION}"
            )
        if self.origin not in get_args(Origin):
            raise ValueError(f"origin={self.origin!r}; give one of {get_args(Origin)}")
        if not self.space_name:
            raise ValueError("space_name is empty; name the search space")
        _check_sha256(self.space_sha256)
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(f"beta={self.beta}; give a finite number, at least 0")
        reference_ns = self.anchor_reference_ns
        if not (math.isfinite(reference_ns) and reference_ns > 0):
            raise ValueError(
                f"anchor_reference_ns={reference_ns}; give a finite number above 0"
            )
        _check_time(self.created_at)
        for field in ("blocks", "networks"):
            measurements = dict(getattr(self, field))
            for name, measurement in measurements.items():
                if name != measurement.name:
                    raise ValueError(
                        f"{field} has {measurement.name!r} under the name {name!r}; "
                        "use the measurement's own name"
                    )
            # A frozen table must not change through the caller's dictionary.
            object.__setattr__(self, field, MappingProxyType(measurements))
        object.__setattr__(self, "failures", MappingProxyType(dict(self.failures)))
        if unknown := sorted({*self.random_networks} - self.networks.keys()):
            raise ValueError(
                f"random_networks has {unknown[0]!r}, which is none of the networks"
            )

    @property
    def created_s(self) -> float:
        """`created_at` in seconds since 1970; without a zone it is taken as local."""
        return _time(self.created_at).timestamp()

    def save(self, path: Path) -> None:
        """Write the table, replacing the file at once or leaving it as it was."""
        content = _encode(self)
        document: dict[str, Json] = {**content, "sha256": _digest(content)}
        write_atomically(path, f"{_pretty(document)}\n".encode())

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        otherwise: str = "check the path, or run `ofa-deploy profile` to make one",
    ) -> LatencyTable:
        """Read a table.

        Args:
            path: The file.
            otherwise: What to do if it holds none.

        Raises:
            FormatError: The file cannot be read, is damaged, or of another version.
        """
        return read_json(path, _decode, otherwise=otherwise)


def require_compatible(
    table: LatencyTable, device: DeviceSpec, runtime: RuntimeSpec
) -> None:
    """Check that a table's latencies hold for this device and runtime.

    Raises:
        IncompatibleTables: They differ in something that latency depends on.
    """
    differences = describe_differences(table, device, runtime, here="here")
    if differences:
        raise IncompatibleTables(
            f"the table of {table.device.name!r} does not hold here: {differences}. "
            "Run `ofa-deploy profile` on this device to measure a new one"
        )


def describe_differences(
    table: LatencyTable, device: DeviceSpec, runtime: RuntimeSpec, *, here: str
) -> str:
    """Say in what that latency depends on a table differs from a device and runtime.

    Args:
        table: The table.
        device: Another device.
        runtime: Another runtime.
        here: Where these are, for people.

    Returns:
        Every difference with both values; empty if there is none.
    """
    return "; ".join(
        f"{kind} {field} is {measured!r} in the table and {present!r} {here}"
        for kind, then, now in (
            ("device", table.device, device),
            ("runtime", table.runtime, runtime),
        )
        for field, measured, present in differing_fields(then, now)
    )


def _check_sha256(digest: str) -> None:
    if len(digest) != 64 or set(digest) - set(string.digits + "abcdef"):
        raise ValueError(f"space_sha256={digest!r}; give 64 lowercase hex digits")


def _time(created_at: str) -> datetime:
    # Python 3.10 does not know the Z of UTC.
    return datetime.fromisoformat(created_at.replace("Z", "+00:00"))


def _check_time(created_at: str) -> None:
    try:
        _time(created_at)
    except ValueError:
        raise ValueError(
            f"created_at={created_at!r}; give ISO 8601, as 2026-01-31T12:00:00+00:00"
        ) from None


def _encode(table: LatencyTable) -> dict[str, Json]:
    return {
        "format_version": table.format_version,
        "origin": table.origin,
        "space_name": table.space_name,
        "space_sha256": table.space_sha256,
        "device": encode_flat(table.device),
        "runtime": encode_flat(table.runtime),
        "settings": encode_flat(table.settings),
        "conditions_before": encode_flat(table.conditions_before),
        "conditions_after": encode_flat(table.conditions_after),
        "drift": encode_flat(table.drift),
        "beta": table.beta,
        "anchor_reference_ns": table.anchor_reference_ns,
        "created_at": table.created_at,
        "blocks": {
            name: encode_measurement(block) for name, block in table.blocks.items()
        },
        "networks": {
            name: encode_measurement(net) for name, net in table.networks.items()
        },
        "random_networks": [*table.random_networks],
        "failures": dict(table.failures),
    }


def _decode(node: JsonNode) -> LatencyTable:
    version = JsonNode(
        node.value.get("format_version") if isinstance(node.value, dict) else None,
        "format_version",
    )
    # Before the keys: those of another version would only look wrong.
    if version.integer(minimum=1) not in (OLD_FORMAT_VERSION, FORMAT_VERSION):
        version.refuse(
            f"{version.value} is not supported, this version reads "
            f"{OLD_FORMAT_VERSION} and {FORMAT_VERSION}; {_REMEASURE}"
        )
    is_old = version.value == OLD_FORMAT_VERSION
    names = [field.name for field in fields(LatencyTable)]
    if is_old:
        names.remove("random_networks")
    entries = node.fields(*names, "sha256")
    table = node.build(
        lambda: LatencyTable(
            origin=entries["origin"].choice(get_args(Origin)),
            space_name=entries["space_name"].text(),
            space_sha256=entries["space_sha256"].text(),
            device=decode_device(entries["device"]),
            runtime=decode_runtime(entries["runtime"]),
            settings=decode_settings(entries["settings"]),
            conditions_before=decode_conditions(entries["conditions_before"]),
            conditions_after=decode_conditions(entries["conditions_after"]),
            drift=decode_drift(entries["drift"]),
            beta=entries["beta"].number(minimum=0),
            anchor_reference_ns=entries["anchor_reference_ns"].positive(),
            created_at=entries["created_at"].text(),
            blocks=_decode_measurements(entries["blocks"]),
            networks=_decode_measurements(entries["networks"]),
            random_networks=(
                ()
                if is_old
                else tuple(name.text() for name in entries["random_networks"].items())
            ),
            failures={
                name: entry.text()
                for name, entry in entries["failures"].entries().items()
            },
        )
    )
    content = _encode(table)
    if is_old:
        content["format_version"] = OLD_FORMAT_VERSION
        del content["random_networks"]
    if entries["sha256"].text() != _digest(content):
        entries["sha256"].refuse(
            f"the digest does not match the content: the table was changed or damaged "
            f"after it was written; {_REMEASURE}"
        )
    return table


def _decode_measurements(node: JsonNode) -> dict[str, Measurement]:
    return {name: decode_measurement(entry) for name, entry in node.entries().items()}


def _digest(content: Mapping[str, Json]) -> str:
    canonical = json.dumps(
        content, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


def _pretty(value: Json, indent: str = "") -> str:
    """Indent objects and lists, but keep everything inside a list on one line."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        lines = [
            f"{deeper}{json.dumps(key)}: {_pretty(entry, deeper)}"
            for key, entry in sorted(value.items())
        ]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        lines = [
            deeper + json.dumps(item, sort_keys=True, allow_nan=False) for item in value
        ]
        return "[\n" + ",\n".join(lines) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)
