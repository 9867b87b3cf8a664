"""A slow, lossy stretch of cable in userspace, for kernels without netem: frames from one interface to another.

    python -m tests.lab.relay LEFT RIGHT ONE_WAY_SECONDS LOSS

Runs in the network namespace of both interfaces and prints ``ready`` when it has them; until it is ended, every frame
that arrives at one leaves at the other after the time, in order, or not at all with probability LOSS. Frames that
are too long for a cable or lack their checksum must not come in: see ``network.divert``.
"""

from __future__ import annotations

import random
import selectors
import socket
import sys
import time
from collections import deque
from contextlib import suppress

_ETH_P_ALL = 0x0003
_SOL_PACKET, _PACKET_IGNORE_OUTGOING = 263, 23
_LONGEST = 65536
_QUEUE = 10_000
"""Frames that wait in one direction: a cable is not a store."""


class Direction:
    """Frames from one interface on their way to another."""

    def __init__(self, source: socket.socket, sink: socket.socket, one_way_s: float, loss: float) -> None:
        self.source = source
        self._sink = sink
        self._one_way_s = one_way_s
        self._loss = loss
        self._waiting: deque[tuple[float, bytes]] = deque(maxlen=_QUEUE)

    def receive(self) -> None:
        """Take in what has arrived."""
        # An interface that is down says so on each call: it is a cable that is out.
        with suppress(OSError):
            while True:
                frame = self.source.recv(_LONGEST)
                if random.random() >= self._loss:
                    self._waiting.append((time.monotonic() + self._one_way_s, frame))

    def send(self) -> float | None:
        """Pass on what is due; returns seconds until the next is, or None when nothing waits."""
        while self._waiting:
            due = self._waiting[0][0] - time.monotonic()
            if due > 0:
                return due
            with suppress(OSError):
                self._sink.send(self._waiting.popleft()[1])
        return None


def _opened(interface: str) -> socket.socket:
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    # What this very relay sends there must not come back.
    opened.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    opened.setblocking(False)  # noqa: FBT003 - the library's own
    opened.bind((interface, _ETH_P_ALL))
    return opened


def main(left: str, right: str, one_way_s: float, loss: float) -> None:
    """Relay both ways until the process is ended."""
    ends = _opened(left), _opened(right)
    directions = [Direction(a, b, one_way_s, loss) for a, b in (ends, ends[::-1])]
    selector = selectors.DefaultSelector()
    for direction in directions:
        selector.register(direction.source, selectors.EVENT_READ, direction)
    print("ready", flush=True)
    while True:
        pauses = [pause for direction in directions if (pause := direction.send()) is not None]
        for key, _ in selector.select(min(pauses, default=None)):
            key.data.receive()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
