"""The query sample library and the system under test, without LoadGen."""

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fleet.harness import assets, loadgen
from fleet.harness.backends import null
from fleet.harness.contract import Scenario
from fleet.harness.interfaces import Benchmark, Features, Generation
from fleet.harness.qsl import Samples
from fleet.harness.sut import SystemUnderTest

Response = tuple[int, bytes, int]
"""Id, data, number of tokens."""


class Lengths:
    """A benchmark whose sample `i` has i % 7 + 1 tokens, and whose response is that count."""

    sample_count = 40
    model_dir = Path("/nowhere")
    generation = None
    config: dict[str, Any] = {}  # noqa: RUF012 - shaped like Benchmark
    model: dict[str, str] = {}  # noqa: RUF012 - shaped like Benchmark

    def features(self, index: int) -> Features:
        ids = np.full(index % 7 + 1, index, dtype=np.int64)
        return Features(ids, np.zeros_like(ids))

    def response(self, output: Any) -> bytes:
        return bytes([len(output)])

    def evaluate(self, accuracy_log: Path, sample_count: int) -> dict[str, float]:
        raise NotImplementedError

    def accuracy_text(self, metrics: dict[str, float]) -> str:
        raise NotImplementedError


class Recording:
    """A backend that keeps the lengths of its batches."""

    batch_size = 4
    by_length = True
    labels: tuple[str, ...] = ()
    model: dict[str, str] = {}  # noqa: RUF012 - shaped like Backend

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def versions(self) -> dict[str, str]:
        return {}

    def predict(self, samples: Sequence[Features]) -> list[Any]:
        self.batches.append([len(sample.input_ids) for sample in samples])
        return [np.zeros((len(sample.input_ids), 2), dtype=np.float32) for sample in samples]

    def close(self) -> None:
        """Nothing to end."""


@pytest.fixture
def completed(monkeypatch: pytest.MonkeyPatch) -> list[Response]:
    """What would have gone to LoadGen."""
    found: list[Response] = []

    def complete(
        identifiers: Sequence[int], names: Sequence[int], data: dict[int, bytes], tokens: Sequence[int] | None = None
    ) -> None:
        found.extend(zip(identifiers, map(data.__getitem__, names), tokens or [0] * len(names), strict=True))

    monkeypatch.setattr(loadgen, "complete", complete)
    return found


def loaded(benchmark: Benchmark, count: int = 40) -> Samples:
    samples = Samples(benchmark)
    samples.load(range(count))
    return samples


def test_samples_are_there_between_load_and_unload() -> None:
    samples = Samples(Lengths())
    samples.load([3, 5])
    assert len(samples[5].input_ids) == 6
    samples.unload([3, 9])
    assert len(samples[5].input_ids) == 6
    with pytest.raises(KeyError):
        samples[3]


def test_every_sample_is_answered_once_with_its_own_answer(completed: list[Response]) -> None:
    backend = Recording()
    sut = SystemUnderTest(Lengths(), backend, loaded(Lengths()), Scenario.OFFLINE)
    sut.issue([1000 + index for index in range(30)], list(range(30)))
    sut.close()
    assert sorted(completed) == [(1000 + index, bytes([index % 7 + 1]), 0) for index in range(30)]
    assert sut.done == 30
    assert max(map(len, backend.batches)) == 4
    assert [length for batch in backend.batches for length in batch] == sorted(index % 7 + 1 for index in range(30))


def test_samples_that_share_an_output_each_get_its_bytes(completed: list[Response]) -> None:
    class Counting(Lengths):
        made = 0

        def response(self, output: Any) -> bytes:
            self.made += 1
            return super().response(output)

    benchmark = Counting()
    backend = null.open(benchmark, {"latency_ms": 0})
    sut = SystemUnderTest(benchmark, backend, loaded(benchmark), Scenario.OFFLINE)
    sut.issue([1000 + index for index in range(32)], list(range(32)))
    sut.close()
    assert sorted(completed) == [(1000 + index, bytes([index % 7 + 1]), 0) for index in range(32)]
    assert benchmark.made == 7


@pytest.mark.parametrize("tokens", [None, [7, 8, 9, 10]])
def test_loadgen_is_shown_the_bytes_of_each_response(monkeypatch: pytest.MonkeyPatch, tokens: list[int] | None) -> None:
    seen: list[tuple[int, bytes, int]] = []

    def take(responses: list[Any]) -> None:
        seen.extend((one.id, ctypes.string_at(one.data, one.size), one.n_tokens) for one in responses)

    monkeypatch.setattr("mlperf_loadgen.QuerySamplesComplete", take)
    loadgen.complete([11, 12, 13, 14], [5, 6, 5, 7], {5: b"ab\0c", 6: b"", 7: b"d"}, tokens)
    counts = tokens or [0] * 4
    assert seen == list(zip([11, 12, 13, 14], [b"ab\0c", b"", b"ab\0c", b"d"], counts, strict=True))


def test_server_queries_are_batched_while_the_backend_works(completed: list[Response]) -> None:
    backend, gate = Recording(), threading.Event()
    predict = backend.predict
    backend.predict = lambda samples: (gate.wait(5), predict(samples))[1]  # type: ignore[method-assign]
    sut = SystemUnderTest(Lengths(), backend, loaded(Lengths()), Scenario.SERVER)
    for index in range(11):
        sut.issue([index], [index])
    time.sleep(0.05)
    gate.set()
    sut.close()
    assert sorted(identifier for identifier, *_ in completed) == list(range(11))
    assert len(backend.batches) < 11
    assert max(map(len, backend.batches)) == 4


