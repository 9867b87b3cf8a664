"""Matrix products by cuBLASLt itself, for what torch does not pass on: GELU with 8-bit results, a residual, the fastest kernel.

torch takes the first kernel that cuBLASLt proposes; here all proposals are timed once for a number of rows, and the best
stays. The library is the one that torch has loaded. Sources: cuBLAS documentation, section "Using the cuBLASLt API", for
the calls and the meaning of scales; cublasLt.h for the numbers below.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_TRANSPOSE_A, _EPILOGUE, _BIAS, _A_SCALE, _B_SCALE, _D_SCALE, _FAST, _BIAS_TYPE = 3, 7, 8, 17, 18, 20, 25, 26
"""cublasLtMatmulDescAttributes_t"""
_EPILOGUE_BIAS, _EPILOGUE_GELU_BIAS = 4, 36
_WORKSPACE_BYTES = 1
"""cublasLtMatmulPreferenceAttributes_t"""
_COMPUTE_FLOAT32, _FLOAT32 = 68, 0
_TYPES = {torch.bfloat16: 14, torch.float16: 2, torch.float8_e4m3fn: 28}
"""cudaDataType"""
_WORKSPACE = 32 * 2**20
"""NVIDIA's advice for Hopper."""
_PROPOSALS = 16
_ROUNDS = 5
_FEW = 512
_ONE, _ZERO = ctypes.c_float(1.0), ctypes.c_float(0.0)


