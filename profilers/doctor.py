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
from profilers.errors import DeployError

__all__ = ["BackendStatus", "Diagnosis", "Finding", "Severity", "examine"]

Severity = Literal["ok", "warning", "error"]

# One process more than this per core, on average, and the timed one has to wait.
BUSY_LOAD_PER_CORE = 0.5

STEADY_GOVERNORS = ("performance",)


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
    findings: tuple[Finding, ...]

    @property
    def fit(self) -> bool:
        """Whether measuring is possible at all."""
        return all(finding.severity != "error" for finding in self.findings)


def examine() -> Diagnosis:
    """Look at this device. Imports every runtime that is installed."""
    conditions = read_conditions()
    cores = available_cores()
    backends = tuple(_backend_status(name) for name in backend_names())
    return Diagnosis(
        device=this_device(),
        conditions=conditions,
        core_count=cores,
        backends=backends,
        findings=diagnose(conditions, core_count=cores, backends=backends),
    )


def diagnose(
    conditions: Conditions,
    *,
    core_count: int,
    backends: tuple[BackendStatus, ...],
) -> tuple[Finding, ...]:
    """Judge what was read.

    Args:
        conditions: Of the device.
        core_count: Cores that this process can use.
        backends: All of them.
    """
    findings = [_judge_backends(backends)]
    load = conditions.load_average
    if load is not None:
        busy = load > BUSY_LOAD_PER_CORE * core_count
        findings.append(
            Finding(
                severity="warning" if busy else "ok",
                text=f"load average {load:.2f} on {core_count} usable cores",
                cure="stop other programs while measuring" if busy else "",
            )
        )
    quota = conditions.cgroup_quota_cores
    if quota is not None and quota < (conditions.affinity_core_count or core_count):
        findings.append(
            Finding(
                severity="warning",
                text=f"a control group limits this process to {quota:g} cores",
                cure="use no more threads than that, or raise the container's limit",
            )
        )
    governor = conditions.governor
    if governor is not None:
        steady = governor in STEADY_GOVERNORS
        findings.append(
            Finding(
                severity="ok" if steady else "warning",
                text=f"the frequency governor is {governor}",
                cure=(
                    ""
                    if steady
                    else "for steady clocks: sudo cpupower frequency-set -g performance"
                ),
            )
        )
    if conditions.shared_host:
        findings.append(
            Finding(
                severity="warning",
                text="this host is shared: its speed changes by others' work",
                cure=(
                    "figures are marked indicative; measure on a dedicated machine to "
                    "certify them"
                ),
            )
        )
    return tuple(findings)


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


def _backend_status(name: str) -> BackendStatus:
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
