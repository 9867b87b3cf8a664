"""TensorRT itself, on a GPU: logits against the pytorch backend's, engines kept, damaged and out of memory."""

from pathlib import Path

import numpy as np
import pytest

from fleet.harness import assets, cuda_memory
from fleet.harness.backends import pytorch, tensorrt
from fleet.harness.benchmarks import tiny
from fleet.harness.interfaces import Features, Output

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tiny.TinyBert:
    folder = tmp_path_factory.mktemp("work")
    assets.prepare(folder, "tiny-bert", "tiny", "test")
    return tiny.open("tiny-bert", folder / "assets" / "tiny-bert")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where engines are kept, the same for all tests: each takes long to build."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def given(bert: tiny.TinyBert) -> list[Features]:
    return sorted((bert.features(index) for index in range(0, 10_833, 30)), key=lambda one: len(one.input_ids))


@pytest.fixture(scope="module")
def theirs(bert: tiny.TinyBert, given: list[Features]) -> list[Output]:
    """The pytorch backend's logits in fp32."""
    return list(pytorch.open(bert, {"device": "cpu"}).predict(given))


def worst(one: list[Output], other: list[Output]) -> float:
    return float(max(np.abs(left - right).max() for left, right in zip(one, other, strict=True)))


def test_fp32_logits_are_those_of_the_pytorch_backend(
    bert: tiny.TinyBert, given: list[Features], theirs: list[Output], cache: str
) -> None:
    backend = tensorrt.open(bert, {"cache": cache, "batch_size": 32})
    assert worst(list(backend.predict(given)), theirs) < 1e-3
    alone = [output for sample in given[:20] for output in backend.predict([sample])]
    assert worst(alone, theirs[:20]) < 1e-3
    backend.close()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_shorter_types_answer_nearly_every_question_alike(
    bert: tiny.TinyBert, given: list[Features], theirs: list[Output], cache: str, dtype: str
) -> None:
    backend = tensorrt.open(bert, {"cache": cache, "batch_size": 32, "dtype": dtype})
    found = list(backend.predict(given))
    same = sum((one.argmax(axis=0) == other.argmax(axis=0)).all() for one, other in zip(found, theirs, strict=True))
    assert same >= 0.95 * len(given)
    backend.close()


def test_an_engine_is_built_once_and_again_when_it_is_damaged(
    bert: tiny.TinyBert, given: list[Features], theirs: list[Output], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"cache": str(tmp_path), "batch_size": 4}

    def said() -> str:
        backend = tensorrt.open(bert, options)
        assert worst(list(backend.predict(given[:40])), theirs[:40]) < 1e-3
        backend.close()
        return capsys.readouterr().out

    assert "building a TensorRT engine" in said()
    assert "building a TensorRT engine" not in said()
    (engine,) = (tmp_path / "tensorrt").iterdir()
    whole = engine.read_bytes()
    engine.write_bytes(whole[: len(whole) // 2])
    assert "is damaged and is built anew" in said()
    tensorrt.keep(engine, b"whole, and no engine")
    assert "cannot load the engine" in said()
    assert "building a TensorRT engine" not in said()


def test_a_batch_that_does_not_fit_is_halved(
    bert: tiny.TinyBert, given: list[Features], theirs: list[Output], cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's memory is as it is, so buffers of more than 128 KiB are refused in its place."""

    class Small(cuda_memory.Buffer):
        def __init__(self, size: int) -> None:
            if size > 1 << 17:
                raise cuda_memory.OutOfMemoryError
            super().__init__(size)

    monkeypatch.setattr(cuda_memory, "Buffer", Small)
    backend = tensorrt.open(bert, {"cache": cache, "batch_size": 128})
    assert backend.batch_size == 32 * tensorrt.AHEAD
    assert worst(list(backend.predict(given)), theirs) < 1e-3
    backend.close()
