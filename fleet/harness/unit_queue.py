"""A session's queue of units on a host: what is to run, and what became of it.

WORK/runs/<session>/queue.json       units in order
WORK/runs/<session>/cancel           exists when the session's units are to stop
WORK/runs/<session>/reserve          space for last words, freed when the disk is full
WORK/runs/<session>/<unit>/          run_spec.json, status.json, progress, LoadGen's logs, manifest.json
WORK/runs/<session>/<unit>/cancel    exists when this unit is to stop
WORK/runs/<session>/<unit>/home      exists when the controller has the unit's files, verified
WORK/runs/<session>/.earlier/        measured by an older spec, and not home when the unit started over
"""

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fleet.harness import detach, processes, space
from fleet.harness.contract import Reason, UnitState, UnitStatus, read_spec, write_json

END_SECONDS = 12.0
"""For so long a running unit may take to end when it is asked to; then its processes are killed from here."""
ASK_SECONDS = 0.1


def start(work: Path, queue: dict[str, Any]) -> dict[str, Any]:
    """Take `queue` = {"session": …, "specs": […]} and see that a supervisor works on it.

    A unit that is done, queued or running by the same spec is left alone, and any other, ended first if it still
    runs, starts over in a fresh folder. Returns unit names under `queued`, `kept` and `running`, and under `refused`
    those for which the disk had no room, each with the cause: the others do not suffer for it.
    """
    session = work / "runs" / str(queue["session"])
    session.mkdir(parents=True, exist_ok=True)
    processes.end_orphans()
    answer: dict[str, Any] = {"queued": [], "kept": [], "running": [], "refused": {}}
    with locked(session / "queue.lock"):
        space.reserve(session)
        (session / "cancel").unlink(missing_ok=True)
        settle(work, session)
        specs = {str(data["unit"]): data for data in queue["specs"]}
        answer["refused"] = _put_in_order(session, list(specs))
        for unit, data in specs.items():
            if unit in answer["refused"]:
                continue
            try:
                answer[_take(session, unit, data)].append(unit)
            except OSError as error:
                answer["refused"][unit] = str(error)
    if answer["queued"] or answer["running"]:
        # Always a further supervisor: it waits for the lock, and finds nothing to do if the one before saw everything.
        detach.supervisor(work, session)
    return answer


def _put_in_order(session: Path, units: list[str]) -> dict[str, str]:
    """Move `units` to the end of the queue; those that cannot get into it, with the cause.

    A name without a unit behind it is passed over; a queued unit without its name would never run.
    """
    before = read_order(session)
    order = [name for name in before if name not in units] + units
    if order == before:
        return {}
    try:
        space.write(session / "queue.json", order, session)
    except OSError as error:
        return {unit: str(error) for unit in units if unit not in before}
    return {}


def settle(work: Path, session: Path, *, alone: bool = False) -> None:
    """Give an end to units that are marked as running and that nobody runs any more.

    What has its manifest is done: its supervisor died before it could say so. `alone` when the caller is this
    session's supervisor, about to run its first unit.
    """
    if not alone and processes.supervised(work, session.name):
        return
    for name in read_order(session):
        folder = session / name
        status = read_status(folder)
        measured = (folder / "manifest.json").is_file()
        if status is None and measured:
            status = UnitStatus(unit=name, state=UnitState.RUNNING, boot_id=processes.boot_id())
        if status is None or status.state is not UnitState.RUNNING:
            continue
        if measured:
            end(folder, status, UnitState.DONE)
        elif status.boot_id != processes.boot_id():
            end(folder, status, UnitState.INTERRUPTED, "the host was rebooted", Reason.INTERRUPTED)
        else:
            end(folder, status, UnitState.FAILED, "its supervisor died", Reason.SUPERVISOR_DIED)


def end(
    folder: Path, status: UnitStatus, state: UnitState, cause: str = "", reason: Reason = Reason.NONE
) -> UnitStatus:
    """Write a unit's last status, even on a full disk. Raises OSError when not even the reserve helps."""
    ended = replace(
        status, state=state, cause=cause[:500], reason=reason, ended_at=time.time(), beat_uptime=processes.uptime()
    )
    space.write(folder / "status.json", ended, folder.parent)
    return ended


