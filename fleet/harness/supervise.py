"""Units on a host belong to a supervisor in a session of its own: the controller may come and go.

WORK/supervisor.lock               held while a supervisor runs units: never two at once on a host
WORK/runs/<session>/queue.json     units in order
WORK/runs/<session>/cancel         exists when the session's units are to stop
WORK/runs/<session>/<unit>/        run_spec.json, status.json, progress, LoadGen's logs, manifest.json
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from fleet.harness.contract import RunSpec, UnitState, UnitStatus, read_spec, write_json

BEAT_SECONDS = 1.0
GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""


class _Stopped(Exception):  # noqa: N818 - a wish, not a mistake
    """The supervisor was asked to stop by a signal."""


def boot_id() -> str:
    """The kernel's id of this boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def start(work: Path, queue: dict[str, Any]) -> dict[str, list[str]]:
    """Take `queue` = {"session": …, "specs": […]} and see that a supervisor works on it.

    A unit that is done by the same spec is kept, one that is queued or running is left alone, and any other
    starts over in a fresh folder. Returns unit names under `queued`, `kept` and `running`.
    """
    session = work / "runs" / str(queue["session"])
    session.mkdir(parents=True, exist_ok=True)
    answer: dict[str, list[str]] = {"queued": [], "kept": [], "running": []}
    with _locked(session / "queue.lock"):
        (session / "cancel").unlink(missing_ok=True)
        order = _read_order(session)
        for data in queue["specs"]:
            unit = str(data["unit"])
            answer[_take(session, unit, data)].append(unit)
            order = [name for name in order if name != unit] + [unit]
        write_json(session / "queue.json", order)
    if answer["queued"] or answer["running"]:
        # Always a further supervisor: it waits for the lock, and finds nothing to do if the one before saw everything.
        with (session / "supervisor.log").open("ab") as log:
            subprocess.Popen(
                [sys.executable, _entry(), "supervise", str(work), str(queue["session"])],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, close_fds=True, cwd="/",
            )  # fmt: skip
    return answer


def _entry() -> str:
    """The harness as started, its links resolved: a later provision must not swap the code under a running session."""
    return (
        str(Path(sys.argv[0]).resolve()) if Path(sys.argv[0]).is_dir() else str(Path(__file__).with_name("__main__.py"))
    )


def _take(session: Path, unit: str, data: dict[str, Any]) -> str:
    folder = session / unit
    status = read_status(folder)
    text = json.dumps(data, indent=1, sort_keys=True) + "\n"
    if status is not None:
        same = _digest(folder / "run_spec.json") == hashlib.sha256(text.encode()).hexdigest()
        if status.state is UnitState.DONE and same and (folder / "manifest.json").is_file():
            return "kept"
        if status.state is UnitState.RUNNING and _alive(status):
            return "running"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    (folder / "run_spec.json").write_text(text, encoding="utf-8")
    spec = read_spec(folder / "run_spec.json")
    write_json(folder / "status.json", UnitStatus(unit=unit, state=UnitState.QUEUED, expected_s=spec.expected_s))
    return "queued"


