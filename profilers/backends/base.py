"""What a runtime must offer to be measured, and checks that all backends share.

A backend imports its runtime inside its methods, maps the runtime's exceptions to
`ModelRejected` and `RunFailed`, and never returns a runtime's object.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from profilers.device import RuntimeSpec
from profilers.errors import ModelRejected, RunFailed

__all__ = [
    "DYNAMIC",
    "Arrays",
    "Backend",
    "DeviceTimed",
    "FallsBack",
    "LayerLatency",
    "LayerProfiler",
    "Session",
    "check_inputs",
    "check_runs",
    "check_threads",
    "describe_model",
    "random_inputs",
]

Arrays = Mapping[str, NDArray[Any]]

# Of a profile of layers, before its runs count.
WARMUP_RUNS = 3

# Stands in `Session.input_shapes` for a dimension that each run may choose.
DYNAMIC = -1


class Session(Protocol):
    """A loaded model. Not for use from several threads at once."""

    @property
    def input_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each input, in the model's order; `DYNAMIC` where free."""

    @property
    def input_dtypes(self) -> Mapping[str, np.dtype[Any]]:
        """Element type of each input, in the model's order."""

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run the model once.

        Returns:
            Every output by name, in arrays of the caller's own.

        Raises:
            RunFailed: The inputs do not fit, the session is closed, or the runtime
                failed.
        """

    def prepare(self, inputs: Arrays) -> Callable[[], None]:
        """Bind inputs, and return a step that runs the model on them.

        This is for timing: the step does no checking, no copying, and gives no
        outputs. The step keeps `inputs` alive and may read them at each call; it is
        valid until the next `prepare`, `run`, or `close` of this session.

        Raises:
            RunFailed: The inputs do not fit, or the session is closed.
        """

    def close(self) -> None:
        """Release the runtime's memory. Closing again does nothing."""

    def __enter__(self) -> Session:
        """Return itself."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the session."""


@runtime_checkable
class FallsBack(Protocol):
    """A session that can tell in what way it runs its model."""

    @property
    def fallback(self) -> str | None:
        """Why the model runs in another way than the fastest; None if it does not.

        Of the last `prepare` or `prepare_timed`. Times of the two ways do not compare.
        """


@runtime_checkable
class DeviceTimed(FallsBack, Protocol):
    """A session that times its runs by the clock of the processor it runs on.

    A GPU goes on while the host only waits; the host's clock would add the waiting.
    """

    def prepare_timed(self, inputs: Arrays) -> Callable[[int], int]:
        """Bind inputs, and return a function that times runs of the model on them.

        The function takes the number of runs, at least 1, makes them one right after
        the other, and returns the time in ns that they took together; moving inputs
        and outputs is not part of it. It is valid as long as a step of `prepare`.

        Raises:
            RunFailed: The inputs do not fit, or the session is closed.
        """


