"""What LoadGen must be told about a system before a run, found by short probes: never part of a result.

SingleStream and MultiStream expect a latency in ms; too high a one makes LoadGen run out of queries before its
minimum duration. Offline sends 1.1 x duration x target_qps samples in one query, which must last the whole duration
(mlperf-facts, section 6: both from LoadGen's source). Server wants the highest rate whose 99th percentile stays under
the limit: doubled until it fails, then one step back into the bracket.
"""

import queue
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from typing import Any, TypeVar

from fleet.harness import loadgen
from fleet.harness.contract import Scenario
from fleet.harness.interfaces import Backend, Benchmark, Features, Output, StreamingBackend

SAMPLES = 128
"""Different samples that probes use, from all over the dataset."""
LATENCY_MARGIN, RATE_MARGIN = 0.7, 1.2
"""On the safe side of what was measured: a run must never be too short."""
SERVER_MARGIN = 0.85
"""A few hundred queries say less about a 99th percentile than LoadGen's thousands."""
BUDGET_S, LEAST_S = 165.0, 20.0
"""A scenario is tuned in at most three minutes, loading and warming up included; so long at least, whatever loading took."""
SERVER_QUERIES = 300


@dataclass(slots=True, kw_only=True)
class Tuning:
    """What was found, and how: tuning.json."""

    values: dict[str, float] = field(default_factory=dict)
    """user.conf key to value."""
    probes: list[dict[str, float]] = field(default_factory=list)
    """Server: rate tried and 99th percentile in ms; else: seconds and what was measured."""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def wanted(scenario: Scenario) -> str:
    """The user.conf key that a run of `scenario` needs."""
    return "target_latency" if scenario in {Scenario.SINGLE_STREAM, Scenario.MULTI_STREAM} else "target_qps"


