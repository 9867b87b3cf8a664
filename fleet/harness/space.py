"""Writing what must be said even on a full disk: a reserve that is freed for it, and blocks that are there already."""

import contextlib
import os
from pathlib import Path
from typing import Any

from fleet.harness import reasons
from fleet.harness.contract import to_json, write_json

RESERVE_BYTES = 256 * 1024
_ONE_BLOCK = 4096


def reserve(session: Path) -> None:
    """Keep some space for the session's last words; a disk that has none to give is no error here."""
    path = session / "reserve"
    with contextlib.suppress(OSError):
        if path.is_file() and path.stat().st_size == RESERVE_BYTES:
            return
        partial = path.with_name("reserve.partial")
        try:
            # Random, for some file systems would compress anything else to nothing.
            partial.write_bytes(os.urandom(RESERVE_BYTES))
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def write(path: Path, value: Any, session: Path) -> None:
    """As write_json; on a full disk over the file's own blocks, or by what freeing the session's reserve gives.

    Raises OSError when that is not enough either.
    """
    try:
        write_json(path, value)
    except OSError as error:
        if not reasons.no_space(error):
            raise
        if not _write_over(path, to_json(value)):
            (session / "reserve").unlink(missing_ok=True)
            write_json(path, value)


def write_over_or_new(path: Path, value: Any) -> None:
    """As `write`, for what is written again in a second: the reserve is not for that. Raises OSError."""
    try:
        write_json(path, value)
    except OSError as error:
        if not reasons.no_space(error) or not _write_over(path, to_json(value)):
            raise


def _write_over(path: Path, text: str) -> bool:
    """Put the text into the file as it lies there, in one write within one block; False when that cannot be."""
    data = text.encode()
    with contextlib.suppress(OSError), path.open("r+b", buffering=0) as stream:
        # Space is white in JSON: so the file can shrink without a moment in which it is half of each.
        padded = data.ljust(os.fstat(stream.fileno()).st_size)
        if len(padded) <= _ONE_BLOCK and stream.write(padded) == len(padded):
            os.fsync(stream.fileno())
            return True
    return False
