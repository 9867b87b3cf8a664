"""What a benchmark takes on a host, and whether the host has it: pure arithmetic over the figures in mlperf/benchmarks.

The module fleet_preflight compares the minima on the host itself, before anything is installed there; the batch that
fits is worked out here, from what it reports.
"""

from collections.abc import Sequence
from typing import Any

from fleet.campaign import BenchmarkEntry
from fleet.mlperf.rules import BenchmarkRule, Precision

GIB = 2**30
BODILESS = frozenset({"null", "openai"})
"""Backends that hold no model on the host."""
ON_CPU = frozenset({"onnxruntime", "tensorflow"})
"""Backends whose pinned packages compute on the CPU alone."""
ON_GPU: dict[str, dict[str, Any]] = {
    # CUDA 13's packages need driver 580: docs.nvidia.com, TensorRT 11.4, Prerequisites.
    "tensorrt": {"module": "tensorrt", "driver": 580},
}
"""Backends that compute on NVIDIA GPUs alone: the package that must load on a host, and the oldest driver it runs with."""
MORE_DISK_GIB = {"tensorrt": 10.0}
"""Beside the benchmark's own: the packed library is about 2 GB, and lies there unpacked with engines. Not measured."""


def _precision(rule: BenchmarkRule, entry: BenchmarkEntry) -> Precision:
    known = rule.needs.precisions
    return known.get(str(entry.backend_options.get("dtype")), next(iter(known.values())))


def device(entry: BenchmarkEntry) -> str:
    """`gpu` where the campaign asks for one, `cpu` where none is used, else `any`: the GPU where there is one."""
    given = str(entry.backend_options.get("device") or entry.backend_options.get("provider") or "")
    if entry.backend in ON_GPU or given.startswith(("cuda", "tensorrt")):
        return "gpu"
    return "cpu" if entry.backend in BODILESS | ON_CPU or given == "cpu" else "any"


def needs_weights(entry: BenchmarkEntry) -> bool:
    """Whether the checkpoint must be on the host."""
    return entry.backend not in BODILESS and entry.backend_options.get("weights") != "random"


def minima(rule: BenchmarkRule, entry: BenchmarkEntry) -> dict[str, Any]:
    """What fleet_preflight compares: GiB of disk, of RAM, of the model with one sample, of the accelerator.

    For a backend of ON_GPU also its driver and package.
    """
    precision = _precision(rule, entry)
    model = 0.0 if entry.backend in BODILESS else precision.model_gib + precision.sample_gib
    spared = 0.0 if needs_weights(entry) else rule.needs.weights_gib
    return {
        "disk_gib": rule.needs.disk_gib - spared + MORE_DISK_GIB.get(entry.backend, 0.0),
        "memory_gib": rule.needs.memory_gib,
        "model_gib": model,
        "gpu_memory_gib": max(rule.needs.gpu_memory_gib, model),
        "device": device(entry),
        **ON_GPU.get(entry.backend, {}),
    }


def batch(rule: BenchmarkRule, entry: BenchmarkEntry, *, memory_bytes: int, gpus: Sequence[int]) -> int | None:
    """Samples of the benchmark that fit at once, from total RAM and each GPU's memory in bytes; None without limit.

    Only a model that is there at all has a limit; the smallest GPU decides, since each holds a model of its own.
    """
    if entry.backend in BODILESS:
        return None
    precision = _precision(rule, entry)
    on_gpu = bool(gpus) and device(entry) != "cpu"
    free = min(gpus) / GIB if on_gpu else memory_bytes / GIB - rule.needs.memory_gib
    return max(0, int((free - precision.model_gib) / precision.sample_gib))
