"""What our backend calls of TensorRT's Python API and of CUDA's runtime, over ONNX Runtime and the host's memory.

It holds our half, from options to logits, and says nothing of NVIDIA's: tests/gpu does, and there the stand-in for the
library alone computes from a real GPU's memory. An "engine" here is the path of the graph and the profiles; it takes
only shapes that fit its profile, and `Cuda.limit` bytes of "GPU" memory.
"""

# ruff: noqa: N801, N802, N815 - the names are NVIDIA's

import ctypes
import enum
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


OK = cudaError_t.cudaSuccess


class Cuda:
    """cuda.bindings.runtime."""

    cudaError_t, cudaMemcpyKind = cudaError_t, cudaMemcpyKind
    cudaStreamNonBlocking, cudaEventDisableTiming = 1, 2

    def __init__(self) -> None:
        self.gpus, self.limit, self.used = 1, 2**40, 0
        self.held: dict[int, Any] = {}

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (OK, self.gpus) if self.gpus else (cudaError_t.cudaErrorNoDevice, None)

    def cudaGetErrorString(self, _code: Any) -> tuple[Any, ...]:
        return OK, b"no CUDA-capable device is detected"

    def cudaGetDeviceProperties(self, _device: int) -> tuple[Any, ...]:
        return OK, SimpleNamespace(name=b"Stand-in", major=9, minor=0)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return OK, 13020

    def _given(self, size: int) -> tuple[Any, ...]:
        memory = ctypes.create_string_buffer(size)
        self.held[ctypes.addressof(memory)] = memory
        return OK, ctypes.addressof(memory)

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        return self._given(size)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if self.used + size > self.limit:
            return cudaError_t.cudaErrorMemoryAllocation, None
        self.used += size
        return self._given(size)

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        del self.held[address]
        return (OK,)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        self.used -= len(self.held[address])
        del self.held[address]
        return (OK,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, *_: Any) -> tuple[Any, ...]:
        ctypes.memmove(target, source, size)
        return (OK,)

    def cudaStreamCreateWithFlags(self, _flags: int) -> tuple[Any, ...]:
        return OK, 77

    cudaEventCreateWithFlags = cudaStreamCreateWithFlags

    def cudaStreamSynchronize(self, *_: Any) -> tuple[Any, ...]:
        return (OK,)

    cudaStreamDestroy = cudaEventRecord = cudaEventSynchronize = cudaEventDestroy = cudaStreamSynchronize


class ILogger:
    Severity = enum.IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    ON_PROFILE_CHANGE = 1


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class BuilderFlag(enum.Enum):
    TF32 = 7


class OnnxParser:
    def __init__(self, network: Any, _log: ILogger) -> None:
        self._network = network
        self.num_errors = 0

    def parse_from_file(self, path: str) -> bool:
        try:
            ort.InferenceSession(path)
        except Exception:  # noqa: BLE001 - its errors share no other class
            self.num_errors = 1
            return False
        self._network.path = path
        return True

    def get_error(self, _number: int) -> Any:
        return SimpleNamespace(desc=lambda: "this is no graph")


class Builder:
    def __init__(self, _log: ILogger) -> None:
        self.library.built += 1

    library: "TensorRT"

    def create_network(self, flags: int) -> Any:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return SimpleNamespace(path="")

    def create_builder_config(self) -> Any:
        config = SimpleNamespace(profiles=[], flags={BuilderFlag.TF32}, pools={})
        config.clear_flag = config.flags.remove
        config.set_memory_pool_limit = config.pools.__setitem__
        config.add_optimization_profile = config.profiles.append
        return config

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        return SimpleNamespace(shapes=shapes, set_shape=lambda name, *three: shapes.__setitem__(name, three))

    def build_serialized_network(self, network: Any, config: Any) -> bytes:
        assert not config.flags
        self.library.pools = config.pools
        profiles = [profile.shapes for profile in config.profiles]
        return json.dumps([self.library.__version__, network.path, profiles]).encode()


class Runtime:
    library: "TensorRT"

    def __init__(self, log: ILogger) -> None:
        self._log = log

    def deserialize_cuda_engine(self, plan: Any) -> Any:
        version, path, profiles = json.loads(bytes(plan))
        if version != self.library.__version__:
            self._log.log(ILogger.Severity.ERROR, "the engine is another version's")
            return None
        return SimpleNamespace(
            create_execution_context=lambda _: Context(self.library, self._log, Path(path), profiles)
        )


class Context:
    def __init__(self, library: "TensorRT", log: ILogger, path: Path, profiles: list[Any]) -> None:
        self._library, self._log, self._profiles = library, log, profiles
        self._session = ort.InferenceSession(str(path))
        self._shapes: dict[str, tuple[int, int]] = {}
        self._places: dict[str, int] = {}

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        assert stream
        self._profile = self._profiles[number]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, int]) -> bool:
        smallest, _, largest = self._profile[name]
        self._shapes[name] = shape
        return all(low <= one <= high for low, one, high in zip(smallest, shape, largest, strict=True))

    def set_tensor_address(self, name: str, address: int) -> None:
        self._places[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        if next(iter(self._shapes.values()))[0] > self._library.rows:
            self._log.log(ILogger.Severity.ERROR, "Error Code 2: OutOfMemory (Requested size was 1 bytes.)")
            return False
        fed = {}
        for name, shape in self._shapes.items():
            fed[name] = np.empty(shape, np.int64)
            self._copy(fed[name].ctypes.data, self._places[name], fed[name].nbytes, "cudaMemcpyDeviceToHost", stream)
        logits = self._session.run(["logits"], fed)[0]
        self._copy(self._places["logits"], logits.ctypes.data, logits.nbytes, "cudaMemcpyHostToDevice", stream)
        self._library.shapes.append(tuple(fed["input_ids"].shape))
        return True

    def _copy(self, target: int, source: int, size: int, kind: str, stream: int) -> None:
        cuda = self._library.cuda
        (code,) = cuda.cudaMemcpyAsync(target, source, size, getattr(cuda.cudaMemcpyKind, kind), stream)
        assert code == OK
        (code,) = cuda.cudaStreamSynchronize(stream)
        assert code == OK


class TensorRT:
    """The module `tensorrt`: counts engines built, and computes at most `rows` at once."""

    ILogger, OnnxParser = ILogger, OnnxParser
    NetworkDefinitionCreationFlag, BuilderFlag = NetworkDefinitionCreationFlag, BuilderFlag
    ExecutionContextAllocationStrategy, MemoryPoolType = ExecutionContextAllocationStrategy, MemoryPoolType

    def __init__(self, version: str, cuda: Any) -> None:
        self.__version__ = version
        self.cuda = cuda
        self.built, self.rows = 0, 10_000
        self.shapes: list[tuple[int, ...]] = []
        self.pools: dict[Any, int] = {}
        self.Builder = type("Builder", (Builder,), {"library": self})
        self.Runtime = type("Runtime", (Runtime,), {"library": self})


@contextmanager
def installed(monkeypatch: Any, *, version: str = "11.4.0", cuda: Any = None) -> Iterator[tuple[TensorRT, Any]]:
    """Both in the places where the backend looks for the real ones; `cuda` may be the real one."""
    cuda = cuda or Cuda()
    library = TensorRT(version, cuda)
    with monkeypatch.context() as patched:
        patched.setattr("fleet.harness.backends.tensorrt._library", lambda: library)
        patched.setattr("fleet.harness.cuda_memory._runtime", lambda: cuda)
        yield library, cuda
