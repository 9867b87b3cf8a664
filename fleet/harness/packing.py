"""An ended unit's folder as one archive, on its way home. It is never written down: a full disk can be collected."""

import gzip
import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

LEFT_HERE = frozenset({"cancel", "home"})
"""Markers that come and go after the unit has ended: with them the bytes would not stay the same."""


class _Counting(io.RawIOBase):
    """Passes on what comes after the first `skip` bytes, and knows the size and sha256 of all."""

    def __init__(self, sink: BinaryIO | None = None, skip: int = 0) -> None:
        self._sink = sink
        self._skip = skip
        self._digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        block = bytes(data)
        self._digest.update(block)
        if self._sink is not None and self.size + len(block) > self._skip:
            self._sink.write(block[max(0, self._skip - self.size) :])
        self.size += len(block)
        return len(block)

    @property
    def sha256(self) -> str:
        """Hex digest of what was written so far."""
        return self._digest.hexdigest()


def pack(work: Path, session: str, unit: str) -> dict[str, Any]:
    """Size and sha256 of the archive that `send` makes of an ended unit's folder."""
    archive = _Counting()
    _write(work / "runs" / session / unit, archive)
    return {"size": archive.size, "sha256": archive.sha256}


def send(work: Path, session: str, unit: str, offset: int, sink: BinaryIO) -> None:
    """Write the archive into `sink`, without its first `offset` bytes. The same folder gives the same bytes.

    What a unit lacks is missing from it, not an error here.
    """
    _write(work / "runs" / session / unit, _Counting(sink, offset))
    sink.flush()


def _write(source: Path, stream: _Counting) -> None:
    with (
        gzip.GzipFile("", "wb", 1, stream, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for file in sorted(source.rglob("*")):
            if file.parent != source or (file.name not in LEFT_HERE and not file.name.endswith(".partial")):
                archive.add(file, arcname=f"{source.name}/{file.relative_to(source).as_posix()}", recursive=False)