def _take(session: Path, unit: str, data: dict[str, Any]) -> str:
    folder = session / unit
    status = read_status(folder)
    text = json.dumps(data, indent=1, sort_keys=True) + "\n"
    if status is not None:
        same = _digest(folder / "run_spec.json") == hashlib.sha256(text.encode()).hexdigest()
        if same and status.state is UnitState.DONE and (folder / "manifest.json").is_file():
            return "kept"
        if same and status.state is UnitState.QUEUED:
            (folder / "cancel").unlink(missing_ok=True)
            now = time.time()
            queued = replace(status, heartbeat_at=now, beat_uptime=processes.uptime(), boot_id=processes.boot_id())
            space.write(folder / "status.json", queued, session)
            return "queued"
        if status.state is UnitState.RUNNING:
            if same:
                return "running"
            _end_running(folder)
    _clear(folder)
    folder.mkdir()
    (folder / "run_spec.json").write_text(text, encoding="utf-8")
    spec = read_spec(folder / "run_spec.json")
    queued = UnitStatus(
        unit=unit, state=UnitState.QUEUED, expected_s=spec.expected_s, heartbeat_at=time.time(),
        beat_uptime=processes.uptime(), boot_id=processes.boot_id(),
    )  # fmt: skip
    write_json(folder / "status.json", queued)
    return "queued"


def _clear(folder: Path) -> None:
    """Make room for a unit that starts over. What was measured and is not home is kept aside."""
    if not folder.exists():
        return
    if (folder / "manifest.json").is_file() and not (folder / "home").exists():
        aside = folder.parent / ".earlier"
        aside.mkdir(exist_ok=True)
        number = 1 + sum(1 for _ in aside.glob(f"{folder.name}.*"))
        folder.replace(aside / f"{folder.name}.{number}")
    else:
        shutil.rmtree(folder)


def _end_running(folder: Path) -> UnitStatus | None:
    """Have a running unit ended by its supervisor, and where that does not do it, from here; its last status."""
    touch(folder / "cancel")
    until = time.monotonic() + END_SECONDS
    while (status := read_status(folder)) is not None and not status.state.ended:
        if time.monotonic() > until or not processes.supervised(folder.parents[2], folder.parent.name):
            processes.end_unit(folder)
            if (folder / "manifest.json").is_file():
                return end(folder, status, UnitState.DONE)
            return end(folder, status, UnitState.INTERRUPTED, "cancelled", Reason.CANCELLED)
        time.sleep(ASK_SECONDS)
    return status


def touch(path: Path) -> None:
    """Make a marker in a session or a unit; a full disk gives its reserve for it."""
    session = next(parent for parent in path.parents if parent.parent.name == "runs")
    try:
        path.touch()
    except OSError:
        (session / "reserve").unlink(missing_ok=True)
        path.touch()


def read_status(folder: Path) -> UnitStatus | None:
    """A unit's status, or None when there is none that can be read."""
    try:
        data = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        state, reason = UnitState(data["state"]), Reason(data.get("reason", ""))
        return UnitStatus(**{**data, "state": state, "reason": reason})
    except (OSError, ValueError, TypeError, KeyError):
        return None


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


def cancel(work: Path, session_name: str, units: Sequence[str] = ()) -> dict[str, str]:
    """End these units of a session, or all of it, queued or running, with all their processes.

    Returns each unit's state then; a unit that had ended keeps its own. Unknown units are left out.
    """
    session = work / "runs" / session_name
    if not session.is_dir():
        return {}
    running = []
    with locked(session / "queue.lock"):
        if not units:
            # For units of a supervisor that is only about to see the queue.
            touch(session / "cancel")
        settle(work, session)
        names = [name for name in read_order(session) if name in units or not units]
        for name in names:
            status = read_status(session / name)
            if status is not None and status.state is UnitState.QUEUED:
                end(session / name, status, UnitState.INTERRUPTED, "cancelled", Reason.CANCELLED)
            elif status is not None and status.state is UnitState.RUNNING:
                running.append(name)
    # There is one at the most, but for what a supervisor is about to mark.
    for name in running:
        _end_running(session / name)
    processes.end_orphans()
    return {name: status.state.value for name in names if (status := read_status(session / name)) is not None}


def home(work: Path, session_name: str, units: Sequence[str]) -> list[str]:
    """Note that the controller has these units' files, verified: only then may they ever be deleted here.

    Returns those that are on this host and have ended.
    """
    session = work / "runs" / session_name
    known = []
    for unit in units:
        status = read_status(session / unit) if unit in read_order(session) else None
        if status is not None and status.state.ended:
            touch(session / unit / "home")
            known.append(unit)
    return known
