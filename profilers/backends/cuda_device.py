"""What a GPU session needs of CUDA: memory, a stream, event times, graphs.

Everything goes through `cuda-core`. It promises what its API promises: none of it was
run on a GPU yet; docs/tensorrt.md lists what that leaves open.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profilers.backends.base import check_runs
from profilers.closing import Closing
from profilers.errors import BackendError, DeviceUnfit, MissingDependency

__all__ = ["CaptureRefused", "Gpu", "Transfer", "WorkQueue", "open_gpu"]

NS_PER_MS = 1e6


class CaptureRefused(BackendError):
    """Work could not be captured in a CUDA graph; it can run without one."""


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """An array of the host, and as much memory of the device.

    Attributes:
        array: In page-locked memory, so that copies need no detour.
        address: Of the device's memory.
    """

    array: NDArray[Any]
    address: int
    _host: Any
    _device: Any


class Gpu:
    """The first CUDA device that this process sees; `CUDA_VISIBLE_DEVICES` chooses."""

    def __init__(self, core: Any, device: Any) -> None:
        self._core = core
        self._device = device

    @property
    def description(self) -> str:
        """Name, compute capability, and driver release.

        Raises:
            DeviceUnfit: The driver does not tell its release.
        """
        major, minor = self._device.compute_capability
        try:
            release = self._core.system.get_kernel_mode_driver_version()
        except Exception as error:  # NVML's classes, or none where it is missing
            raise DeviceUnfit(
                f"the NVIDIA driver does not tell its release: {error}; in a container "
                "allow NVIDIA_DRIVER_CAPABILITIES=compute,utility"
            ) from error
        return (
            f"{self._device.name}, compute capability {major}.{minor}, "
            f"driver {'.'.join(map(str, release))}"
        )

    def queue(self) -> WorkQueue:
        """A new stream with what is needed to time work on it."""
        return WorkQueue(self._core, self._device)


class WorkQueue(Closing):
    """A stream: work on it is done in the order that it was asked for."""

    def __init__(self, core: Any, device: Any) -> None:
        self._device = device
        self._pinned = core.LegacyPinnedMemoryResource()
        self._stream = device.create_stream()
        # Made before anything is timed: making one takes longer than a short kernel.
        options = core.EventOptions(timing_enabled=True)
        self._start = device.create_event(options)
        self._end = device.create_event(options)

    @property
    def handle(self) -> int:
        """The stream, as other libraries take it."""
        return int(self._stream.handle)

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Transfer:
        """Memory for one array, on both sides."""
        # An address is needed even for an array of no elements.
        size_bytes = max(1, math.prod(shape) * dtype.itemsize)
        host = self._pinned.allocate(size_bytes)
        device = self._device.allocate(size_bytes, stream=self._stream)
        memory = memoryview((ctypes.c_byte * size_bytes).from_address(int(host.handle)))
        array = np.frombuffer(memory, dtype=dtype, count=math.prod(shape))
        return Transfer(array.reshape(shape), int(device.handle), host, device)

    def free(self, transfer: Transfer) -> None:
        """Give memory back; its array must not be used any more."""
        transfer._device.close(self._stream)
        transfer._host.close()

    def upload(self, transfer: Transfer) -> None:
        """Ask for a copy from the host to the device."""
        transfer._host.copy_to(transfer._device, stream=self._stream)

    def download(self, transfer: Transfer) -> None:
        """Ask for a copy from the device to the host."""
        transfer._device.copy_to(transfer._host, stream=self._stream)

    def wait(self) -> None:
        """Return when everything that was asked for is done."""
        self._stream.sync()

    def time_ns(self, launch: Callable[[], None], *, runs: int) -> int:
        """Time of `runs` launches on the device, right after one that does not count.

        Raises:
            ValueError: `runs` is less than 1.
        """
        check_runs(runs)
        # An idle device records an event at once, and waits for the host's launch.
        launch()
        self._stream.record(self._start)
        for _ in range(runs):
            launch()
        self._stream.record(self._end)
        self._end.sync()
        duration_ms: float = self._end - self._start
        return round(duration_ms * NS_PER_MS)

    def capture(self, enqueue: Callable[[int], None]) -> Callable[[], None]:
        """Capture work in a graph; return what launches it on this queue.

        Args:
            enqueue: Asks for the work on the stream whose handle it is given.

        Raises:
            CaptureRefused: The work does something that a graph cannot hold.
        """
        # On a stream of its own: a capture that fails leaves this queue's usable.
        builder = self._device.create_graph_builder()
        try:
            builder.begin_building("thread_local")
            enqueue(int(builder.stream.handle))
            graph = builder.end_building().complete()
            graph.upload(self._stream)
        except Exception as error:  # CUDA's and the captured library's own classes
            raise CaptureRefused(f"no CUDA graph: {error}") from error
        finally:
            # Ends an unfinished capture, and may report once more that it failed.
            with suppress(Exception):
                builder.close()

        def launch() -> None:
            graph.launch(self._stream)

        return launch

    def close(self) -> None:
        """See `Closing.close`."""
        self._start.close()
        self._end.close()
        self._stream.close()


def open_gpu(*, extra: str) -> Gpu:
    """Make the device ready for this thread.

    Args:
        extra: The extra of `ofa-deploy` that brings `cuda-core`.

    Raises:
        MissingDependency: `cuda-core` is not installed.
        DeviceUnfit: There is no GPU or no driver for it.
    """
    try:
        core = importlib.import_module("cuda.core")
    except ImportError as error:
        raise MissingDependency("cuda-core", extra=extra) from error
    try:
        device = core.Device(0)
        device.set_current()
    except Exception as error:  # CUDAError, or a RuntimeError where no driver is
        raise DeviceUnfit(
            f"no NVIDIA GPU can be used: {error}; check with nvidia-smi that the "
            "driver is installed and sees the GPU"
        ) from error
    return Gpu(core, device)
