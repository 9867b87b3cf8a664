"""What fits on a host: figures in, an answer per benchmark out."""

from typing import Any

import pytest

from fleet import preflight
from fleet.campaign import BenchmarkEntry
from fleet.mlperf import rules
from fleet.mlperf.rules import BenchmarkRule, Needs, Precision

GIB = 2**30


def rule(**more: Any) -> BenchmarkRule:
    """tiny-bert's rule with needs that are easy to reckon with."""
    needs = Needs(
        disk_gib=30,
        memory_gib=2,
        precisions={
            "float32": Precision(model_gib=4, sample_gib=0.5),
            "bfloat16": Precision(model_gib=2, sample_gib=0.25),
        },
        **more,
    )
    return rules.load_benchmark("tiny-bert").model_copy(update={"needs": needs})


def entry(backend: str = "pytorch", **options: Any) -> BenchmarkEntry:
    return BenchmarkEntry.model_validate({"name": "tiny-bert", "backend": backend, "backend_options": options})


def test_the_batch_is_what_is_left_beside_the_model() -> None:
    assert preflight.batch(rule(), entry(), memory_bytes=8 * GIB, gpus=[]) == 4
    assert preflight.batch(rule(), entry(dtype="bfloat16"), memory_bytes=8 * GIB, gpus=[]) == 16


def test_the_smallest_gpu_decides_and_ram_does_not() -> None:
    assert preflight.batch(rule(), entry(), memory_bytes=GIB, gpus=[80 * GIB, 8 * GIB]) == 8


def test_a_gpu_that_is_not_used_does_not_count() -> None:
    assert preflight.batch(rule(), entry(device="cpu"), memory_bytes=8 * GIB, gpus=[80 * GIB]) == 4
    assert preflight.batch(rule(), entry("tensorflow"), memory_bytes=8 * GIB, gpus=[80 * GIB]) == 4


def test_a_backend_without_a_model_has_no_limit() -> None:
    assert preflight.batch(rule(), entry("null"), memory_bytes=GIB, gpus=[]) is None


def test_nothing_fits_where_the_model_does_not() -> None:
    assert preflight.batch(rule(), entry(), memory_bytes=5 * GIB, gpus=[]) == 0


def test_the_minima_hold_a_model_and_one_sample() -> None:
    assert preflight.minima(rule(gpu_memory_gib=8), entry()) == {
        "disk_gib": 30.0, "memory_gib": 2.0, "model_gib": 4.5, "gpu_memory_gib": 8.0, "device": "any",
    }  # fmt: skip
    assert preflight.minima(rule(), entry("null"))["model_gib"] == 0


def test_a_run_without_the_checkpoint_needs_no_room_for_it() -> None:
    def disk(made: BenchmarkEntry) -> Any:
        return preflight.minima(rule(weights_gib=20), made)["disk_gib"]

    assert (disk(entry()), disk(entry("null")), disk(entry(weights="random"))) == (30.0, 10.0, 10.0)


def test_tensorrt_needs_a_driver_its_package_and_more_disk() -> None:
    found = preflight.minima(rule(gpu_memory_gib=8), entry("tensorrt", dtype="bfloat16"))
    assert (found["driver"], found["module"], found["disk_gib"]) == (580, "tensorrt", 40.0)
    assert preflight.batch(rule(), entry("tensorrt"), memory_bytes=GIB, gpus=[8 * GIB]) == 8


@pytest.mark.parametrize(
    ("made", "device"),
    [
        (entry(), "any"),
        (entry(device="cuda:1"), "gpu"),
        (entry(device="cpu"), "cpu"),
        (entry("onnxruntime", provider="tensorrt"), "gpu"),
        (entry("tensorflow"), "cpu"),
        (entry("tensorrt"), "gpu"),
        (entry("null"), "cpu"),
    ],
)
def test_where_a_backend_computes(made: BenchmarkEntry, device: str) -> None:
    assert preflight.device(made) == device


@pytest.mark.parametrize("name", rules.benchmark_names())
def test_every_benchmark_says_what_it_needs(name: str) -> None:
    known = rules.load_benchmark(name)
    assert known.needs.disk_gib > 0
    for precision in known.needs.precisions.values():
        assert precision.model_gib > precision.sample_gib
