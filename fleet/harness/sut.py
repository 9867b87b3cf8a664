"""The system under test: LoadGen's queries become batches for a backend, outputs become responses.

SingleStream, MultiStream and Offline are answered in LoadGen's own issuing thread, which waits for nothing else.
Server queries arrive while earlier ones are being computed, so a worker thread takes whatever has come together.
"""

import queue
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from fleet.harness import loadgen
from fleet.harness.contract import Scenario
from fleet.harness.interfaces import Backend, Benchmark, Features, Output, StreamingBackend
from fleet.harness.qsl import Samples

COMPLETED_AT_ONCE = 1024
"""Responses handed to LoadGen in one call, at the most."""


class SystemUnderTest:
    """Answers queries with a backend; `done` counts samples and may be read from any thread."""

    def __init__(self, benchmark: Benchmark, backend: Backend, samples: Samples, scenario: Scenario) -> None:
        self._benchmark = benchmark
        self._backend = backend
        self._samples = samples
        self._counts_tokens = benchmark.generation is not None
        self.done = 0
        self._error: BaseException | None = None
        self._arrived: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []
        if isinstance(backend, StreamingBackend):
            # Each sample in a thread of its own: the engine behind it does the batching.
            work = [lambda: self._stream(backend)] * backend.concurrency
        else:
            work = [self._serve] if scenario is Scenario.SERVER else []
        for function in work:
            worker = threading.Thread(target=function, name="sut", daemon=True)
            worker.start()
            self._workers.append(worker)

    def issue(self, query: loadgen.Query) -> None:
        """LoadGen's issue_queries."""
        if self._workers:
            for sample in query:
                self._arrived.put(sample)
            return
        # Sorted by length, so that a batch holds samples of like length and little padding.
        ordered = sorted(query, key=lambda sample: len(self._samples[sample[1]].input_ids)) if len(query) > 1 else query
        for batch in _batches(ordered, self._backend.batch_size):
            self._answer(batch)

    def flush(self) -> None:
        """LoadGen's flush_queries: nothing is held back here."""

    def close(self) -> None:
        """Stop the workers. Raises what the backend raised first."""
        for _ in self._workers:
            self._arrived.put(None)
        for worker in self._workers:
            worker.join(timeout=60)
        if self._error is not None:
            raise self._error

    def _serve(self) -> None:
        while (first := self._arrived.get()) is not None:
            batch = [first]
            while len(batch) < self._backend.batch_size and not self._arrived.empty():
                following = self._arrived.get()
                if following is None:
                    self._arrived.put(None)
                    break
                batch.append(following)
            self._answer(batch)

    def _stream(self, backend: StreamingBackend) -> None:
        while (sample := self._arrived.get()) is not None:
            identifier, index = sample

            def first(token: Output, identifier: int = identifier) -> None:
                loadgen.first_token(identifier, self._benchmark.response(token))

            try:
                if self._error is not None:
                    raise self._error  # The run has failed: what is left need not be asked for, one timeout each.
                output = backend.stream(self._samples[index], first)
                answer = (identifier, self._benchmark.response(output), len(output))
            except BaseException as error:  # noqa: BLE001 - LoadGen would wait for ever for the answer
                self._error = self._error or error
                answer = (identifier, b"", 0)
            loadgen.complete([answer])
            self.done += 1

    def _answer(self, batch: Sequence[tuple[int, int]]) -> None:
        """Answer each of `batch` exactly once, in groups as the backend hands outputs out, whatever happens."""
        waiting = iter(batch)
        try:
            outputs = self._backend.predict([self._samples[index] for _, index in batch])
            for group in _batches(outputs, COMPLETED_AT_ONCE):
                self._complete(list(islice(waiting, len(group))), group)
        except BaseException as error:  # noqa: BLE001 - LoadGen would wait for ever for the answers
            self._error = self._error or error
        if unanswered := list(waiting):
            self._error = self._error or ValueError(f"the backend left {len(unanswered)} samples without an output")
            loadgen.complete([(identifier, b"", 0) for identifier, _ in unanswered])
            self.done += len(unanswered)

    def _complete(self, samples: list[tuple[int, int]], outputs: Sequence[Output]) -> None:
        try:
            response = self._benchmark.response
            counts = [len(output) if self._counts_tokens else 0 for output in outputs]
            answers = [
                (sample[0], response(output), count)
                for sample, output, count in zip(samples, outputs, counts, strict=True)
            ]
        except BaseException:
            loadgen.complete([(identifier, b"", 0) for identifier, _ in samples])
            raise
        finally:
            self.done += len(samples)
        loadgen.complete(answers)


T = TypeVar("T")


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


def measure(benchmark: Benchmark, backend: Backend, scenario: Scenario, *, seconds: float) -> dict[str, float]:
    """Warm the backend up and measure what LoadGen must be told for `scenario`; takes about `seconds`."""
    count = min(benchmark.sample_count, 128)
    step = max(1, benchmark.sample_count // count)
    features = [benchmark.features(index * step) for index in range(count)]
    _exhaust(backend.predict(features[:1]))
    if scenario is Scenario.OFFLINE:
        return loadgen.wanted_measurements(scenario, 0.0, _rate(backend, features, seconds))
    together = loadgen.MULTI_STREAM_SAMPLES if scenario is Scenario.MULTI_STREAM else 1
    return loadgen.wanted_measurements(scenario, _latency(backend, features, seconds, together=together), 0.0)


def _latency(backend: Backend, features: list[Features], seconds: float, *, together: int) -> float:
    """Median wall seconds of a query of `together` samples, in batches as `issue` makes them."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    for at in range(0, len(features) - together + 1, together):
        started = time.perf_counter()
        for batch in _batches(enumerate(range(at, at + together)), backend.batch_size):
            _exhaust(backend.predict([features[index] for _, index in batch]))
        times.append(time.perf_counter() - started)
        if started > end and len(times) >= 3:  # noqa: PLR2004 - a median needs a few
            break
    return statistics.median(times)


def _rate(backend: Backend, features: list[Features], seconds: float) -> float:
    """Samples a second in batches of like length, as Offline sends them."""
    ordered = sorted(features, key=lambda sample: len(sample.input_ids))
    batches = [ordered[at : at + backend.batch_size] for at in range(0, len(ordered), backend.batch_size)]
    for batch in batches[:: max(1, len(batches) // 4)]:
        _exhaust(backend.predict(batch))
    done, started = 0, time.perf_counter()
    # Whole passes only: a part of one would hold more short samples than long ones.
    while done == 0 or time.perf_counter() - started < seconds:
        for batch in batches:
            _exhaust(backend.predict(batch))
        done += len(ordered)
    return done / (time.perf_counter() - started)


def _exhaust(outputs: Iterable[Output]) -> None:
    for _ in outputs:
        pass
