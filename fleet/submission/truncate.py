"""Shorten mlperf_log_accuracy.json the way the rules ask for, and keep its checksum.

The bytes are those of MLCommons' truncate_accuracy_log.py at b66003e1, so that either tool sees the other's work
as done: accuracy.txt gets an empty line and `hash=<sha256 of the full file>`; the log keeps its first and last
4096 bytes.
"""

import hashlib
import re
from pathlib import Path

from fleet.errors import SubmissionError

ACCURACY_LOG = "mlperf_log_accuracy.json"
ACCURACY_TEXT = "accuracy.txt"
KEEP_BYTES = 4096
"""Kept at either end; a file shorter than this stays whole."""
LIMIT_BYTES = 10 * 1024
HASH_LINE = re.compile(r"^hash=(\w+)$", re.MULTILINE)
_GAP = b"\n\n...\n\n"


def truncate(folder: Path) -> str:
    """Truncate the accuracy log in `folder`; nothing changes when that is done already.

    Returns the sha256 of the full log. Raises SubmissionError when the log or accuracy.txt is missing.
    """
    log, text = folder / ACCURACY_LOG, folder / ACCURACY_TEXT
    for path in (log, text):
        if not path.is_file():
            raise SubmissionError(f"{path.name} is missing in {folder.parent.name}", hint="run the accuracy unit again")
    size = log.stat().st_size
    done = HASH_LINE.search(text.read_text(encoding="utf-8", errors="replace"))
    if done and size < LIMIT_BYTES:
        return done[1]
    with log.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    with text.open("a", encoding="utf-8") as stream_out:
        stream_out.write(f"\nhash={digest}\n")
    if size >= KEEP_BYTES:
        _keep_ends(log, size)
    return digest


def _keep_ends(log: Path, size: int) -> None:
    with log.open("rb") as stream:
        start = stream.read(KEEP_BYTES)
        stream.seek(size - KEEP_BYTES)
        end = stream.read(KEEP_BYTES)
    partial = log.with_name(log.name + ".partial")
    partial.write_bytes(start + _GAP + end)
    partial.replace(log)
