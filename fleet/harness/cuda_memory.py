"""The few calls to CUDA's runtime that an engine needs which brings no memory of its own: the GPU, a stream, buffers.

By NVIDIA's own bindings (cuda-bindings, some MB), where torch would be gigabytes more on a host that does not use it.
"""

import ctypes
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt


class OutOfMemoryError(Exception):
    """The GPU's memory, or the host's that can be pinned, does not suffice."""


def _runtime() -> ModuleType:
    """CUDA's runtime; ValueError where its bindings are not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise ValueError(
            f"the Python package cuda-bindings does not load here ({error}); next: fleet provision"
        ) from error
    found: ModuleType = runtime
    return found


def _asked(runtime: Any, name: str, *arguments: Any) -> Any:
    """What a function of the runtime gives beside its error code; OutOfMemoryError or RuntimeError for that."""
    code, *values = getattr(runtime, name)(*arguments)
    if code == runtime.cudaError_t.cudaErrorMemoryAllocation:
        raise OutOfMemoryError(f"{name}: out of memory")
    if code != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"{name}: {runtime.cudaGetErrorString(code)[1].decode()}")
    return values[0] if values else None


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU that is computed on: the first that CUDA shows this process."""

    name: str
    capability: str
    """Compute capability, `9.0`."""
    cuda: str
    """The newest CUDA that the driver knows, `13.0`."""


def gpu() -> Gpu:
    """The first GPU; ValueError where CUDA shows none, with its reason."""
    runtime = _runtime()
    try:
        count = _asked(runtime, "cudaGetDeviceCount")
        if not count:
            raise RuntimeError("no CUDA-capable device is detected")
        told = _asked(runtime, "cudaGetDeviceProperties", 0)
        driver = _asked(runtime, "cudaDriverGetVersion")
    except RuntimeError as error:
        raise ValueError(f"no NVIDIA GPU can be used here ({error}); next: nvidia-smi, then fleet check") from error
    name = told.name.decode() if isinstance(told.name, bytes) else str(told.name)
    return Gpu(name.rstrip("\0"), f"{told.major}.{told.minor}", f"{driver // 1000}.{driver % 1000 // 10}")


class Stream:
    """A CUDA stream: what is put on it happens in order, beside the host."""

    def __init__(self) -> None:
        self._runtime: Any = _runtime()
        self._stream = _asked(self._runtime, "cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)

    @property
    def handle(self) -> int:
        """The address that other libraries know the stream by."""
        return int(self._stream)

    def send(self, buffer: "Buffer", size: int) -> None:
        """Copy the first `size` bytes of `buffer` to the GPU."""
        self._copy(buffer.device, buffer.address, size, "cudaMemcpyHostToDevice")

    def fetch(self, buffer: "Buffer", size: int) -> None:
        """Copy the first `size` bytes of `buffer` to the host."""
        self._copy(buffer.address, buffer.device, size, "cudaMemcpyDeviceToHost")

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        way = getattr(self._runtime.cudaMemcpyKind, kind)
        _asked(self._runtime, "cudaMemcpyAsync", target, source, size, way, self._stream)

    def wait(self) -> None:
        """Until everything that was put on the stream has happened."""
        _asked(self._runtime, "cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """End it, once everything that was put on it has happened."""
        self.wait()
        _asked(self._runtime, "cudaStreamDestroy", self._stream)

    def mark(self, event: "Event") -> None:
        """Let `event` happen when everything put on the stream before has."""
        _asked(self._runtime, "cudaEventRecord", event.handle, self._stream)


class Event:
    """A point on a stream that can be waited for; one that was never marked has happened."""

    def __init__(self) -> None:
        self._runtime: Any = _runtime()
        self.handle = _asked(self._runtime, "cudaEventCreateWithFlags", self._runtime.cudaEventDisableTiming)

    def wait(self) -> None:
        """Until it has happened; raises RuntimeError for what failed on the stream before it."""
        _asked(self._runtime, "cudaEventSynchronize", self.handle)

    def close(self) -> None:
        """Give it back."""
        _asked(self._runtime, "cudaEventDestroy", self.handle)


class Buffer:
    """`size` bytes on the host, pinned so that copies run beside it, and as many on the GPU."""

    def __init__(self, size: int) -> None:
        """Raises OutOfMemoryError."""
        self._runtime: Any = _runtime()
        self.address = int(_asked(self._runtime, "cudaMallocHost", size))
        try:
            self.device = int(_asked(self._runtime, "cudaMalloc", size))
        except OutOfMemoryError:
            _asked(self._runtime, "cudaFreeHost", self.address)
            raise
        self.host: npt.NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))
        """The host's bytes."""

    def close(self) -> None:
        """Give both back; `host` must not be touched any more."""
        _asked(self._runtime, "cudaFree", self.device)
        _asked(self._runtime, "cudaFreeHost", self.address)
