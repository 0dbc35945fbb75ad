"""What stands between this device and trustworthy measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from profilers.backends import backend_names, get_backend
from profilers.device import (
    Conditions,
    DeviceSpec,
    available_cores,
    read_conditions,
    this_device,
)
from profilers.errors import DeployError, FormatError, RunFailed
from profilers.json_reader import JsonNode, parse_json
from profilers.process import run_for_line
from profilers.steadiness import Steadiness, watch

__all__ = [
    "BackendStatus",
    "Diagnosis",
    "Finding",
    "Severity",
    "examine",
    "start_backend",
]

Severity = Literal["ok", "warning", "error"]

# One process more than this per core, on average, and the timed one has to wait.
BUSY_LOAD_PER_CORE = 0.5

STEADY_GOVERNORS = ("performance",)

# Between the 10th and the 90th percentile of one piece of work repeated: a quiet
# machine stays within 2 or 3 %.
STEADY_SPREAD_RATIO = 0.05


# Importing a runtime; the largest takes seconds on a slow board.
START_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStatus:
    """Whether a backend can be used.

    Attributes:
        name: As `get_backend` takes it.
        version: Of the runtime; None if it cannot be used.
        problem: Why not, with the cure; None if it can.
    """

    name: str
    version: str | None
    problem: str | None

    def __post_init__(self) -> None:
        if (self.version is None) == (self.problem is None):
            raise ValueError(
                f"{self.name}: version={self.version!r}, problem={self.problem!r}; "
                "give one of the two"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing found.

    Attributes:
        severity: `error` forbids measuring, `warning` makes it worse.
        text: What was found.
        cure: What to do; empty if there is nothing to do.
    """

    severity: Severity
    text: str
    cure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything found about this device."""

    device: DeviceSpec
    conditions: Conditions
    core_count: int
    backends: tuple[BackendStatus, ...]
    steadiness: Steadiness
    findings: tuple[Finding, ...]

    @property
    def fit(self) -> bool:
        """Whether measuring is possible at all."""
        return all(finding.severity != "error" for finding in self.findings)


def examine() -> Diagnosis:
    """Look at this device for a few seconds, and start every runtime there is."""
    conditions = read_conditions()
    cores = available_cores()
    backends = tuple(_backend_status(name) for name in backend_names())
    steadiness = watch()
    return Diagnosis(
        device=this_device(),
        conditions=conditions,
        core_count=cores,
        backends=backends,
        steadiness=steadiness,
        findings=diagnose(
            conditions, core_count=cores, backends=backends, steadiness=steadiness
        ),
    )


def diagnose(
    conditions: Conditions,
    *,
    core_count: int,
    backends: tuple[BackendStatus, ...],
    steadiness: Steadiness,
) -> tuple[Finding, ...]:
    """Judge what was read.

    Args:
        conditions: Of the device.
        core_count: Cores that this process can use.
        backends: All of them.
        steadiness: Of the device.
    """
    findings = (
        _judge_backends(backends),
        _judge_load(conditions, core_count),
        _judge_quota(conditions, core_count),
        _judge_governor(conditions),
        _judge_host(conditions),
        _judge_speed(steadiness),
        _judge_throttling(steadiness),
    )
    return tuple(finding for finding in findings if finding is not None)


def _judge_load(conditions: Conditions, core_count: int) -> Finding | None:
    load = conditions.load_average
    if load is None:
        return None
    busy = load > BUSY_LOAD_PER_CORE * core_count
    return Finding(
        severity="warning" if busy else "ok",
        text=f"load average {load:.2f} on {core_count} usable cores",
        cure="stop other programs while measuring" if busy else "",
    )


def _judge_quota(conditions: Conditions, core_count: int) -> Finding | None:
    quota = conditions.cgroup_quota_cores
    if quota is None or quota >= (conditions.affinity_core_count or core_count):
        return None
    return Finding(
        severity="warning",
        text=f"a control group limits this process to {quota:g} cores",
        cure="use no more threads than that, or raise the container's limit",
    )


def _judge_governor(conditions: Conditions) -> Finding | None:
    governor = conditions.governor
    if governor is None:
        return None
    steady = governor in STEADY_GOVERNORS
    cure = "for steady clocks: sudo cpupower frequency-set -g performance"
    return Finding(
        severity="ok" if steady else "warning",
        text=f"the frequency governor is {governor}",
        cure="" if steady else cure,
    )


def _judge_host(conditions: Conditions) -> Finding | None:
    if not conditions.shared_host:
        return None
    return Finding(
        severity="warning",
        text="this host is shared: its speed changes by others' work",
        cure=(
            "read figures as indicative, though networks are held against an anchor "
            "model; or measure on a machine of your own, where they are the clock's"
        ),
    )


def _judge_speed(steadiness: Steadiness) -> Finding:
    varies = steadiness.spread_ratio > STEADY_SPREAD_RATIO
    return Finding(
        severity="warning" if varies else "ok",
        text=f"the same work took times {steadiness.spread_ratio:.0%} apart",
        cure=(
            "stop other programs and look again; what remains is evened out by visits "
            "far apart, which take their time"
            if varies
            else ""
        ),
    )


def _judge_throttling(steadiness: Steadiness) -> Finding | None:
    throttling = steadiness.throttling
    cure = "cool the device, or let it rest between measurements"
    if throttling.active:
        return Finding(severity="warning", text="; ".join(throttling.active), cure=cure)
    if throttling.event_count is None:
        return None
    now = steadiness.new_throttle_events
    return Finding(
        severity="warning" if now else "ok",
        text=(
            f"slowed down by heat {throttling.event_count} times since its start, "
            f"{now} of them just now"
        ),
        cure=cure if now else "",
    )


def _judge_backends(backends: tuple[BackendStatus, ...]) -> Finding:
    usable = [status.name for status in backends if status.version is not None]
    if usable:
        return Finding(
            severity="ok", text=f"usable backends: {', '.join(usable)}", cure=""
        )
    return Finding(
        severity="error",
        text="no backend can be used",
        cure="; ".join(status.problem for status in backends if status.problem),
    )


def start_backend(name: str) -> BackendStatus:
    """Start a runtime in this process, and say its version or what is wrong."""
    try:
        version = get_backend(name).runtime(threads=1).version
    except DeployError as error:
        return BackendStatus(name=name, version=None, problem=str(error))
    except Exception as error:  # a broken installation fails in its own ways
        return BackendStatus(
            name=name,
            version=None,
            problem=f"it fails to start ({error}); reinstall its package",
        )
    return BackendStatus(name=name, version=version, problem=None)


def _backend_status(name: str) -> BackendStatus:
    """Start a runtime in a process of its own, where it may crash or hang."""
    try:
        line = run_for_line(
            ["backend", name],
            label=f"starting {name}",
            timeout_s=START_LIMIT_S,
            cure="reinstall its package",
        )
        fields = parse_json(line).fields("name", "version", "problem")
    except (RunFailed, FormatError) as error:
        return BackendStatus(name=name, version=None, problem=str(error))
    return BackendStatus(
        name=name,
        version=fields["version"].optional(JsonNode.text),
        problem=fields["problem"].optional(JsonNode.text),
    )
