"""Weights and data of a benchmark in the host's assets folder: made once per harness version, then left alone."""

import importlib
import json
from pathlib import Path
from typing import Any

from fleet.harness.contract import write_json


def prepare(work: Path, name: str, module: str, digest: str) -> bool:
    """Prepare benchmark `name`; True when anything had to be done.

    The stamp `.complete`, JSON with the harness's `digest` and the weights' sha256 as `weights`, is written last.
    Raises ValueError when what was made is not what the benchmark expects.
    """
    folder = work / "assets" / name
    stamp = folder / ".complete"
    if read_stamp(stamp).get("digest") == digest:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    benchmark = importlib.import_module(f"fleet.harness.benchmarks.{module}")
    benchmark.prepare(name, folder)
    write_json(stamp, {"digest": digest, "weights": _weights(benchmark, name, folder)})
    return True


def read_stamp(stamp: Path) -> dict[str, str]:
    """`digest` and `weights` of a stamp; empty when there is none. Older harnesses wrote the digest alone."""
    try:
        text = stamp.read_text(encoding="utf-8").strip()
    except OSError:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        return {"digest": text}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {"digest": text}


def _weights(benchmark: Any, name: str, folder: Path) -> str:
    """sha256 of the weights that were prepared, as measurements.json will say it; empty where there are none."""
    return str(benchmark.open(name, folder).model.get("weights_sha256", ""))
