"""Buffers, streams and events on a real GPU, and the TensorRT backend's way with them, the library's place taken."""

from pathlib import Path

import numpy as np
import pytest
from cuda.bindings import runtime

from fleet.harness import assets, cuda_memory
from fleet.harness.backends import pytorch, tensorrt
from fleet.harness.benchmarks import tiny
from tests.unit.harness import tensorrt_stand_in

pytestmark = pytest.mark.gpu


def test_the_gpu_is_named() -> None:
    found = cuda_memory.gpu()
    assert found.name
    assert float(found.capability) >= 7.5
    assert float(found.cuda) >= 13


def test_what_is_sent_is_what_is_fetched() -> None:
    stream, event, buffer = cuda_memory.Stream(), cuda_memory.Event(), cuda_memory.Buffer(1 << 20)
    event.wait()  # never marked
    sent = np.random.default_rng(7).integers(0, 256, 1 << 20).astype(np.uint8)
    buffer.host[:] = sent
    stream.send(buffer, 1 << 20)
    stream.wait()
    buffer.host[:] = 0
    stream.fetch(buffer, 1 << 19)
    stream.mark(event)
    event.wait()
    assert (buffer.host[: 1 << 19] == sent[: 1 << 19]).all()
    assert not buffer.host[1 << 19 :].any()
    for held in (buffer, event, stream):
        held.close()


def test_what_does_not_fit_is_told_and_the_rest_goes_on() -> None:
    _, free, _ = runtime.cudaMemGetInfo()
    with pytest.raises(cuda_memory.OutOfMemoryError):
        cuda_memory.Buffer(1 << 46)
    for _ in range(3):
        cuda_memory.Buffer(1 << 26).close()
    assert abs(runtime.cudaMemGetInfo()[1] - free) < 1 << 25


def test_batches_pass_through_the_gpu_unharmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets.prepare(tmp_path, "tiny-bert", "tiny", "test")
    bert = tiny.open("tiny-bert", tmp_path / "assets" / "tiny-bert")
    given = sorted((bert.features(index) for index in range(0, 10_833, 100)), key=lambda one: len(one.input_ids))
    theirs = list(pytorch.open(bert, {"device": "cpu"}).predict(given))
    with tensorrt_stand_in.installed(monkeypatch, cuda=runtime) as (library, _):
        backend = tensorrt.open(bert, {"cache": str(tmp_path), "batch_size": 8})
        for _ in range(2):
            found = list(backend.predict(given))
            assert max(np.abs(one - other).max() for one, other in zip(found, theirs, strict=True)) < 1e-4
        assert backend.versions()["gpu"] == cuda_memory.gpu().name
        backend.close()
        assert len(library.shapes) == 2 * -(-len(given) // 8)
