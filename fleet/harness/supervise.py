"""Units on a host belong to a supervisor in a session of its own: the controller may come and go.

WORK/supervisor.lock               held while a supervisor runs units: never two at once on a host
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from fleet.harness import processes
from fleet.harness.contract import RunSpec, SupervisorBeat, UnitState, UnitStatus, read_spec, write_json
from fleet.harness.processes import boot_id
from fleet.harness.unit_queue import locked, read_order, read_status

BEAT_SECONDS = 1.0
REPEAT = 75
"""Exit status with which a unit asks to be started once more; fleet.harness.run gives it."""


def supervise(work: Path, session_name: str) -> int:
    """Run a session's queued units one after another; 0 when none is left, 1 when it was told to stop."""
    return Supervisor(work, session_name).work_off()


class Supervisor:
    """Works off one session's queue. Signals only set a flag, so that none of them can tear a unit from its end."""

    def __init__(self, work: Path, session_name: str) -> None:
        self._session = work / "runs" / session_name
        self._lock_path = work / "supervisor.lock"
        self._stopping = False
        self._beaten = 0.0

    def work_off(self) -> int:
        """Wait for the host, then run what is queued."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        with self._lock_path.open("a+", encoding="utf-8") as lock:
            if self._wait_for(lock.fileno()):
                while not self._stopping and (folder := self._next()) is not None:
                    try:
                        self._run_unit(folder, lock.fileno())
                    except (OSError, ValueError) as error:
                        self._fail(folder, f"{type(error).__name__}: {error}")
            if self._stopping:
                with locked(self._session / "queue.lock"):
                    self._interrupt_queued("the supervisor was stopped")
        return int(self._stopping)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._stopping = True

    def _beat(self) -> None:
        """Say that somebody works on the queue, about once a second; a full disk is no reason to stop."""
        if time.monotonic() - self._beaten < BEAT_SECONDS:
            return
        self._beaten = time.monotonic()
        with suppress(OSError):
            beat = SupervisorBeat(pid=os.getpid(), boot_id=boot_id(), heartbeat_at=time.time())
            write_json(self._session / "supervisor.json", beat)

    def _wait_for(self, lock: int) -> bool:
        """Take the host's lock; False when told to stop before it was free."""
        while not self._stopping:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._beat()
                self._end_orphan()
                time.sleep(BEAT_SECONDS / 4)
            else:
                return True
        return False

    def _end_orphan(self) -> None:
        """A unit whose supervisor was killed holds the lock with nobody to watch it: it is ended."""
        owner = _read_owner(self._lock_path)
        if owner is None or owner["boot_id"] != boot_id() or processes.runs(owner["supervisor"], "supervise"):
            return
        if processes.runs(owner["unit"], owner["folder"]):
            with suppress(ProcessLookupError):
                os.killpg(owner["unit"], signal.SIGKILL)

    def _next(self) -> Path | None:
        """The first queued unit, marked as running before anybody else can see the queue."""
        with locked(self._session / "queue.lock"):
            if (self._session / "cancel").exists():
                self._interrupt_queued("cancelled")
            for name in read_order(self._session):
                folder = self._session / name
                status = read_status(folder)
                if status is not None and status.state is UnitState.QUEUED:
                    now = time.time()
                    running = replace(
                        status, state=UnitState.RUNNING, started_at=now, heartbeat_at=now, boot_id=boot_id()
                    )
                    write_json(folder / "status.json", running)
                    return folder
        return None

    def _interrupt_queued(self, cause: str) -> None:
        for name in read_order(self._session):
            status = read_status(self._session / name)
            if status is not None and status.state is UnitState.QUEUED:
                ended = replace(status, state=UnitState.INTERRUPTED, cause=cause, ended_at=time.time())
                write_json(self._session / name / "status.json", ended)

    def _fail(self, folder: Path, cause: str) -> None:
        status = read_status(folder) or UnitStatus(unit=folder.name, state=UnitState.FAILED)
        with suppress(OSError):
            failed = replace(status, state=UnitState.FAILED, cause=cause[:500], ended_at=time.time())
            write_json(folder / "status.json", failed)

    def _run_unit(self, folder: Path, lock: int) -> None:
        """One unit in a process group of its own, watched until it ends or is ended."""
        spec = read_spec(folder / "run_spec.json")
        state, cause = self._attempt(folder, spec, lock)
        if state is UnitState.RUNNING:
            # It asks to be started again, with what it measured; a second time it says it is done.
            state, cause = self._attempt(folder, spec, lock)
            if state is UnitState.RUNNING:
                state, cause = UnitState.FAILED, "it was too short twice"
        status = read_status(folder) or UnitStatus(unit=spec.unit, state=state)
        ended = replace(status, state=state, cause=cause, ended_at=time.time(), samples_done=_progress(folder)[0])
        write_json(folder / "status.json", ended)

    def _attempt(self, folder: Path, spec: RunSpec, lock: int) -> tuple[UnitState, str]:
        """How one process ended; RUNNING when the unit wants another."""
        (folder / "progress").unlink(missing_ok=True)
        with (folder / "harness.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, processes.entry(), "run", str(folder)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=folder,
                # With the lock: no other unit starts here while this one lives, even if its supervisor dies.
                pass_fds=(lock,),
            )  # fmt: skip
        try:
            state, cause = self._watch(process, folder, spec, lock)
        finally:
            processes.end(process)
        return _verdict(process, folder) if state is UnitState.RUNNING else (state, cause)

    def _watch(
        self, process: "subprocess.Popen[bytes]", folder: Path, spec: RunSpec, lock: int
    ) -> tuple[UnitState, str]:
        """RUNNING when the unit ended by itself, else why it must end."""
        _write_owner(lock, process.pid, folder)
        deadline = time.monotonic() + spec.deadline_s
        status = read_status(folder) or UnitStatus(unit=spec.unit, state=UnitState.RUNNING, started_at=time.time())
        while process.poll() is None:
            self._beat()
            with suppress(OSError):
                done, left = _progress(folder)
                status = replace(status, pid=process.pid, heartbeat_at=time.time(), samples_done=done)
                status = replace(status, expected_s=_expected(status, left))
                write_json(folder / "status.json", status)
            if time.monotonic() > deadline:
                return UnitState.TIMEOUT, f"stopped after its deadline of {spec.deadline_s:.0f} s"
            if (self._session / "cancel").exists() or (folder / "cancel").exists():
                return UnitState.INTERRUPTED, "cancelled"
            if self._stopping:
                return UnitState.INTERRUPTED, "the supervisor was stopped"
            processes.wait(process, BEAT_SECONDS)
        return UnitState.RUNNING, ""


