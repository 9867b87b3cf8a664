"""A host in a folder: real supervisors, and a stand-in for the harness's own entry that does what a unit says."""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fleet.harness import unit_queue
from fleet.harness.contract import RunSpec, UnitState, UnitStatus
from tests.unit.harness.units import TOP, spec

# Started as `python FOLDER verb …`, as the harness is; `run` does what the unit's user_conf says.
ENTRY = f"""
import os, sys, subprocess, time
from pathlib import Path
sys.path.insert(0, {str(TOP)!r})
from fleet.harness import packing, processes, spot, supervise, unit_queue
from fleet.harness import accelerator_locks, processes, unit_queue
supervise.BEAT_SECONDS, processes.GRACE_SECONDS, spot.ASK_SECONDS = 0.05, 1.0, 0.1
# Other tests on this machine have names of their own.
accelerator_locks._PREFIX = "mlperf-fleet test of " + sys.argv[0]
verb, *rest = sys.argv[1:]
if verb == "guard":
    processes.guard(int(rest[0]))
    sys.exit()
if verb == "supervise":
    with open(Path(rest[0], "pids"), "a") as notes:
        notes.write(f"{{os.getpid()}}\\n")
    sys.exit(supervise.supervise(Path(rest[0]), rest[1]))
processes.end_with_supervisor()
from fleet.harness.contract import read_spec, write_json
folder = Path(rest[0])
spec = read_spec(folder / "run_spec.json")
with open(Path(spec.work_dir, "pids"), "a") as notes:
    notes.write(f"{{os.getpid()}}\\n")
with open(Path(spec.work_dir, "order"), "a") as order:
    order.write(f"+{{spec.unit}}\\n")
(folder / "progress").write_text('{{"samples_done": 7, "left_s": 90.0}}')
exec(spec.user_conf)
with open(Path(spec.work_dir, "order"), "a") as order:
    order.write(f"-{{spec.unit}}\\n")
write_json(folder / "manifest.json", {{}})
"""

CHILD = "child = subprocess.Popen(['sleep', '60']); Path(spec.work_dir, 'pids').open('a').write(f'{child.pid}\\n')\n"
WAIT_FOR_GO = "while not Path(spec.work_dir, 'go').exists(): time.sleep(0.02)"


@contextmanager
def host(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A work folder whose supervisors run ENTRY; what they started and noted is ended afterwards."""
    entry = base / "entry"
    entry.mkdir()
    (entry / "__main__.py").write_text(ENTRY, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(entry)])
    folder = base / "work"
    folder.mkdir()
    yield folder
    for pid in pids(folder):
        if ours(pid, base):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def pids(work: Path) -> list[int]:
    notes = work / "pids"
    return [int(line) for line in notes.read_text(encoding="ascii").split()] if notes.is_file() else []


def ours(pid: int, folder: Path) -> bool:
    """Whether a noted pid is still a process of this test and not somebody else's of the same number."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2][0]
    except OSError:
        return False
    return state != "Z" and (str(folder) in line or line.startswith("sleep\0"))


def unit(work: Path, name: str, does: str = "", **more: Any) -> RunSpec:
    return spec(name, work_dir=str(work), user_conf=does, **more)


def status(work: Path, name: str) -> UnitStatus:
    found = unit_queue.read_status(work / "runs" / "s" / name)
    assert found is not None
    return found


def wait(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def ended(work: Path, *names: str) -> Callable[[], bool]:
    return lambda: all(status(work, name).state.ended for name in names)


def running(work: Path, name: str) -> Callable[[], bool]:
    return lambda: status(work, name).samples_done == 7 and status(work, name).state is UnitState.RUNNING


def idle(work: Path) -> Callable[[], bool]:
    """No noted process is left, supervisors included."""
    return lambda: not [pid for pid in pids(work) if ours(pid, work.parent)]


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Meanwhile this process cannot write a file anew; what it has started can."""

    real = Path.open

    def refuse(path: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if "w" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, mode, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        yield


def lines(work: Path) -> list[str]:
    return (work / "order").read_text(encoding="ascii").split()


def owner(work: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((work / "supervisor.lock").read_text(encoding="utf-8"))
    return found
