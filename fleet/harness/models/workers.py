"""One process per accelerator behind one LoadGen: each has a whole model, and takes the next part when it is free.

The first model lives in LoadGen's own process, so that a sample by itself, which only one accelerator can answer, takes no
way between processes.
"""

import collections
import contextlib
import itertools
import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fleet.harness.interfaces import Backend, Features, Options, Output

AHEAD = 2
"""Parts that a process has at once: it computes one while the next is on its way."""
Make = Callable[[Options], Backend]
_Sent = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Token ids and token types of samples one after another, and the samples' lengths: three arrays cross a pipe in a
tenth of the time of a list of samples."""


def device_of(options: Options) -> torch.device:
    """The device asked for, or the GPU where there is one."""
    return torch.device(str(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")))


def each(options: Options) -> list[Options]:
    """The options of each worker that `workers` asks for: a GPU each, all there are where nothing is said.

    Raises ValueError where there are fewer GPUs than workers.
    """
    rest = {key: value for key, value in options.items() if key != "workers"}
    on_gpus = device_of(options) == torch.device("cuda")
    there = torch.cuda.device_count() if on_gpus else 1
    wanted = int(options.get("workers", there))
    if wanted <= 1:
        return [rest]
    if not on_gpus:
        return [dict(rest) for _ in range(wanted)]
    if wanted > there:
        raise ValueError(f"workers {wanted}: a GPU each, and this host has {there}")
    return [{**rest, "device": f"cuda:{number}"} for number in range(wanted)]


def _packed(samples: Sequence[Features]) -> _Sent:
    return (
        np.concatenate([sample.input_ids for sample in samples]),
        np.concatenate([sample.token_type_ids for sample in samples]),
        np.array([len(sample.input_ids) for sample in samples]),
    )


def _cut(together: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
    return np.split(together, np.cumsum(lengths)[:-1])


def _serve(pipe: Connection, make: Make, options: Options) -> None:
    """A process's life: open the model, answer parts until the pipe closes."""
    try:
        backend = make(options)
        pipe.send(None)
    except Exception as error:  # noqa: BLE001 - whatever it was, the parent must learn it
        pipe.send(error)
        return
    parts: queue.SimpleQueue[_Sent | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, parts), daemon=True).start()
    while (part := parts.get()) is not None:
        ids, types, lengths = part
        try:
            samples = [Features(*both) for both in zip(_cut(ids, lengths), _cut(types, lengths), strict=True)]
            outputs = list(backend.predict(samples))
            pipe.send((np.concatenate(outputs), np.array([len(output) for output in outputs])))
        except Exception as error:  # noqa: BLE001 - likewise
            pipe.send(error)


def _read(pipe: Connection, parts: "queue.SimpleQueue[_Sent | None]") -> None:
    """Take parts in as they come: the parent must never wait in the middle of sending one."""
    while True:
        try:
            parts.put(pipe.recv())
        except (EOFError, OSError):
            parts.put(None)
            return


class _Round:
    """The parts of one call, taken by whoever is free, and a future for the outputs of each."""

    def __init__(self, parts: Sequence[Sequence[Features]]) -> None:
        self._parts = parts
        self.answers: list[Future[list[Output]]] = [Future() for _ in parts]
        self._numbers = iter(range(len(parts)))  # its next() is one step, so threads need no lock

    def compute(self, backend: Backend) -> None:
        """Take parts for the model in this process."""
        for number in self._numbers:
            self._fill(number, lambda part=self._parts[number]: list(backend.predict(part)))  # type: ignore[misc]

    def exchange(self, pipe: Connection, receive: Callable[[], list[Output]]) -> None:
        """Take parts for a process, some of them ahead."""
        sent: collections.deque[int] = collections.deque()
        while True:
            for number in itertools.islice(self._numbers, AHEAD - len(sent)):
                with contextlib.suppress(OSError):  # it died: receiving says so
                    pipe.send(_packed(self._parts[number]))
                sent.append(number)
            if not sent:
                return
            self._fill(sent.popleft(), receive)

    def _fill(self, number: int, step: Callable[[], list[Output]]) -> None:
        try:
            self.answers[number].set_result(step())
        except BaseException as error:  # noqa: BLE001 - raised again where the outputs are waited for
            self.answers[number].set_exception(error)


class Workers:
    """A Backend over several accelerators; outputs come in the order of the samples."""

    def __init__(self, make: Make, each: Sequence[Options], *, tokens: int | None) -> None:
        """`make` opens a model with an accelerator's options, `each`; a part has up to `tokens`, or an even share.

        Raises what a worker raised while it opened its model.
        """
        context = multiprocessing.get_context("spawn")
        self._tokens = tokens
        self._pipes: list[Connection] = []
        self._processes = []
        for options in each[1:]:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, make, options), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        try:
            self._first = make(each[0])
            for pipe in self._pipes:
                self._receive(pipe)
        except BaseException:
            self._end()
            raise
        self.by_length = self._first.by_length
        self.batch_size = self._first.batch_size * len(each)
        self.labels = self._first.labels
        self.model = self._first.model

    def _receive(self, pipe: Connection) -> Any:
        try:
            answer = pipe.recv()
        except (EOFError, ConnectionError) as error:
            codes = [process.exitcode for process in self._processes]
            raise RuntimeError(f"a worker process died (exit codes {codes})") from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def versions(self) -> dict[str, str]:
        """The first one's, and how many there are."""
        return {**self._first.versions(), "workers": str(1 + len(self._pipes))}

    def predict(self, samples: Sequence[Features]) -> Iterator[Output]:
        """Whoever is free takes the next part."""
        if len(samples) == 1:
            yield from self._first.predict(samples)
            return
        share = max(1, sum(len(sample.input_ids) for sample in samples) // (1 + len(self._pipes)))
        work = _Round(list(chunks(samples, min(self._tokens or share + 512, share + 512))))
        threads = [threading.Thread(target=work.compute, args=(self._first,), daemon=True)]
        for pipe in self._pipes:
            receive = partial(self._outputs, pipe)
            threads.append(threading.Thread(target=work.exchange, args=(pipe, receive), daemon=True))
        for thread in threads:
            thread.start()
        for answer in work.answers:
            yield from answer.result()
        for thread in threads:
            thread.join()

    def _outputs(self, pipe: Connection) -> list[Output]:
        together, lengths = self._receive(pipe)
        return _cut(together, lengths)

    def close(self) -> None:
        """End the processes and the model here."""
        self._first.close()
        self._end()

    def _end(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def chunks(samples: Sequence[Features], tokens: int) -> Iterator[Sequence[Features]]:
    """Neighbouring samples of together at most `tokens`, at least one."""
    first, count = 0, 0
    for at, sample in enumerate(samples):
        if count and count + len(sample.input_ids) > tokens:
            yield samples[first:at]
            first, count = at, 0
        count += len(sample.input_ids)
    if count:
        yield samples[first:]
