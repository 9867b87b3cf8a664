"""Whether LoadGen's logs end where LoadGen ends them: a full disk cuts them off without a word from it."""

import json
import os
import re
from pathlib import Path

from fleet.harness import reasons
from fleet.harness.contract import Mode, Reason
from fleet.harness.reasons import UnitError

_TAIL_BYTES = 64 * 1024
_LAST_KEY = {Mode.PERFORMANCE: "num_errors", Mode.ACCURACY: "power_end"}
"""What LoadGen 6.0 writes last into mlperf_log_detail.txt."""
_LAST_LINE = re.compile(rb"(no|\d+) errors? encountered[^\n]*\n\Z", re.IGNORECASE)
_LEFT_BYTES = 64 * 1024
"""Who cannot write as much has a full disk."""


def check(folder: Path, mode: Mode) -> None:
    """Have the logs of a test that has ended in `folder` on the disk, whole.

    Raises UnitError with NO_SPACE or CORRUPT_FILES where one ends in the middle, and OSError.
    """
    for path in sorted(folder.glob("mlperf_log_*")):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    for name, whole in (
        ("mlperf_log_summary.txt", lambda tail: _LAST_LINE.search(tail) is not None),
        ("mlperf_log_detail.txt", lambda tail: _last_key(tail) == _LAST_KEY[mode]),
        ("mlperf_log_accuracy.json", lambda tail: tail.rstrip().endswith(b"]")),
    ):
        if not whole(_tail(folder / name)):
            cause, reason = ("the disk is full", Reason.NO_SPACE) if _is_full(folder) else ("", Reason.CORRUPT_FILES)
            raise UnitError(f"{name} ends in the middle{cause and ': '}{cause}", reason)


def _tail(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return stream.read()
    except FileNotFoundError:
        return b""


def _last_key(tail: bytes) -> str:
    *_, last = tail.splitlines() or [b""]
    if not tail.endswith(b"\n"):
        return ""
    try:
        return str(json.loads(last.removeprefix(b":::MLLOG"))["key"])
    except (ValueError, KeyError, TypeError):
        return ""


def _is_full(folder: Path) -> bool:
    path = folder / "space.partial"
    try:
        path.write_bytes(os.urandom(_LEFT_BYTES))
    except OSError as error:
        return reasons.no_space(error)
    finally:
        path.unlink(missing_ok=True)
    return False
