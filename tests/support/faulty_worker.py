"""A worker whose backend waits, crashes, or hangs as a model's file tells it to."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import profilers.backends
from profilers.__main__ import main
from profilers.backends.base import Arrays
from profilers.closing import Closing
from profilers.device import RuntimeSpec
from profilers.errors import ModelRejected, RunFailed

NAME = "faulty"
COMMAND = (sys.executable, "-m", "tests.support.faulty_worker", "work")


def write_model(path: Path, *, us: int = 100, fault: str = "", after: int = 0) -> Path:
    """A model file.

    Args:
        path: Where to.
        us: Microseconds that a run waits.
        fault: Empty, or one of "reject", "crash loading", "crash", "raise", "exit",
            "hang", and "memory": the system kills the process as it loads the model;
            of "fill", as it loads it and another one.
        after: Runs before the fault; of "memory", models that are open besides.
    """
    path.write_text(json.dumps({"us": us, "fault": fault, "after": after}))
    return path


class FaultyBackend:
    """Loads what `write_model` writes."""

    name = NAME
    loaded_count = 0
    is_full = False

    def load(self, model: Path | bytes, *, threads: int) -> FaultySession:
        """See `Backend.load`."""
        if isinstance(model, bytes):
            raise ModelRejected("the faulty backend loads files only")
        description = json.loads(model.read_text())
        if description["fault"] == "reject":
            raise ModelRejected(f"{model.name} is rejected")
        if description["fault"] == "crash loading":
            _crash()
        fills = description["fault"] == "fill"
        if FaultyBackend.is_full or (fills and FaultyBackend.loaded_count):
            os.kill(os.getpid(), signal.SIGKILL)
        FaultyBackend.loaded_count += 1
        FaultyBackend.is_full = fills
        others = FaultyBackend.loaded_count - 1
        if description["fault"] == "memory" and others > description["after"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if description["fault"] in ("memory", "fill"):
            description["fault"] = ""  # once it is loaded, it runs
        os.write(1, b"a runtime's chatter\n")
        return FaultySession(**description)

    def runtime(self, *, threads: int) -> RuntimeSpec:
        """See `Backend.runtime`."""
        return RuntimeSpec(
            backend=NAME, version="1", provider="test", threads=threads, precision="f32"
        )

    def accelerator(self) -> None:
        """See `Backend.accelerator`."""


class FaultySession(Closing):
    """Waits, until its fault."""

    def __init__(self, *, us: int, fault: str, after: int) -> None:
        self._wait_s = us / 1e6
        self._fault = fault
        self._left = after
        self.input_shapes: dict[str, tuple[int, ...]] = {"x": (1,)}
        self.input_dtypes: dict[str, np.dtype[Any]] = {"x": np.dtype("float32")}

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See `Session.run`."""
        self.prepare(inputs)()
        return {"y": np.array(inputs["x"])}

    def prepare(self, inputs: Arrays) -> Callable[[], None]:
        """See `Session.prepare`."""
        return self._step

    def _step(self) -> None:
        self._left -= 1
        if self._fault and self._left < 0:
            if self._fault == "crash":
                _crash()
            if self._fault == "raise":
                raise RunFailed("the model failed on purpose")
            if self._fault == "exit":
                os._exit(0)
            time.sleep(3600)
        time.sleep(self._wait_s)

    def close(self) -> None:
        """See `Session.close`."""


def _crash() -> None:
    os.write(2, b"about to crash\n")
    os.kill(os.getpid(), signal.SIGSEGV)


if __name__ == "__main__":
    profilers.backends._FACTORIES[NAME] = FaultyBackend
    sys.exit(main())
