"""A pretend GPU behind `cuda.core`.

Work is done when a stream or an event is waited for, and not before: a missing wait
shows in the outputs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tests.support.binding_api import ClassApi, describe_class
from tests.support.checked import Checked


@functools.cache  # of the real module, before a stand-in takes its place
def _described() -> tuple[Any, dict[str, ClassApi]]:
    core: Any = importlib.import_module("cuda.core")
    graph: Any = importlib.import_module("cuda.core.graph")
    classes = (
        core.Buffer,
        core.Device,
        core.Event,
        core.LegacyPinnedMemoryResource,
        core.Stream,
        graph.Graph,
        graph.GraphBuilder,
    )
    return core, {found.__name__: describe_class(found) for found in classes}


LAUNCH_MS = 0.125  # of the host, by the device's clock


class PretendGpu:
    """The state of a pretend GPU, and `cuda.core` to reach it by.

    Args:
        capturable: Whether work can be captured in graphs.
        compute_capability: Of the device.
        name: Of the device.
        driver: Its release; None where the driver does not tell.
    """

    def __init__(
        self,
        *,
        capturable: bool = True,
        compute_capability: tuple[int, int] = (8, 6),
        name: str = "Pretend GPU",
        driver: tuple[int, ...] | None = (580, 65, 6),
    ) -> None:
        self.capturable = capturable
        self.compute_capability = compute_capability
        self.name = name
        self.driver = driver
        self.now_ms = 0.0
        self.streams: dict[int, _Stream] = {}
        self.graph_launches = 0
        self.live_bytes = 0
        self._handles = itertools.count(1)
        self._apis: dict[str, ClassApi] = {}

    def core(self) -> Any:
        """What stands in for the module `cuda.core`."""
        core, self._apis = _described()
        assert callable(core.system.get_kernel_mode_driver_version)
        return SimpleNamespace(
            Device=self._device,
            EventOptions=core.EventOptions,
            LegacyPinnedMemoryResource=lambda: self.checked(
                "LegacyPinnedMemoryResource", _Pinned(self)
            ),
            system=SimpleNamespace(get_kernel_mode_driver_version=self._driver),
        )

    def checked(self, name: str, implementation: Any) -> Checked:
        return Checked(name, self._apis[name], implementation)

    def stream(self) -> _Stream:
        made = _Stream(self, next(self._handles))
        self.streams[made.handle] = made
        return made

    def wait_for_launch(self) -> None:
        self.now_ms += LAUNCH_MS

    def _device(self, number: int) -> Checked:
        if number != 0:
            raise RuntimeError(f"there is no device {number}")
        return self.checked("Device", _Device(self))

    def _driver(self) -> tuple[int, ...]:
        if self.driver is None:
            raise RuntimeError("NVML is missing")
        return self.driver


class _Device:
    def __init__(self, gpu: PretendGpu) -> None:
        self._gpu = gpu
        self.name = gpu.name
        self.compute_capability = gpu.compute_capability

    def set_current(self) -> None: ...

    def create_stream(self) -> Checked:
        return self._gpu.checked("Stream", self._gpu.stream())

    def create_event(self, options: Any) -> Checked:
        assert options.timing_enabled
        return self._gpu.checked("Event", _Event(self._gpu))

    def create_graph_builder(self) -> Checked:
        return self._gpu.checked("GraphBuilder", _GraphBuilder(self._gpu))

    def allocate(self, size: int, *, stream: Checked) -> Checked:
        return self._gpu.checked("Buffer", _Buffer(self._gpu, size))


class _Pinned:
    def __init__(self, gpu: PretendGpu) -> None:
        self._gpu = gpu

    def allocate(self, size: int) -> Checked:
        return self._gpu.checked("Buffer", _Buffer(self._gpu, size))


class _Buffer:
    def __init__(self, gpu: PretendGpu, size: int) -> None:
        self._gpu = gpu
        self._size = size
        self._memory = (ctypes.c_byte * size)()
        self.handle = ctypes.addressof(self._memory)
        gpu.live_bytes += size

    def copy_to(self, dst: Checked, *, stream: Checked) -> None:
        target, source, size = dst.handle, self.handle, self._size
        stream._implementation.ask(lambda: ctypes.memmove(target, source, size))

    def close(self, stream: Checked | None = None) -> None:
        self._gpu.live_bytes -= self._size


class _Stream:
    def __init__(self, gpu: PretendGpu, handle: int) -> None:
        self._gpu = gpu
        self.handle = handle
        self.capturing = False
        self.computing = False
        self.work: list[Callable[[], object]] = []

    def ask(self, work: Callable[[], object]) -> None:
        self.work.append(work)

    def launch(self, work: Callable[[], object]) -> None:
        """Ask for a model's run; where none is going on, the device waits for it."""
        if not self.capturing and not self.computing:
            self.ask(self._gpu.wait_for_launch)
            self.computing = True
        self.ask(work)

    def record(self, event: Checked) -> None:
        self.ask(lambda: event._implementation.happen())
        event._implementation.stream = self

    def sync(self) -> None:
        assert not self.capturing
        work, self.work, self.computing = self.work, [], False
        for piece in work:
            piece()

    def close(self) -> None:
        del self._gpu.streams[self.handle]


class _Event:
    def __init__(self, gpu: PretendGpu) -> None:
        self._gpu = gpu
        self.stream: _Stream | None = None
        self.time_ms: float | None = None

    def happen(self) -> None:
        self.time_ms = self._gpu.now_ms

    def sync(self) -> None:
        assert self.stream is not None
        self.stream.sync()

    def close(self) -> None: ...

    def __sub__(self, earlier: _Event) -> float:
        if self.time_ms is None or earlier.time_ms is None:
            raise RuntimeError("an event has not happened yet")
        return self.time_ms - earlier.time_ms


class _GraphBuilder:
    def __init__(self, gpu: PretendGpu) -> None:
        self._gpu = gpu
        self._stream = gpu.stream()
        self.stream = gpu.checked("Stream", self._stream)

    def begin_building(self, mode: str) -> None:
        assert mode in ("global", "thread_local", "relaxed")
        self._stream.capturing = True

    def end_building(self) -> _GraphBuilder:
        self._stream.capturing = False
        return self

    def complete(self) -> Checked:
        return self._gpu.checked("Graph", _Graph(self._gpu, self._stream.work))

    def close(self) -> None:
        if self._stream.capturing:
            raise RuntimeError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")


class _Graph:
    def __init__(self, gpu: PretendGpu, work: list[Callable[[], object]]) -> None:
        self._gpu = gpu
        self._work = work

    def upload(self, stream: Checked) -> None: ...

    def launch(self, stream: Checked) -> None:
        self._gpu.graph_launches += 1
        for piece in self._work:
            stream._implementation.launch(piece)
