"""One process per accelerator behind one LoadGen: each has a whole model, and takes the next chunk when it is free."""

import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from fleet.harness.interfaces import Backend, Features, Options, Output

CHUNK_TOKENS = 65_536
"""The most that a worker is sent at once: it cuts it to its own size, and the others are not kept waiting."""
Make = Callable[[Options], Backend]


def _serve(pipe: Connection, make: Make, options: Options) -> None:
    """A worker's life: open the model, answer chunks until the pipe closes."""
    try:
        backend = make(options)
        pipe.send({"labels": backend.labels, "model": backend.model, "versions": backend.versions()})
    except Exception as error:  # noqa: BLE001 - whatever it was, the parent must learn it
        pipe.send(error)
        return
    while True:
        try:
            samples = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send([np.array(output) for output in backend.predict(samples)])
        except Exception as error:  # noqa: BLE001 - likewise
            pipe.send(error)


class Workers:
    """A Backend over several processes; outputs come in the order of the samples."""

    by_length = True

    def __init__(self, make: Make, each: Sequence[Options], *, batch_size: int) -> None:
        """`make` opens a model with a worker's options, `each`; `batch_size` is what one of them is given at once.

        Raises what a worker raised while it opened its model.
        """
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for options in each:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, make, options), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        try:
            told = [self._receive(pipe) for pipe in self._pipes]
        except BaseException:
            self.close()
            raise
        self.batch_size = batch_size * len(each)
        self.labels: tuple[str, ...] = told[0]["labels"]
        self.model: dict[str, str] = told[0]["model"]
        self._versions = {**told[0]["versions"], "workers": str(len(each))}

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
        """The first worker's, and how many there are."""
        return self._versions

    def predict(self, samples: Sequence[Features]) -> Iterator[Output]:
        """Whatever worker is free takes the next chunk."""
        from fleet.harness.backends.pytorch import chunks

        share = max(1, sum(len(sample.input_ids) for sample in samples) // len(self._pipes))
        parts = list(chunks(samples, min(CHUNK_TOKENS, share + 512)))
        answers: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in parts]
        numbers = iter(range(len(parts)))
        lock = threading.Lock()

        def work(pipe: Connection) -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                try:
                    pipe.send(parts[number])
                    answers[number].put(self._receive(pipe))
                except BaseException as error:  # noqa: BLE001 - raised again where the outputs are waited for
                    answers[number].put(error)

        threads = [threading.Thread(target=work, args=(pipe,), daemon=True) for pipe in self._pipes]
        for thread in threads:
            thread.start()
        for answer in answers:
            outputs = answer.get()
            if isinstance(outputs, BaseException):
                raise outputs
            yield from outputs
        for thread in threads:
            thread.join()

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
