"""The errors of `profilers`, and the root of every error of the product.

```
DeployError
├── FormatError            a file or message does not have the promised form (.path)
├── MissingDependency      an optional package is not installed (.package, .extra)
├── BackendError
│   ├── ModelRejected      the runtime cannot load the model
│   └── RunFailed          the runtime loaded the model and failed to run it
├── DeviceError
│   └── DeviceUnfit        the device cannot give what was asked of it
└── MeasurementError
    ├── UnstableMeasurement    no trustworthy number came out within the bounds
    └── IncompatibleTables     measurements of different conditions would be mixed
```

Every message says what is wrong with which value, what is allowed, and what to do.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "DeployError",
    "DeviceError",
    "DeviceUnfit",
    "FormatError",
    "IncompatibleTables",
    "MeasurementError",
    "MissingDependency",
    "ModelRejected",
    "RunFailed",
    "UnstableMeasurement",
]


class DeployError(Exception):
    """Root of all errors that this product raises on purpose."""


class FormatError(DeployError):
    """A file or message does not have the promised form.

    Attributes:
        path: Where inside the document, as in `networks["a"].visits[3]`; an empty
            string for the document as a whole.
    """

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path

    def in_file(self, name: str) -> FormatError:
        """Return the same error, its message opening with the file's name."""
        error = FormatError(f"{name}: {self}", path="")
        error.path = self.path
        return error


class MissingDependency(DeployError):
    """An optional package is needed and not installed.

    Attributes:
        package: The package's name as people write it.
        extra: The extra of `ofa-deploy` that brings it.
    """

    def __init__(self, package: str, *, extra: str) -> None:
        super().__init__(
            f"{package} is not installed. Run: pip install 'ofa-deploy[{extra}]'"
        )
        self.package = package
        self.extra = extra


class BackendError(DeployError):
    """A runtime failed."""


class ModelRejected(BackendError):
    """The runtime cannot load the model."""


class RunFailed(BackendError):
    """The runtime loaded the model and failed to run it."""


class DeviceError(DeployError):
    """The device or the way to it is not what was asked for."""


class DeviceUnfit(DeviceError):
    """The device cannot give what was asked of it, for instance enough cores."""


class MeasurementError(DeployError):
    """A measurement could not be made or may not be used."""


class UnstableMeasurement(MeasurementError):
    """No trustworthy number came out within the bounds of the settings."""


class IncompatibleTables(MeasurementError):
    """Measurements taken under different conditions would be mixed."""