def read_status(folder: Path) -> UnitStatus | None:
    """A unit's status, or None when there is none that can be read."""
    try:
        data = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        return UnitStatus(**{**data, "state": UnitState(data["state"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _alive(status: UnitStatus) -> bool:
    """Whether a supervisor of this boot still writes the status."""
    fresh = status.heartbeat_at is not None and time.time() - status.heartbeat_at < 30 * BEAT_SECONDS
    return fresh and status.boot_id == boot_id()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an flock; it goes with the process, however it ends."""
    with path.open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _read_order(session: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads((session / "queue.json").read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        return []


def supervise(work: Path, session_name: str) -> int:
    """Run a session's queued units one after another; 0 when none is left."""
    session = work / "runs" / session_name
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _on_signal)
    with _locked(work / "supervisor.lock"):
        while (folder := _next(session)) is not None:
            try:
                _run_unit(session, folder)
            except _Stopped:
                _cancel_queued(session, "the supervisor was stopped")
                return 1
    return 0


def _on_signal(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise _Stopped


def _next(session: Path) -> Path | None:
    with _locked(session / "queue.lock"):
        if (session / "cancel").exists():
            _cancel_queued(session, "cancelled")
        for name in _read_order(session):
            status = read_status(session / name)
            if status is not None and status.state is UnitState.QUEUED:
                return session / name
    return None


def _cancel_queued(session: Path, cause: str) -> None:
    for name in _read_order(session):
        status = read_status(session / name)
        if status is not None and not status.state.ended:
            ended = replace(status, state=UnitState.INTERRUPTED, cause=cause, ended_at=time.time())
            write_json(session / name / "status.json", ended)


def _run_unit(session: Path, folder: Path) -> None:
    """One unit in a process group of its own, watched until it ends or is ended."""
    spec = read_spec(folder / "run_spec.json")
    with (folder / "harness.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, _entry(), "run", str(folder)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, close_fds=True, cwd=folder,
        )  # fmt: skip
    now = time.time()
    status = UnitStatus(
        unit=spec.unit, state=UnitState.RUNNING, pid=process.pid, boot_id=boot_id(),
        started_at=now, heartbeat_at=now, expected_s=spec.expected_s,
    )  # fmt: skip
    deadline = time.monotonic() + spec.deadline_s
    state, cause = UnitState.RUNNING, ""
    try:
        while process.poll() is None and state is UnitState.RUNNING:
            status = replace(status, heartbeat_at=time.time(), samples_done=_progress(folder))
            write_json(folder / "status.json", status)
            if time.monotonic() > deadline:
                state, cause = UnitState.TIMEOUT, f"stopped after its deadline of {spec.deadline_s:.0f} s"
            elif (session / "cancel").exists():
                state, cause = UnitState.INTERRUPTED, "cancelled"
            else:
                _wait(process, BEAT_SECONDS)
    except _Stopped:
        state, cause = UnitState.INTERRUPTED, "the supervisor was stopped"
        raise
    finally:
        _end(process)
        if state is UnitState.RUNNING:
            state, cause = _verdict(process, folder)
        status = replace(
            status, state=state, cause=cause, ended_at=time.time(), heartbeat_at=time.time(),
            samples_done=_progress(folder),
        )  # fmt: skip
        write_json(folder / "status.json", status)


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return


def _end(process: "subprocess.Popen[bytes]") -> None:
    """No process of the unit is left behind, whether it ended by itself or not."""
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        _wait(process, seconds)
    process.wait()


def _verdict(process: "subprocess.Popen[bytes]", folder: Path) -> tuple[UnitState, str]:
    code = process.returncode
    if code == 0 and (folder / "manifest.json").is_file():
        return UnitState.DONE, ""
    try:
        cause = str(json.loads((folder / "error.json").read_text(encoding="utf-8"))["cause"])
    except (OSError, ValueError, KeyError):
        cause = ""
    if code < 0:
        name = signal.Signals(-code).name
        cause = f"killed by {name}" + (": out of memory?" if name == "SIGKILL" else "")
    return UnitState.FAILED, cause or f"harness ended with {code}, see harness.log"


def _progress(folder: Path) -> int:
    try:
        return int((folder / "progress").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def cancel(work: Path, session_name: str) -> bool:
    """Ask a session's supervisor to stop; False when the session is not known here."""
    session = work / "runs" / session_name
    if not session.is_dir():
        return False
    (session / "cancel").touch()
    return True


def pack(work: Path, session_name: str, units: Sequence[str]) -> Path:
    """One archive with the folders of `units`; what a unit lacks is missing from it, not an error here."""
    folder = work / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{session_name}.tar"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for unit in units:
            source = work / "runs" / session_name / unit
            if source.is_dir():
                archive.add(source, arcname=unit)
    return path


__all__ = ["RunSpec", "cancel", "pack", "read_status", "start", "supervise"]