def tune(
    benchmark: Benchmark,
    backend: Backend,
    scenario: Scenario,
    *,
    seconds: float,
    limit_ms: float | None = None,
    start: float | None = None,
    budget_s: float = BUDGET_S,
) -> Tuning:
    """Warm the backend up and measure for about `seconds` a probe, `budget_s` in all at the most.

    The one sample that warms up is computed whatever it takes; where nothing more fits into the budget, it is the
    measurement. `limit_ms` is Server's latency limit: without one a rate half of what single queries allow is taken.
    `start` is the value that an identical system came to.
    """
    began = time.monotonic()
    end = began + budget_s
    found = Tuning()
    count = min(benchmark.sample_count, SAMPLES)
    step = max(1, benchmark.sample_count // count)
    features = [benchmark.features(index * step) for index in range(count)]
    _exhaust(backend.predict(features[:1]))
    once = time.monotonic() - began
    key = wanted(scenario)
    if scenario is Scenario.OFFLINE:
        rate = _rate(backend, features, seconds, once=once, end=end, foreseen=(start or 0.0) / RATE_MARGIN)
        found.probes.append({"samples_per_second": rate})
        found.values[key] = RATE_MARGIN * rate
    else:
        together = loadgen.MULTI_STREAM_SAMPLES if scenario is Scenario.MULTI_STREAM else 1
        latency = _latency(backend, features, seconds, together=together, once=once, end=end)
        found.probes.append({"latency_ms": latency * 1000})
        if scenario is not Scenario.SERVER:
            found.values[key] = LATENCY_MARGIN * latency * 1000
        elif limit_ms is None:
            found.values[key] = 0.5 / latency
        else:
            bracket = _Bracket(
                backend=backend,
                features=features,
                limit_s=limit_ms / 1000,
                end=end,
                seconds=seconds,
                probes=found.probes,
            )
            found.values[key] = bracket.highest(start or 0.5 / latency)
    found.seconds = time.monotonic() - began
    return found


def _latency(
    backend: Backend, features: Sequence[Features], seconds: float, *, together: int, once: float, end: float
) -> float:
    """Median wall seconds of a query of `together` samples, in batches as the SUT makes them.

    `once` is what a single sample took, `end` by when everything must be done.
    """
    times: list[float] = []
    probed = time.monotonic() + seconds
    foreseen = once * -(-together // backend.batch_size)
    for at in range(0, len(features) - together + 1, together):
        started = time.monotonic()
        if started + foreseen > end or (started > probed and len(times) >= 3):  # noqa: PLR2004 - a median needs a few
            break
        for batch in batches(features[at : at + together], backend.batch_size):
            _exhaust(backend.predict(batch))
        times.append(time.monotonic() - started)
        foreseen = times[-1]
    return statistics.median(times or [foreseen])


def _rate(
    backend: Backend, features: Sequence[Features], seconds: float, *, once: float, end: float, foreseen: float
) -> float:
    """Samples a second in batches as Offline sends them.

    A pass holds short and long samples alike. It grows until it fills a batch, or takes a quarter of the time: on a
    slow system a pass over many would take hours, on a fast one a small one would measure the start-up of a batch.
    `once` and `end` are as in `_latency`; `foreseen` is an identical system's rate, or 0.
    """
    largest = max(backend.batch_size, len(features))
    room = end - time.monotonic()
    size = min(max(8, int(foreseen * seconds / 4)), largest)
    if once * min(size, 8) > room:
        size = int(room / once)
        if size < 1:
            return 1 / once
    while True:
        step = max(1, len(features) // size)
        chosen = sorted(islice(cycle(features[::step]), size), key=_length)
        done, started = 0, time.monotonic()
        growing = size < largest
        while done == 0 or (not growing and time.monotonic() - started < seconds):
            for batch in batches(chosen, backend.batch_size):
                _exhaust(backend.predict(batch))
            done += size
        spent = time.monotonic() - started
        if spent > seconds / 4 or time.monotonic() + 4 * spent > end:
            return done / spent
        size *= 4


def _length(sample: Features) -> int:
    return len(sample.input_ids)


@dataclass(slots=True, kw_only=True)
class _Bracket:
    """Server's highest rate under a latency limit, by probes with Poisson arrivals, as LoadGen sends them."""

    backend: Backend
    features: Sequence[Features]
    limit_s: float
    end: float
    """When to stop, by time.monotonic()."""
    seconds: float
    """Of a probe."""
    probes: list[dict[str, float]]

    def highest(self, start: float) -> float:
        """A rate that holds, with a margin; `start` may be too high or too low."""
        holds, fails = 0.0, 0.0
        rate = start
        while not (holds and fails) and time.monotonic() + self.seconds < self.end:
            if self._holds(rate):
                holds, rate = rate, rate * 2
            else:
                fails, rate = rate, rate / 2
        if holds and fails and time.monotonic() + self.seconds < self.end:
            middle = (holds * fails) ** 0.5
            holds = middle if self._holds(middle) else holds
        return SERVER_MARGIN * (holds or rate)

    def _holds(self, rate: float) -> bool:
        answers = _Answers(self.backend, self.limit_s)
        _send(answers, self.features, rate, self.seconds, self.end)
        latencies = answers.latencies
        if not latencies:
            return False
        worst = statistics.quantiles(latencies, n=100)[98] if len(latencies) > 1 else latencies[0]
        self.probes.append({"target_qps": rate, "p99_ms": worst * 1000})
        return worst <= self.limit_s and not answers.hopeless


def _send(answers: "_Answers", features: Sequence[Features], rate: float, seconds: float, until: float) -> None:
    """Ask `answers` at random times, `rate` a second; ends early when everything comes far too late, and by `until`."""
    draw = random.Random(0)  # noqa: S311 - arrival times, not a secret
    at = time.monotonic()
    end, sent = at + seconds, 0
    while (at < end or sent < min(SERVER_QUERIES, 3 * seconds * rate)) and not answers.hopeless:
        if max(at, time.monotonic()) >= until:
            answers.hopeless = True
            break
        time.sleep(max(0.0, at - time.monotonic()))
        answers.arrived.put((at, features[sent % len(features)]))
        sent += 1
        at += draw.expovariate(rate)
    answers.finish()


class _Answers:
    """Works off arriving samples as the SUT does, and keeps how long each waited."""

    def __init__(self, backend: Backend, limit_s: float) -> None:
        self.arrived: queue.SimpleQueue[tuple[float, Features] | None] = queue.SimpleQueue()
        self.latencies: list[float] = []
        self.hopeless = False
        """Nothing more is to be found out: what still waits is not computed."""
        self._limit = limit_s
        self._error: BaseException | None = None
        if isinstance(backend, StreamingBackend):
            work = [lambda: self._stream(backend)] * backend.concurrency
        else:
            work = [lambda: self._batch(backend)]
        self._threads = [threading.Thread(target=self._guarded, args=(one,), daemon=True) for one in work]
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Wait for the last answer. Raises what the backend raised."""
        for _ in self._threads:
            self.arrived.put(None)
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again in `finish`, in the thread that waits
            self._error, self.hopeless = error, True

    def _note(self, arrival: float) -> None:
        self.latencies.append(time.monotonic() - arrival)
        self.hopeless = self.hopeless or self.latencies[-1] > 5 * self._limit

    def _stream(self, backend: StreamingBackend) -> None:
        while (item := self.arrived.get()) is not None:
            if self.hopeless:
                continue
            backend.stream(item[1], lambda _: None)
            self._note(item[0])

    def _batch(self, backend: Backend) -> None:
        while (first := self.arrived.get()) is not None:
            if self.hopeless:
                continue
            taken = [first, *_waiting(self.arrived, backend.batch_size - 1)]
            taken.sort(key=lambda item: _length(item[1]))
            for item, _ in zip(taken, backend.predict([sample for _, sample in taken]), strict=True):
                self._note(item[0])


def _waiting(arrived: "queue.SimpleQueue[tuple[float, Features] | None]", most: int) -> list[tuple[float, Features]]:
    found: list[tuple[float, Features]] = []
    while len(found) < most and not arrived.empty():
        item = arrived.get()
        if item is None:
            arrived.put(None)
            break
        found.append(item)
    return found


T = TypeVar("T")


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`items` in lists of `size`, the last one perhaps shorter."""
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


def _exhaust(outputs: Iterable[Output]) -> None:
    for _ in outputs:
        pass
