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


@pytest.mark.parametrize("scenario", list(Scenario))
def test_a_system_too_slow_for_its_budget_is_tuned_by_the_one_sample_that_warmed_it_up(scenario: Scenario) -> None:
    backend = Slow(0.4, batch_size=1)
    found = tuning.tune(Lengths(), backend, scenario, seconds=0.2, limit_ms=500, budget_s=0.5)
    assert len(backend.batches) <= 2
    assert found.seconds < 2
    value = found.values[tuning.wanted(scenario)]
    if scenario is Scenario.OFFLINE:
        assert 0.5 * 1.2 / 0.4 < value <= 1.2 / 0.4
    elif scenario is not Scenario.SERVER:
        together = 8 if scenario is Scenario.MULTI_STREAM else 1
        assert 0.7 * together * 400 <= value < 0.7 * together * 800
    else:
        assert 0 < value < 1 / 0.4


def test_offline_on_a_system_that_fits_few_samples_into_the_budget_takes_few() -> None:
    backend = Slow(0.2, batch_size=1)
    found = tuning.tune(Lengths(), backend, Scenario.OFFLINE, seconds=1, budget_s=1.3)
    assert 1 < len(backend.batches) <= 7
    assert found.seconds < 2.5
    assert 0.5 * 1.2 / 0.2 < found.values["target_qps"] <= 1.2 / 0.2


def test_offline_begins_with_as_much_as_an_identical_system_does_in_a_quarter_of_a_probe() -> None:
    slow, known = Slow(0.001), Slow(0.001)
    tuning.tune(Lengths(), slow, Scenario.OFFLINE, seconds=0.2)
    tuning.tune(Lengths(), known, Scenario.OFFLINE, seconds=0.2, start=1.2 * 3000)
    # Sorted by length: eight samples from all over the set, or all forty, of which six have a single token.
    assert slow.batches[1] == [1, 1, 2, 3]
    assert known.batches[1:3] == [[1, 1, 1, 1], [1, 1, 2, 2]]


def test_what_still_waits_when_a_rate_has_failed_is_not_computed() -> None:
    backend = Slow(0.05, batch_size=1)
    began = time.monotonic()
    tuning.tune(Lengths(), backend, Scenario.SERVER, seconds=1, limit_ms=10, start=1000.0, budget_s=3)
    # Hundreds arrive in a second, and twenty are computed: the others would take ten seconds and more.
    assert len(backend.batches) < 90
    assert time.monotonic() - began < 6


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
