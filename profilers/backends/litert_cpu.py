"""LiteRT (TensorFlow Lite) on the CPU, through its XNNPACK delegate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profilers.backends.base import (
    DYNAMIC,
    Arrays,
    check_inputs,
    check_threads,
    describe_model,
    installed_version,
)
from profilers.closing import Closing
from profilers.device import RuntimeSpec
from profilers.errors import (
    BackendError,
    MissingDependency,
    ModelRejected,
    RunFailed,
)

__all__ = ["LiteRtCpu", "LiteRtSession"]

_PROVIDER = "XNNPACK"
_FALLBACK = "tflite-runtime"


class LiteRtCpu:
    """Loads `.tflite` files and their bytes.

    `ai-edge-litert` is used where it is installed, else `tflite-runtime`.
    """

    name = "litert-cpu"

    def load(self, model: Path | bytes, *, threads: int) -> LiteRtSession:
        """See `Backend.load`.

        Warns (`UserWarning`) unless the delegate runs the whole model in one piece.
        """
        check_threads(threads)
        label = describe_model(model)
        interpreter_class, _ = _import_litert()
        source = (
            {"model_content": model}
            if isinstance(model, bytes)
            else {"model_path": str(model)}
        )
        try:
            interpreter = interpreter_class(**source, num_threads=threads)
            interpreter.allocate_tensors()
            session = LiteRtSession(interpreter)
        except (RuntimeError, ValueError) as error:
            raise ModelRejected(
                f"LiteRT cannot load {label}: {error}; give a valid .tflite model"
            ) from error
        if session.fallback is not None:
            warnings.warn(f"{label} {session.fallback}", stacklevel=2)
        return session

    def runtime(self, *, threads: int) -> RuntimeSpec:
        """See `Backend.runtime`."""
        _, distribution = _import_litert()
        # The versions of the two distributions are not comparable.
        fallback = distribution == _FALLBACK
        return RuntimeSpec(
            backend=self.name,
            version=installed_version(distribution),
            provider=f"{_PROVIDER} in {_FALLBACK}" if fallback else _PROVIDER,
            threads=threads,
            precision="f32",
        )

    def accelerator(self) -> None:
        """See `Backend.accelerator`; it is the CPU."""


class LiteRtSession(Closing):
    """An interpreter with its tensors allocated."""

    def __init__(self, interpreter: Any) -> None:
        self._interpreter: Any = interpreter
        entered = _details(interpreter, "input")
        self._inputs = {name: detail["index"] for name, detail in entered.items()}
        self._outputs = {
            name: detail["index"]
            for name, detail in _details(interpreter, "output").items()
        }
        self.input_shapes: dict[str, tuple[int, ...]] = {
            # -1 where free, which is what `DYNAMIC` is too.
            name: tuple(int(size) for size in detail["shape_signature"])
            for name, detail in entered.items()
        }
        self.input_dtypes: dict[str, np.dtype[Any]] = {
            name: np.dtype(detail["dtype"]) for name, detail in entered.items()
        }
        # Asked once: it lists all operators.
        self.fallback = self._told_fallback()

    @property
    def partition_count(self) -> int | None:
        """Pieces that the delegate runs the model in; None where not known."""
        pieces = self._pieces()
        return None if pieces is None else len(pieces)

    def _pieces(self) -> list[Mapping[str, Any]] | None:
        try:
            details = self._interpreter._get_ops_details()
        except AttributeError:
            return None
        return [detail for detail in details if detail["op_name"] == "DELEGATE"]

    def _told_fallback(self) -> str | None:
        """What runs outside of the delegate, in words; None for nothing that is known.

        That some of the model does: of one piece, what it reads and writes is the
        model's own.
        """
        pieces = self._pieces()
        if pieces is None:
            return None
        if not pieces:
            return f"runs without the {_PROVIDER} delegate, on slower built-in kernels"
        if len(pieces) > 1:
            return (
                f"runs in {len(pieces)} partitions of the {_PROVIDER} delegate instead "
                "of 1: operators that it lacks run on slower built-in kernels between "
                "them"
            )
        (piece,) = pieces
        if {*self._inputs.values()} <= {*piece["inputs"]} and {
            *self._outputs.values()
        } <= {*piece["outputs"]}:
            return None
        return (
            f"runs its first or last operators outside of the {_PROVIDER} delegate, "
            "which lacks them, on slower built-in kernels"
        )

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See `Session.run`."""
        step = self.prepare(inputs)
        try:
            step()
            # `get_tensor` copies.
            return {
                name: self._interpreter.get_tensor(index)
                for name, index in self._outputs.items()
            }
        except (RuntimeError, ValueError) as error:
            raise RunFailed(f"LiteRT failed to run the model: {error}") from error

    def prepare(self, inputs: Arrays) -> Callable[[], None]:
        """See `Session.prepare`."""
        if self._interpreter is None:
            raise RunFailed("the session is closed; load the model again")
        arrays = check_inputs(
            inputs, shapes=self.input_shapes, dtypes=self.input_dtypes
        )
        named = dict(zip(self._inputs, arrays, strict=True))
        try:
            self._resize(named)
            for name, array in named.items():
                self._interpreter.set_tensor(self._inputs[name], array)
        except (RuntimeError, ValueError) as error:
            raise RunFailed(f"LiteRT refused the inputs: {error}") from error
        invoke: Callable[[], None] = self._interpreter.invoke
        return invoke

    def _resize(self, named: Mapping[str, NDArray[Any]]) -> None:
        free = [name for name in named if DYNAMIC in self.input_shapes[name]]
        for name in free:
            index, shape = self._inputs[name], list(named[name].shape)
            self._interpreter.resize_tensor_input(index, shape, strict=True)
        if free:
            self._interpreter.allocate_tensors()

    def close(self) -> None:
        """See `Session.close`."""
        self._interpreter = None


def _details(interpreter: Any, side: str) -> dict[str, Mapping[str, Any]]:
    """Tensors on one side by name: the signature's names where there is one."""
    signatures = interpreter.get_signature_list()
    if len(signatures) == 1:
        runner = interpreter.get_signature_runner(next(iter(signatures)))
        found: dict[str, Mapping[str, Any]] = getattr(runner, f"get_{side}_details")()
        return found
    listed = getattr(interpreter, f"get_{side}_details")()
    return {detail["name"]: detail for detail in listed}


def _import_litert() -> tuple[Any, str]:
    """The interpreter's class, and the distribution that it is from."""
    try:
        from ai_edge_litert.interpreter import Interpreter

        return Interpreter, "ai-edge-litert"
    except ImportError:
        pass
    try:
        from tflite_runtime.interpreter import Interpreter
    except ImportError as error:
        raise MissingDependency("LiteRT", extra="litert") from error
    if int(np.__version__.partition(".")[0]) > 1:
        # It installs beside any numpy, and dies in its first call beside this one.
        raise BackendError(
            f"tflite-runtime works with numpy 1, and numpy {np.__version__} is "
            "installed. Run: pip install 'numpy<2', or better 'ofa-deploy[litert]'"
        )
    return Interpreter, _FALLBACK
