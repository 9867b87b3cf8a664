"""The system under test: LoadGen's queries become batches for a backend, outputs become responses.

SingleStream, MultiStream and Offline are answered in LoadGen's own issuing thread, which waits for nothing else.
Server queries arrive while earlier ones are being computed, so a worker thread takes whatever has come together.
"""

import queue
import threading
from collections.abc import Sequence

import numpy as np

from fleet.harness import loadgen
from fleet.harness.contract import Scenario
from fleet.harness.interfaces import Backend, Benchmark, Output, StreamingBackend
from fleet.harness.qsl import Samples
from fleet.harness.tuning import batches

FIRST = 8
"""Bytes of a response that are said to be its first token: enough for one id."""
AT_ONCE = 1024
"""Responses handed to LoadGen in one call, at the most."""


class SystemUnderTest:
    """Answers queries with a backend; `done` counts samples and may be read from any thread."""

    def __init__(self, benchmark: Benchmark, backend: Backend, samples: Samples, scenario: Scenario) -> None:
        self._benchmark = benchmark
        self._backend = backend
        self._samples = samples
        self._generates = benchmark.generation is not None
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

    def issue(self, identifiers: list[int], indices: list[int]) -> None:
        """LoadGen's issue_queries."""
        if self._workers:
            for sample in zip(identifiers, indices, strict=True):
                self._arrived.put(sample)
            return
        if len(indices) > 1 and self._backend.by_length:
            order = np.argsort(self._samples.lengths[indices], kind="stable").tolist()
            identifiers = [identifiers[at] for at in order]
            indices = [indices[at] for at in order]
        size = self._backend.batch_size
        for at in range(0, len(indices), size):
            self._answer(identifiers[at : at + size], indices[at : at + size])

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
            if len(batch) > 1 and self._backend.by_length:
                batch.sort(key=lambda sample: self._samples.lengths[sample[1]])
            self._answer([identifier for identifier, _ in batch], [index for _, index in batch])

    def _stream(self, backend: StreamingBackend) -> None:
        response = self._benchmark.response
        while (sample := self._arrived.get()) is not None:
            identifier, index = sample
            begun: list[int] = []

            def first(token: Output, identifier: int = identifier, begun: list[int] = begun) -> None:
                begun.append(identifier)
                loadgen.first_tokens([identifier], [0], {0: response(token)})

            data, count = b"", 0
            try:
                if self.error is not None:
                    raise self.error  # The run has failed: what is left need not be asked for, one timeout each.
                output = backend.stream(self._samples[index], first)
                data, count = response(output), len(output)
            except BaseException as error:  # noqa: BLE001 - LoadGen would wait for ever for the answer
                self.error = self.error or error
            if not begun:
                self._begin([identifier])
            loadgen.complete([identifier], [0], {0: data}, [count])
            self.done += 1

    def _begin(self, identifiers: list[int]) -> None:
        """Say a first token that never came: LoadGen crashes in SingleStream when a generated answer ends without."""
        loadgen.first_tokens(identifiers, [0] * len(identifiers), {0: b""})

    def _answer(self, identifiers: list[int], indices: list[int]) -> None:
        """Answer each sample exactly once, in groups as the backend hands outputs out, whatever happens."""
        answered = 0
        try:
            for group in batches(self._backend.predict(list(map(self._samples.held.__getitem__, indices))), AT_ONCE):
                these = identifiers[answered : answered + len(group)]
                if len(these) < len(group):
                    raise ValueError(f"the backend gave more than {len(identifiers)} outputs")
                # An output that several samples share is made into bytes once.
                names = list(map(id, group))
                distinct = dict(zip(names, group, strict=True))
                data = dict(zip(distinct, map(self._benchmark.response, distinct.values()), strict=True))
                # From here on none of these is answered by the exception's way: LoadGen takes one answer a sample.
                answered += len(group)
                self._complete(these, names, data, group)
        except BaseException as error:  # noqa: BLE001 - LoadGen would wait for ever for the answers
            self.error = self.error or error
        if left := identifiers[answered:]:
            self.error = self.error or ValueError(f"the backend left {len(left)} samples without an output")
            if self._generates:
                self._begin(left)
            loadgen.complete(left, [0] * len(left), {0: b""})
            self.done += len(left)

    def _complete(
        self, identifiers: list[int], names: list[int], data: dict[int, bytes], outputs: Sequence[Output]
    ) -> None:
        tokens = None
        if self._generates:
            # Nothing was streamed, so the first token came with the last; some LoadGen models want it said.
            loadgen.first_tokens(identifiers, names, {name: held[:FIRST] for name, held in data.items()})
            tokens = list(map(len, outputs))
        loadgen.complete(identifiers, names, data, tokens)
        self.done += len(identifiers)
