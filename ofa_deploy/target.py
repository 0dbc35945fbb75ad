"""The name of a device and runtime, such as `openvino-cpu?threads=2`."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl

from ofa_deploy.errors import DeviceError
from profilers.backends import backend_names
from profilers.device import available_cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a model is to run.

    Args:
        backend: As `profilers.backends.get_backend` takes it.
        threads: Of one inference.
    """

    backend: str
    threads: int


def parse_target(text: str, *, threads: int | None = None) -> Target:
    """The target that a text names.

    Args:
        text: Such as `openvino-cpu?threads=2`.
        threads: Likewise; None leaves it to the text, and 1 where it has none.

    Raises:
        DeviceError: Unknown backend or option, a bad thread count, or two of them.
    """
    if threads is not None:
        if "threads=" in text:
            raise DeviceError(
                f"device {text!r} names its threads, and threads={threads} is given "
                "besides; give one of them"
            )
        text = f"{text}{'&' if '?' in text else '?'}threads={threads}"
    backend, _, query = text.partition("?")
    if backend not in backend_names():
        raise DeviceError(
            f"device {text!r} is unknown; there are {', '.join(backend_names())}, "
            "optionally with ?threads=N"
        )
    count = 1
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key != "threads":
            raise DeviceError(
                f"device {text!r}: option {key!r} is unknown; use threads"
            )
        cores = available_cores()
        if not value.isdecimal() or not 1 <= int(value) <= cores:
            raise DeviceError(
                f"device {text!r}: threads={value!r} must be a whole number from 1 to "
                f"{cores}, the cores that this process can use"
            )
        count = int(value)
    return Target(backend=backend, threads=count)