class Backend(Protocol):
    """A runtime on one kind of processor."""

    @property
    def name(self) -> str:
        """The name that tables and command lines use."""

    def load(self, model: Path | bytes, *, threads: int) -> Session:
        """Load and compile a model.

        Args:
            model: A file of a kind that the runtime reads, or an ONNX model's bytes.
            threads: Threads of one inference, at least 1.

        Raises:
            MissingDependency: The runtime is not installed.
            ModelRejected: The runtime cannot read or compile the model.
            DeviceUnfit: This machine lacks the processor that it runs on.
        """

    def runtime(self, *, threads: int) -> RuntimeSpec:
        """Describe the runtime, for a table's header.

        Raises:
            MissingDependency: The runtime is not installed.
            DeviceUnfit: This machine lacks the processor that it runs on.
        """

    def accelerator(self) -> str | None:
        """Name what models run on, as in `DeviceSpec`; None for the CPU.

        Raises:
            MissingDependency: The runtime is not installed.
            DeviceUnfit: This machine lacks the processor that it runs on.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLatency:
    """What one layer of a loaded model took.

    Attributes:
        name: The runtime's name of it; layers that the runtime fused are one.
        kind: The runtime's name of what it does, such as `Convolution`.
        median_ms: Over the runs of a profile. Profiling costs time itself: compare
            layers with each other, not their sum with a latency.
    """

    name: str
    kind: str
    median_ms: float

    def __post_init__(self) -> None:
        if not self.name or not self.kind:
            raise ValueError(f"name={self.name!r}, kind={self.kind!r}; give both")
        if not (math.isfinite(self.median_ms) and self.median_ms >= 0):
            raise ValueError(
                f"median_ms={self.median_ms}; give a finite number, at least 0"
            )


@runtime_checkable
class LayerProfiler(Protocol):
    """A backend whose runtime can tell what each layer takes."""

    def profile_layers(
        self, model: Path | bytes, *, threads: int, runs: int
    ) -> tuple[LayerLatency, ...]:
        """Run a model with the runtime's own profiling on.

        Args:
            model: As for `load`.
            threads: Threads of one inference, at least 1.
            runs: Profiled runs, at least 1, on random inputs; a few more warm up.

        Returns:
            The layers that were executed, in the runtime's order.

        Raises:
            MissingDependency: The runtime is not installed.
            ModelRejected: The runtime cannot read or compile the model.
            RunFailed: The runtime failed.
        """


def installed_version(distribution: str) -> str:
    """Of a package, as it was installed.

    "unknown" of nightly builds, those of Linux distributions, and variants under other
    names.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def check_runs(runs: int) -> None:
    """Raise `ValueError` unless `runs` is at least 1."""
    if runs < 1:
        raise ValueError(f"runs={runs}; give at least 1")


def check_threads(threads: int) -> None:
    """Raise `ValueError` unless `threads` is at least 1."""
    if threads < 1:
        raise ValueError(f"threads={threads}; give at least 1")


def describe_model(model: Path | bytes) -> str:
    """Name a model in a message, and check that a model file is there.

    Raises:
        ModelRejected: `model` is a path and no file is there.
    """
    if isinstance(model, bytes):
        return f"the model given as {len(model)} bytes"
    if not model.is_file():
        raise ModelRejected(f"there is no model file {model}; check the path")
    return model.name


def random_inputs(
    session: Session, rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """Draw one value for each input; free dimensions become 1.

    Floating-point inputs are normal, as normalised images are; integers are small.
    """
    inputs: dict[str, NDArray[Any]] = {}
    for name, shape in session.input_shapes.items():
        size = tuple(1 if length == DYNAMIC else length for length in shape)
        dtype = session.input_dtypes[name]
        if dtype.kind == "f":
            inputs[name] = rng.standard_normal(size, dtype=np.float32).astype(dtype)
        elif dtype.kind == "b":
            inputs[name] = rng.integers(0, 2, size).astype(dtype)
        else:
            inputs[name] = rng.integers(0, 128, size).astype(dtype)
    return inputs


def check_inputs(
    inputs: Arrays,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
) -> list[NDArray[Any]]:
    """Return the inputs in the model's order, contiguous in memory.

    Runtimes differ in what they refuse and what they quietly convert; here all
    backends refuse the same.

    Raises:
        RunFailed: A name, shape, or element type does not fit the model.
    """
    if inputs.keys() != shapes.keys():
        raise RunFailed(
            f"inputs are named {sorted(inputs)}; the model has {sorted(shapes)}"
        )
    for name, shape in shapes.items():
        given = inputs[name]
        fits = len(given.shape) == len(shape) and all(
            wanted in (DYNAMIC, size)
            for wanted, size in zip(shape, given.shape, strict=True)
        )
        if not fits:
            wanted_text = "x".join("?" if d == DYNAMIC else str(d) for d in shape)
            given_text = "x".join(str(size) for size in given.shape)
            raise RunFailed(
                f"input {name!r} is {given_text or 'a scalar'}; the model takes "
                f"{wanted_text or 'a scalar'}; resize the array or export the model "
                "for this shape"
            )
        if given.dtype != dtypes[name]:
            raise RunFailed(
                f"input {name!r} is {given.dtype}; the model takes {dtypes[name]}; "
                f"convert it with .astype({str(dtypes[name])!r})"
            )
    return [np.ascontiguousarray(inputs[name]) for name in shapes]
