"""A session's queue of units on a host: what is to run, and what became of it.

WORK/runs/<session>/queue.json     units in order
WORK/runs/<session>/cancel         exists when the session's units are to stop
WORK/runs/<session>/<unit>/        run_spec.json, status.json, progress, LoadGen's logs, manifest.json
"""

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fleet.harness import processes
from fleet.harness.contract import UnitState, UnitStatus, read_spec, write_json
from fleet.harness.processes import boot_id

FRESH_SECONDS = 30.0
"""A running unit whose status is older has lost its supervisor."""
END_SECONDS = 30.0
"""For so long `start` waits for a running unit that is to start over."""
ASK_SECONDS = 0.25


def start(work: Path, queue: dict[str, Any]) -> dict[str, list[str]]:
    """Take `queue` = {"session": …, "specs": […]} and see that a supervisor works on it.

    A unit that is done, queued or running by the same spec is left alone, and any other, ended first if it still
    runs, starts over in a fresh folder. Returns unit names under `queued`, `kept` and `running`.
    """
    session = work / "runs" / str(queue["session"])
    session.mkdir(parents=True, exist_ok=True)
    answer: dict[str, list[str]] = {"queued": [], "kept": [], "running": []}
    with locked(session / "queue.lock"):
        (session / "cancel").unlink(missing_ok=True)
        order = read_order(session)
        for data in queue["specs"]:
            unit = str(data["unit"])
            answer[_take(session, unit, data)].append(unit)
            order = [name for name in order if name != unit] + [unit]
        write_json(session / "queue.json", order)
    if answer["queued"] or answer["running"]:
        # Always a further supervisor: it waits for the lock, and finds nothing to do if the one before saw everything.
        with (session / "supervisor.log").open("ab") as log:
            subprocess.Popen(
                [sys.executable, processes.entry(), "supervise", str(work), str(queue["session"])],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, close_fds=True, cwd="/",
            )  # fmt: skip
    return answer


def _take(session: Path, unit: str, data: dict[str, Any]) -> str:
    folder = session / unit
    status = read_status(folder)
    text = json.dumps(data, indent=1, sort_keys=True) + "\n"
    if status is not None:
        same = _digest(folder / "run_spec.json") == hashlib.sha256(text.encode()).hexdigest()
        if same and status.state is UnitState.DONE and (folder / "manifest.json").is_file():
            return "kept"
        if same and status.state is UnitState.QUEUED:
            write_json(folder / "status.json", replace(status, heartbeat_at=time.time(), boot_id=boot_id()))
            return "queued"
        if status.state is UnitState.RUNNING and _alive(status):
            if same:
                return "running"
            _end_running(folder)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    (folder / "run_spec.json").write_text(text, encoding="utf-8")
    spec = read_spec(folder / "run_spec.json")
    queued = UnitStatus(
        unit=unit, state=UnitState.QUEUED, expected_s=spec.expected_s, heartbeat_at=time.time(), boot_id=boot_id()
    )
    write_json(folder / "status.json", queued)
    return "queued"


def _end_running(folder: Path) -> None:
    """Ask the supervisor to end a unit that runs by an older spec, and wait for it.

    Raises TimeoutError when it does not end.
    """
    (folder / "cancel").touch()
    end = time.monotonic() + END_SECONDS
    while (status := read_status(folder)) is not None and not status.state.ended and _alive(status):
        if time.monotonic() > end:
            raise TimeoutError(f"{folder.name}: its earlier run does not end")
        time.sleep(ASK_SECONDS)


def read_status(folder: Path) -> UnitStatus | None:
    """A unit's status, or None when there is none that can be read."""
    try:
        data = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        return UnitStatus(**{**data, "state": UnitState(data["state"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _alive(status: UnitStatus) -> bool:
    """Whether a supervisor of this boot still writes the status."""
    fresh = status.heartbeat_at is not None and time.time() - status.heartbeat_at < FRESH_SECONDS
    return fresh and status.boot_id == boot_id()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an flock; it goes with the process, however it ends."""
    with path.open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def read_order(session: Path) -> list[str]:
    """The session's units by name, in order; none when the list cannot be read."""
    try:
        return [str(name) for name in json.loads((session / "queue.json").read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        return []


def cancel(work: Path, session_name: str) -> bool:
    """Ask a session's supervisor to stop; False when the session is not known here."""
    session = work / "runs" / session_name
    if not session.is_dir():
        return False
    (session / "cancel").touch()
    return True
