"""The system under test: LoadGen's queries become batches for a backend, outputs become responses.

SingleStream, MultiStream and Offline are answered in LoadGen's own issuing thread, which waits for nothing else.
Server queries arrive while earlier ones are being computed, so a worker thread takes whatever has come together.
"""

import queue
import threading
from collections.abc import Sequence
from itertools import islice

from fleet.harness import loadgen
from fleet.harness.contract import Scenario
from fleet.harness.interfaces import Backend, Benchmark, Output, StreamingBackend
from fleet.harness.qsl import Samples
from fleet.harness.tuning import batches

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
        self.error: BaseException | None = None
        """What the backend raised first; may be read from any thread."""
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
        for batch in batches(ordered, self._backend.batch_size):
            self._answer(batch)

    def flush(self) -> None:
        """LoadGen's flush_queries: nothing is held back here."""

    def close(self) -> None:
        """Stop the workers. Raises what the backend raised first."""
        for _ in self._workers:
            self._arrived.put(None)
        for worker in self._workers:
            worker.join(timeout=60)
        if self.error is not None:
            raise self.error

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
                if self.error is not None:
                    raise self.error  # The run has failed: what is left need not be asked for, one timeout each.
                output = backend.stream(self._samples[index], first)
                answer = (identifier, self._benchmark.response(output), len(output))
            except BaseException as error:  # noqa: BLE001 - LoadGen would wait for ever for the answer
                self.error = self.error or error
                answer = (identifier, b"", 0)
            loadgen.complete([answer])
            self.done += 1

    def _answer(self, batch: Sequence[tuple[int, int]]) -> None:
        """Answer each of `batch` exactly once, in groups as the backend hands outputs out, whatever happens."""
        waiting = iter(batch)
        try:
            outputs = self._backend.predict([self._samples[index] for _, index in batch])
            for group in batches(outputs, COMPLETED_AT_ONCE):
                self._complete(list(islice(waiting, len(group))), group)
        except BaseException as error:  # noqa: BLE001 - LoadGen would wait for ever for the answers
            self.error = self.error or error
        if unanswered := list(waiting):
            self.error = self.error or ValueError(f"the backend left {len(unanswered)} samples without an output")
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
