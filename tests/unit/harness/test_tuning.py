"""Tuning against backends whose speed is known: what comes out must be usable as LoadGen's target."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from fleet.harness import tuning
from fleet.harness.contract import Scenario
from fleet.harness.interfaces import Features
from tests.unit.harness.test_sut_and_qsl import Lengths, Recording


class Slow(Recording):
    """Takes `seconds` a call, whatever the number of samples."""

    def __init__(self, seconds: float, batch_size: int = 4) -> None:
        super().__init__()
        self.seconds = seconds
        self.batch_size = batch_size

    def predict(self, samples: Sequence[Features]) -> list[Any]:
        time.sleep(self.seconds)
        return super().predict(samples)


def test_single_stream_is_told_less_than_the_latency() -> None:
    found = tuning.tune(Lengths(), Slow(0.01), Scenario.SINGLE_STREAM, seconds=0.1)
    assert 7.0 <= found.values["target_latency"] < 14
    assert found.probes[0]["latency_ms"] >= 10


def test_multi_stream_asks_for_eight_samples_in_batches_as_the_sut_does() -> None:
    backend = Slow(0.0)
    tuning.tune(Lengths(), backend, Scenario.MULTI_STREAM, seconds=0.01)
    warm_up, *queries = backend.batches
    assert len(warm_up) == 1
    assert len(queries) >= 6
    assert {len(batch) for batch in queries} == {4}


def test_offline_is_told_more_than_the_rate() -> None:
    found = tuning.tune(Lengths(), Slow(0.01), Scenario.OFFLINE, seconds=0.2)
    assert 1.2 * 200 < found.values["target_qps"] <= 1.2 * 4 / 0.010


def test_offline_on_a_slow_system_does_not_pass_over_every_sample() -> None:
    backend = Slow(0.2, batch_size=8)
    started = time.monotonic()
    found = tuning.tune(Lengths(), backend, Scenario.OFFLINE, seconds=0.3)
    assert found.values["target_qps"] > 0
    assert sum(map(len, backend.batches)) < 40
    assert time.monotonic() - started < 5


def test_server_finds_a_rate_between_what_holds_and_what_fails() -> None:
    # One sample at a time of 10 ms each: 100 a second at the very most, and with a limit of 60 ms somewhat less.
    found = tuning.tune(Lengths(), Slow(0.01, batch_size=1), Scenario.SERVER, seconds=0.3, limit_ms=60, budget_s=15)
    assert 20 < found.values["target_qps"] < 100
    tried = [probe["p99_ms"] <= 60 for probe in found.probes[1:]]
    assert True in tried
    assert False in tried


def test_server_begins_where_an_identical_system_ended() -> None:
    found = tuning.tune(
        Lengths(), Slow(0.01, batch_size=1), Scenario.SERVER, seconds=0.2, limit_ms=60, start=40.0, budget_s=8
    )
    assert found.probes[1]["target_qps"] == 40.0


def test_server_without_a_limit_takes_half_of_what_single_queries_allow() -> None:
    found = tuning.tune(Lengths(), Slow(0.01), Scenario.SERVER, seconds=0.1)
    assert 25 < found.values["target_qps"] <= 50


def test_tuning_stays_within_its_budget() -> None:
    started = time.monotonic()
    tuning.tune(Lengths(), Slow(0.001), Scenario.SERVER, seconds=0.5, limit_ms=1e6, budget_s=2)
    assert time.monotonic() - started < 6


def test_what_a_backend_raises_under_load_comes_out() -> None:
    class Fails(Slow):
        def predict(self, samples: Sequence[Features]) -> list[Any]:
            if threading.current_thread() is not threading.main_thread():
                raise MemoryError("no room")
            return super().predict(samples)

    with pytest.raises(MemoryError, match="no room"):
        tuning.tune(Lengths(), Fails(0.001), Scenario.SERVER, seconds=0.2, limit_ms=100, budget_s=5)


class Engine(Slow):
    """Streams; four samples side by side."""

    concurrency = 4

    def stream(self, sample: Features, first: Callable[[Any], None]) -> Any:
        time.sleep(self.seconds)
        first(np.array([1]))
        return np.array([1, len(sample.input_ids)])

    def predict(self, samples: Sequence[Features]) -> Iterable[Any]:  # type: ignore[override]
        return [self.stream(sample, lambda _: None) for sample in samples]


def test_a_streaming_engine_is_tuned_with_its_concurrency() -> None:
    # 10 ms a sample and four at once: more than the 100 a second of one at a time.
    found = tuning.tune(Lengths(), Engine(0.01), Scenario.SERVER, seconds=0.3, limit_ms=60, budget_s=15)
    assert 100 < found.values["target_qps"] < 400
