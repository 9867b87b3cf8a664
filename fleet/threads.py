"""Threads that nobody waits for: a host that is silent holds neither another one nor Ctrl-C.

A concurrent.futures pool does both: silent hosts fill it, and Python joins its threads before it ends.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def start(work: Callable[[], object], name: str = "") -> None:
    """Run `work` in a thread of its own, which ends with the process at the latest."""
    threading.Thread(target=work, name=name or None, daemon=True).start()


def each(work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Run `work` on all items side by side, a thread for each; every item with its answer, as they come.

    Raises what `work` raised, as soon as it did.
    """
    ended: queue.SimpleQueue[tuple[T, R | None, BaseException | None]] = queue.SimpleQueue()

    def one(item: T) -> None:
        try:
            answer = work(item)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that asked
            ended.put((item, None, error))
        else:
            ended.put((item, answer, None))

    listed = list(items)
    for item in listed:
        start(lambda item=item: one(item))  # type: ignore[misc]
    for _ in listed:
        item, answer, error = ended.get()
        if error is not None:
            raise error
        yield item, answer  # type: ignore[misc]  # an answer wherever there is no error