class _Proposal(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class _Library:
    """The calls, checked; one handle and one workspace a device."""

    def __init__(self, device: torch.device) -> None:
        major = str(torch.version.cuda).partition(".")[0]
        self._calls = ctypes.CDLL(f"libcublasLt.so.{major}")
        self.handle = ctypes.c_void_p()
        self("cublasLtCreate", ctypes.byref(self.handle))
        self.workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)

    def __call__(self, name: str, *arguments: object) -> None:
        """Raises RuntimeError with cuBLAS's status."""
        if status := getattr(self._calls, name)(*arguments):
            raise RuntimeError(f"{name} failed with status {status}")

    def layout(self, dtype: torch.dtype, rows: int, columns: int) -> ctypes.c_void_p:
        """A dense matrix, by columns."""
        made = ctypes.c_void_p()
        self(
            "cublasLtMatrixLayoutCreate", ctypes.byref(made), _TYPES[dtype],
            ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows),
        )  # fmt: skip
        return made

    def proposals(self, *description: ctypes.c_void_p) -> list[Any]:
        """Algorithms for a product and its layouts, cuBLASLt's favourite first. Raises RuntimeError when it has none."""
        preference, found = ctypes.c_void_p(), ctypes.c_int()
        results = (_Proposal * _PROPOSALS)()
        size = ctypes.c_size_t(_WORKSPACE)
        self("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        try:
            self(
                "cublasLtMatmulPreferenceSetAttribute", preference, _WORKSPACE_BYTES, ctypes.byref(size),
                ctypes.sizeof(size),
            )  # fmt: skip
            self(
                "cublasLtMatmulAlgoGetHeuristic", self.handle, *description, preference, _PROPOSALS, results,
                ctypes.byref(found),
            )  # fmt: skip
        finally:
            self("cublasLtMatmulPreferenceDestroy", preference)
        listed = [results[at].algorithm for at in range(found.value) if not results[at].state]
        if not listed:
            raise RuntimeError("cuBLASLt has no kernel for this product")
        return listed


_libraries: dict[torch.device, _Library] = {}


def _library(device: torch.device) -> _Library:
    if device not in _libraries:
        _libraries[device] = _Library(device)
    return _libraries[device]


_algorithms: dict[tuple[object, ...], "ctypes.Array[ctypes.c_uint64]"] = {}
"""By device, shape, types and size class the kernel that stays: the layers of a model share it."""


class Product:
    """`rows @ weight.T + bias`, then GELU (tanh form) where wanted, for weight [out, in] and bias [out] on one GPU.

    In float8 the weight and the rows have one scale each, device scalars float32 that stand for `value = scale * float8`;
    with `result_scale`, the factor a result is multiplied with, results are float8 too, else bfloat16.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        gelu: bool = False,
        scales: tuple[Tensor, Tensor] | None = None,
        result_scale: Tensor | None = None,
    ) -> None:
        """`scales` is (of the weight, of the rows)."""
        self._weight = weight.contiguous()
        self._held = (bias, scales, result_scale)  # the library keeps their addresses
        self._out, self._in = weight.shape
        self._added_dtype = bias.dtype
        self._dtype = torch.float8_e4m3fn if result_scale is not None else bias.dtype
        self._library = _library(weight.device)
        self._kind = (weight.device, weight.shape, weight.dtype, self._dtype, gelu)
        self._description = ctypes.c_void_p()
        self._library("cublasLtMatmulDescCreate", ctypes.byref(self._description), _COMPUTE_FLOAT32, _FLOAT32)
        self._set(_TRANSPOSE_A, ctypes.c_int32(1))
        self._set(_EPILOGUE, ctypes.c_int32(_EPILOGUE_GELU_BIAS if gelu else _EPILOGUE_BIAS))
        self._set(_BIAS, ctypes.c_void_p(bias.data_ptr()))
        self._set(_BIAS_TYPE, ctypes.c_int32(_TYPES[bias.dtype]))
        if scales is not None:
            self._set(_FAST, ctypes.c_int8(1))
            self._set(_A_SCALE, ctypes.c_void_p(scales[0].data_ptr()))
            self._set(_B_SCALE, ctypes.c_void_p(scales[1].data_ptr()))
        if result_scale is not None:
            self._set(_D_SCALE, ctypes.c_void_p(result_scale.data_ptr()))
        self._weight_layout = self._library.layout(weight.dtype, self._in, self._out)

    def _set(self, name: int, value: Any) -> None:
        self._library(
            "cublasLtMatmulDescSetAttribute", self._description, name, ctypes.byref(value), ctypes.sizeof(value)
        )

    def __call__(self, rows: Tensor, added: Tensor | None = None) -> Tensor:
        """[rows, in] to [rows, out]; `added` [rows, out] is added before the result is rounded, and overwritten by it.

        Raises RuntimeError where cuBLASLt has no kernel for this.
        """
        count, adding = len(rows), added is not None
        result = added if added is not None else torch.empty(count, self._out, dtype=self._dtype, device=rows.device)
        given = self._library.layout(rows.dtype, self._in, count)
        between = self._library.layout(self._added_dtype, self._out, count)
        made = self._library.layout(self._dtype, self._out, count)

        def launch(algorithm: Any, into: Tensor) -> None:
            place = ctypes.c_void_p(into.data_ptr())
            self._library(
                "cublasLtMatmul", self._library.handle, self._description, ctypes.byref(_ONE),
                ctypes.c_void_p(self._weight.data_ptr()), self._weight_layout, ctypes.c_void_p(rows.data_ptr()), given,
                ctypes.byref(_ONE if adding else _ZERO), place if adding else None, between, place, made,
                ctypes.byref(algorithm), ctypes.c_void_p(self._library.workspace.data_ptr()),
                ctypes.c_size_t(_WORKSPACE), ctypes.c_void_p(torch.cuda.current_stream(rows.device).cuda_stream),
            )  # fmt: skip

        try:
            key = (*self._kind, adding, _size_class(count))
            if key not in _algorithms:
                proposals = self._library.proposals(self._description, self._weight_layout, given, between, made)
                if count <= _FEW:
                    # Too short to be timed one by one; cuBLASLt's own order stands.
                    launch(proposals[0], torch.empty_like(result))
                    _algorithms[key] = proposals[0]
                else:
                    _algorithms[key] = _fastest(proposals, partial(launch, into=torch.zeros_like(result)))
            launch(_algorithms[key], result)
        finally:
            for layout in (given, between, made):
                self._library("cublasLtMatrixLayoutDestroy", layout)
        return result


def _size_class(rows: int) -> int:
    """Each number of rows that a graph is recorded for, and powers of two beyond."""
    return -(-rows // 16) if rows <= _FEW else 1 << (rows - 1).bit_length()


def _fastest(proposals: list[Any], launch: Callable[[Any], None]) -> Any:
    """The proposal that takes the device the least time. Raises RuntimeError when none of them runs."""
    best: tuple[float, Any] | None = None
    for proposal in proposals:
        try:
            milliseconds = _timed(partial(launch, proposal))
        except RuntimeError:
            continue
        if best is None or milliseconds < best[0]:
            best = milliseconds, proposal
    if best is None:
        raise RuntimeError("none of cuBLASLt's kernels for this product runs")
    return best[1]


def _timed(launch: Callable[[], None]) -> float:
    """Milliseconds of the device, the best of some rounds."""
    launch()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_ROUNDS + 1)]
    for mark in marks[:-1]:
        mark.record()
        launch()
    marks[-1].record()
    marks[-1].synchronize()
    return min(float(start.elapsed_time(end)) for start, end in pairwise(marks))
