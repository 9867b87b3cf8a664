"""Weights and data of a benchmark in the host's assets folder: made once per harness version, then left alone."""

import importlib
from pathlib import Path


def prepare(work: Path, name: str, module: str, digest: str) -> bool:
    """Prepare benchmark `name`; True when anything had to be done.

    The stamp `.complete` holds the harness's digest and is written last.
    Raises ValueError when what was made is not what the benchmark expects.
    """
    folder = work / "assets" / name
    stamp = folder / ".complete"
    if stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == digest:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    importlib.import_module(f"fleet.harness.benchmarks.{module}").prepare(name, folder)
    partial = stamp.with_name(".complete.partial")
    partial.write_text(digest + "\n", encoding="utf-8")
    partial.replace(stamp)
    return True
