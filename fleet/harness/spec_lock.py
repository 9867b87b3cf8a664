"""RunSpec.lock held against what is here: a number is only worth as much as what it was measured with."""

import importlib.metadata
import platform
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from fleet.harness import accelerators, processes
from fleet.harness.contract import INSTANCE_TYPE, Reason
from fleet.harness.interfaces import Benchmark
from fleet.harness.probes import ProbeError
from fleet.harness.reasons import UnitError

WHEEL = "wheel:"
WEIGHTS = "weights"


def verify(lock: dict[str, str]) -> None:
    """Hold everything of the lock but weights and instance type against this environment and machine.

    Raises UnitError, LOCK_CHANGED, that names the first difference.
    """
    for name, wanted in sorted(lock.items()):
        if name not in {WEIGHTS, INSTANCE_TYPE} and (found := here(name)) != wanted:
            raise _changed(name, wanted, found)


def verify_weights(lock: dict[str, str], benchmark: Benchmark) -> None:
    """Hold the lock's weights against those that the benchmark was prepared with. Raises UnitError, LOCK_CHANGED."""
    if (wanted := lock.get(WEIGHTS)) and (found := benchmark.model.get("weights_sha256", "")) != wanted:
        raise _changed(WEIGHTS, wanted[:12], found[:12])


def here(name: str) -> str:
    """One value of the lock as it is on this host; empty for what is not there or not known."""
    if name.startswith(WHEEL):
        return _version(name.removeprefix(WHEEL))
    question = _QUESTIONS.get(name)
    return question() if question is not None else ""


def _changed(name: str, wanted: str, found: str) -> UnitError:
    return UnitError(
        f"{name} is {found or 'not known'} here, it was planned with {wanted}: fleet bench plans anew",
        Reason.LOCK_CHANGED,
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@cache
def _gpus() -> accelerators.Gpus:
    try:
        return accelerators.read()
    except ProbeError:
        return accelerators.Gpus()


_QUESTIONS: dict[str, Callable[[], str]] = {
    # Both are folders named by their digests: what preflight's stamps say.
    "fleet": lambda: Path(processes.entry()).name,
    "environment": lambda: Path(sys.prefix).resolve().name,
    "python": platform.python_version,
    "driver": lambda: _gpus().driver_version,
    "cuda": lambda: _gpus().cuda_version,
}