def _write_owner(lock: int, unit: int, folder: Path) -> None:
    """Who holds the lock, in the lock file itself."""
    owner = {"supervisor": os.getpid(), "unit": unit, "folder": str(folder), "boot_id": boot_id()}
    with suppress(OSError):
        os.ftruncate(lock, 0)
        os.write(lock, json.dumps(owner).encode())


def _read_owner(path: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return owner if {"supervisor", "unit", "folder", "boot_id"} <= set(owner) else None
    except (OSError, ValueError, TypeError):
        return None


def _verdict(process: "subprocess.Popen[bytes]", folder: Path) -> tuple[UnitState, str]:
    code = process.returncode
    if code == REPEAT and not (folder / "manifest.json").is_file():
        return UnitState.RUNNING, ""
    # The folder was fresh and the manifest is written last: a process that dies after it has finished its work.
    if (folder / "manifest.json").is_file():
        return UnitState.DONE, ""
    try:
        cause = str(json.loads((folder / "error.json").read_text(encoding="utf-8"))["cause"])
    except (OSError, ValueError, KeyError):
        cause = ""
    if code < 0:
        name = signal.Signals(-code).name
        cause = f"killed by {name}" + (": out of memory?" if name == "SIGKILL" else "")
    return UnitState.FAILED, cause or f"harness ended with {code}, see harness.log"


def _expected(status: UnitStatus, left: float | None) -> float:
    """Seconds the unit will take in all: what it has taken and what it says is `left`, once it can say."""
    spent = (status.heartbeat_at or 0.0) - (status.started_at or 0.0)
    return max(0.0, spent) + left if left is not None else status.expected_s


def _progress(folder: Path) -> tuple[int, float | None]:
    """Samples done, and seconds left where the unit can tell; as fleet.harness.run writes them."""
    try:
        told = json.loads((folder / "progress").read_text(encoding="ascii"))
        left = told["left_s"]
        return int(told["samples_done"]), None if left is None else float(left)
    except (OSError, ValueError, KeyError, TypeError):
        return 0, None
