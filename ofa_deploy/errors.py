"""Every error that the library raises on purpose.

```
DeployError
├── FormatError            a file is not what it should be; knows the path inside it
├── MissingDependency      ends with the pip line
├── BackendError
│   ├── ModelRejected      the runtime does not load the model
│   └── RunFailed          it loaded, and failed while running
├── DeviceError
│   └── DeviceUnfit
├── MeasurementError
│   ├── UnstableMeasurement
│   ├── IncompatibleTables
│   └── StaleTable         the machine is not what it was; carries how far off
├── SpaceError             a config that is not in the space, or limits without sense
├── DataError              images that cannot be used
├── TrainingError          a run folder that cannot be continued, or a loss that is none
├── TraceError             a network whose channels cannot be told; names the layer
├── UnmeasuredBlock        the latency table does not hold a block of the plan
├── InfeasibleBudget       carries the budget and what comes nearest
├── ParityError            carries the figures
└── BundleError
    └── DigestMismatch
```

The upper half is defined in `profilers`, which runs on the device without this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from profilers.errors import (
    BackendError,
    DeployError,
    DeviceError,
    DeviceUnfit,
    FormatError,
    IncompatibleTables,
    MeasurementError,
    MissingDependency,
    ModelRejected,
    RunFailed,
    UnstableMeasurement,
)

__all__ = [
    "BackendError",
    "BundleError",
    "DataError",
    "DeployError",
    "DeviceError",
    "DeviceUnfit",
    "DigestMismatch",
    "FormatError",
    "IncompatibleTables",
    "InfeasibleBudget",
    "MeasurementError",
    "MissingDependency",
    "ModelRejected",
    "ParityError",
    "RunFailed",
    "SpaceError",
    "StaleTable",
    "TraceError",
    "TrainingError",
    "UnmeasuredBlock",
    "UnstableMeasurement",
]


class SpaceError(DeployError):
    """A config, genome or id does not describe a network of the space."""


class StaleTable(MeasurementError):
    """The anchor model is not as fast as when the latency table was measured.

    Attributes:
        ratio: Its latency now over then; None where it does not run any more.
    """

    def __init__(self, message: str, *, ratio: float | None) -> None:
        super().__init__(message)
        self.ratio = ratio


class DataError(DeployError):
    """Images, labels or their folder cannot be used."""


class TraceError(DeployError):
    """A network whose channels cannot be told; the message names the layer."""


class TrainingError(DeployError):
    """A training run cannot be started or continued."""


class UnmeasuredBlock(DeployError):
    """The latency table holds no measurement for a block that a plan needs."""


class InfeasibleBudget(DeployError):
    """No network of the space keeps the limits.

    Attributes:
        budget_ms: The latency that was asked for; None if none was.
        fastest_ms: That of the network that comes nearest; None likewise.
        nearest: Id of that network; None if it is not known.
    """

    def __init__(
        self,
        message: str,
        *,
        budget_ms: float | None,
        fastest_ms: float | None,
        nearest: str | None = None,
    ) -> None:
        super().__init__(message)
        self.budget_ms = budget_ms
        self.fastest_ms = fastest_ms
        self.nearest = nearest


class ParityError(DeployError):
    """The exported file does not compute what the reference computes.

    Attributes:
        max_relative_error: Largest difference over the largest reference output.
        top1_agreement: Share of images with the same top class, 0..1.
    """

    def __init__(
        self, message: str, *, max_relative_error: float, top1_agreement: float
    ) -> None:
        super().__init__(message)
        self.max_relative_error = max_relative_error
        self.top1_agreement = top1_agreement


class BundleError(DeployError):
    """A bundle cannot be written or read."""


class DigestMismatch(BundleError):
    """A file is not the one whose digest was recorded."""

    def __init__(self, path: Path, *, expected: str, actual: str) -> None:
        super().__init__(
            f"{path.name} has sha256 {actual[:16]}…, the recorded one is "
            f"{expected[:16]}…; the file was changed or damaged. Restore it from "
            "where it came from; do not use it"
        )
        self.path = path
        self.expected = expected
        self.actual = actual


def few_of(names: Sequence[str], *, most: int = 5) -> str:
    """The first of some names, as messages list them."""
    more = ", …" if len(names) > most else ""
    return ", ".join(names[:most]) + more
