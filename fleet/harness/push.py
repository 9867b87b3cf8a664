"""An ended unit's archive, put into a bucket by an address that lets whoever has it do so.

The address is a secret: it comes on standard input, and no word that is said here repeats it.
"""

import base64
import hashlib
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fleet.harness import packing

TRIES, PAUSE_S = 3, 2.0
TIMEOUT_S = 30.0
"""So long the bucket may say nothing."""
LIMIT_S = 1500.0
"""No try begins later."""
_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,60})</Code>")
_PASSING = frozenset({408, 429, 500, 502, 503, 504})


class PushError(ValueError):
    """It was not put there, in words for people."""


class _PassingError(PushError):
    """It may be tried again."""


def push(work: Path, session: str, unit: str, told: dict[str, Any]) -> dict[str, Any]:
    """Put the archive there: `told` has its `address`, and `size` and `sha256` as `pack` has said them.

    Raises PushError.
    """
    try:
        address, size, sha256 = str(told["address"]), int(told["size"]), bytes.fromhex(told["sha256"])
    except (KeyError, TypeError, ValueError):
        raise PushError("it was not told what to put where") from None
    until = time.monotonic() + LIMIT_S
    for number in range(1, TRIES + 1):
        try:
            with _archive(work, session, unit) as source:
                _put(address, _Exactly(source, size, sha256), size, sha256)
        except _PassingError:
            if number == TRIES or time.monotonic() > until:
                raise
            time.sleep(PAUSE_S * number)
        else:
            return {"pushed": size}
    raise AssertionError  # The loop ends by returning or raising.


@contextmanager
def _archive(work: Path, session: str, unit: str) -> Iterator[BinaryIO]:
    """The archive to be read as it is made: urllib reads, and tarfile only writes."""
    reader, writer = os.pipe()

    def fill() -> None:
        # Who reads no more, or files that cannot be read: it is too short then, and that is seen where it is read.
        with suppress(OSError), os.fdopen(writer, "wb") as sink:
            packing.send(work, session, unit, 0, sink)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        with os.fdopen(reader, "rb") as source:
            yield source
    finally:
        thread.join()


class _Exactly:
    """Passes on what was announced, and its last bytes only when all of it is: else nothing comes to lie in the bucket."""

    def __init__(self, source: BinaryIO, size: int, sha256: bytes) -> None:
        self._source, self._left, self._sha256 = source, size, sha256
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes. Raises PushError when the files are not those that were announced."""
        if not self._left:
            return b""
        data = self._source.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        self._digest.update(data)
        if not data or (not self._left and (self._digest.digest() != self._sha256 or self._source.read(1))):
            raise PushError("its files have changed since they were packed")
        return data


def _put(address: str, source: _Exactly, size: int, sha256: bytes) -> None:
    headers = {
        "Content-Length": str(size),
        "Content-Type": "application/octet-stream",
        "x-amz-checksum-sha256": base64.b64encode(sha256).decode(),
    }
    try:
        request = urllib.request.Request(address, data=source, method="PUT", headers=headers)  # noqa: S310 - the controller made it
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):  # noqa: S310 - as above
            return
    except PushError:
        raise
    except urllib.error.HTTPError as error:
        found = None
        with suppress(OSError):
            found = _CODE.search(error.read(4096))
        word = f" {found[1].decode()}" if found else ""
        kind = _PassingError if error.code in _PASSING else PushError
        raise kind(f"the bucket said {error.code}{word}") from None
    except OSError as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        words = reason.strerror if isinstance(reason, OSError) else None
        raise _PassingError(f"the bucket cannot be reached: {words or type(reason).__name__}") from None
    except Exception as error:  # noqa: BLE001 - whatever it is, its words may repeat the address
        raise PushError(f"the bucket cannot be reached: {type(error).__name__}") from None