@pytest.mark.parametrize("scenario", [Scenario.SERVER, Scenario.OFFLINE])
def test_an_error_answers_everything_and_comes_out_at_close(completed: list[Response], scenario: Scenario) -> None:
    backend = Recording()

    def fail(_: Sequence[Features]) -> list[Any]:
        raise MemoryError("no room")

    backend.predict = fail  # type: ignore[method-assign, assignment]
    sut = SystemUnderTest(Lengths(), backend, loaded(Lengths()), scenario)
    sut.issue(list(range(9)), list(range(9)))
    with pytest.raises(MemoryError, match="no room"):
        sut.close()
    assert sorted(completed) == [(index, b"", 0) for index in range(9)]


def test_the_null_backend_names_what_it_knows() -> None:
    backend = null.open(Lengths(), {})
    assert [output.shape for output in backend.predict([Lengths().features(4)])] == [(5, 2)]
    assert backend.labels == ("simulated",)
    with pytest.raises(ValueError, match="no option 'latency'; it has batch_size, latency_ms"):
        null.open(Lengths(), {"latency": 3})


def test_assets_are_prepared_once_per_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Module:
        @staticmethod
        def prepare(name: str, folder: Path) -> dict[str, str]:
            assert not (folder / ".complete").exists()
            calls.append(name)
            if len(calls) == 3:
                raise ValueError("damaged")
            return {}

        @staticmethod
        def open(_name: str, _folder: Path) -> SimpleNamespace:
            return SimpleNamespace(model={"weights_sha256": "abc"})

    monkeypatch.setitem(__import__("sys").modules, "fleet.harness.benchmarks.probe", Module)
    assert assets.prepare(tmp_path, "b", "probe", "one") is True
    assert assets.prepare(tmp_path, "b", "probe", "one") is False
    stamp = tmp_path / "assets" / "b" / ".complete"
    assert assets.read_stamp(stamp) == {"digest": "one", "weights": "abc"}
    # As harnesses wrote it before they knew the weights.
    stamp.write_text("one\n", encoding="utf-8")
    assert assets.prepare(tmp_path, "b", "probe", "one") is False
    assert assets.prepare(tmp_path, "b", "probe", "two") is True
    with pytest.raises(ValueError, match="damaged"):
        assets.prepare(tmp_path, "b", "probe", "three")
    assert not (tmp_path / "assets" / "b" / ".complete").exists()
    assert calls == ["b", "b", "b"]


class Tokens(Lengths):
    """A generative benchmark."""

    generation = Generation(beams=1, min_new_tokens=1, max_new_tokens=3, eos_token_ids=(0,), pad_token_id=0)  # type: ignore[assignment]


class Served(Recording):
    """Streams three tokens a sample, four samples at once; sample 5 fails if told so."""

    concurrency = 4

    def __init__(self, broken: int | None = None) -> None:
        super().__init__()
        self.broken = broken
        self.together = threading.Barrier(4)

    def stream(self, sample: Features, first: Callable[[Any], None]) -> Any:
        if int(sample.input_ids[0]) == self.broken:
            raise ConnectionError("the endpoint is gone")
        first(np.array([7]))
        if self.broken is None:
            self.together.wait(10)
        return np.array([7, 8, 9])


def test_a_streaming_backend_is_asked_side_by_side_and_says_its_first_tokens(
    completed: list[Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    firsts: list[tuple[int, bytes]] = []
    monkeypatch.setattr(
        loadgen, "first_tokens", lambda ids, _, data: firsts.extend(zip(ids, data.values(), strict=True))
    )
    sut = SystemUnderTest(Tokens(), Served(), loaded(Tokens()), Scenario.OFFLINE)
    sut.issue([100 + index for index in range(8)], list(range(8)))
    sut.close()
    assert sorted(completed) == [(100 + index, b"\x03", 3) for index in range(8)]
    assert sorted(firsts) == [(100 + index, b"\x01") for index in range(8)]


def test_after_an_endpoint_failed_nothing_more_is_asked_and_all_is_answered(
    completed: list[Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    firsts: list[int] = []
    monkeypatch.setattr(loadgen, "first_tokens", lambda ids, *_: firsts.extend(ids))
    backend = Served(broken=5)
    sut = SystemUnderTest(Tokens(), backend, loaded(Tokens()), Scenario.SERVER)
    for index in range(20):
        sut.issue([index], [index])
    with pytest.raises(ConnectionError, match="the endpoint is gone"):
        sut.close()
    assert len(completed) == 20
    assert (5, b"", 0) in completed
    # LoadGen crashes in SingleStream when an answer ends that never began.
    assert sorted(firsts) == list(range(20))


def test_samples_that_a_generating_backend_left_have_begun_too(
    completed: list[Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    firsts: list[int] = []
    monkeypatch.setattr(loadgen, "first_tokens", lambda ids, *_: firsts.extend(ids))
    backend = Recording()
    backend.predict = lambda samples: samples[:0]  # type: ignore[method-assign,assignment,return-value]
    sut = SystemUnderTest(Tokens(), backend, loaded(Tokens()), Scenario.SINGLE_STREAM)
    sut.issue([3], [0])
    with pytest.raises(ValueError, match="left 1 samples without an output"):
        sut.close()
    assert (firsts, completed) == ([3], [(3, b"", 0)])


def test_a_backend_that_leaves_samples_out_is_an_error(completed: list[Response]) -> None:
    backend = Recording()
    predict = backend.predict
    backend.predict = lambda samples: predict(samples)[:-1]  # type: ignore[method-assign]
    sut = SystemUnderTest(Lengths(), backend, loaded(Lengths()), Scenario.OFFLINE)
    sut.issue(list(range(4)), list(range(4)))
    with pytest.raises(ValueError, match="left 1 samples without an output"):
        sut.close()
    assert len(completed) == 4
