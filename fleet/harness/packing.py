"""An ended unit's folder as one archive, on its way home."""

import gzip
import hashlib
import tarfile
from pathlib import Path
from typing import Any


def pack(work: Path, session_name: str, unit: str) -> dict[str, Any]:
    """An archive of an ended unit's folder: its path, size and sha256. The same folder gives the same bytes.

    What a unit lacks is missing from it, not an error here.
    """
    folder = work / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{session_name}.{unit}.tar.gz"
    source = work / "runs" / session_name / unit
    partial = path.with_suffix(".partial")
    with (
        partial.open("wb") as raw,
        gzip.GzipFile("", "wb", 1, raw, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        for file in sorted(source.rglob("*")):
            archive.add(file, arcname=f"{unit}/{file.relative_to(source).as_posix()}", recursive=False)
    partial.replace(path)
    return {"archive": str(path), "size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
