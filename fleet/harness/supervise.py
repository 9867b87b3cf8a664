"""Units on a host belong to a supervisor in a session of its own: the controller may come and go.

WORK/supervisor.lock               held while a supervisor runs units: never two at once from a work folder
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from fleet.harness import accelerator_locks, power, processes, reasons, space, spot, sweep, unit_queue
from fleet.harness.contract import Reason, RunSpec, SupervisorBeat, UnitState, UnitStatus, read_spec
from fleet.harness.unit_queue import locked, read_order, read_status

BEAT_SECONDS = 1.0
WAIT_BEATS = 2
"""So many beats are between two looks at whether the host is free: another's unit is measuring meanwhile."""
FRESH_BEATS = 5
"""Who has not beaten for so long does not beat any more."""
REPEAT = 75
"""Exit status with which a unit asks to be started once more; fleet.harness.run gives it."""
STOPPED = "the supervisor was stopped"


@dataclass(frozen=True, slots=True)
class End:
    """How a unit ended; RUNNING when it ended by itself, or wants another process."""

    state: UnitState
    cause: str = ""
    reason: Reason = Reason.NONE


ITSELF = End(UnitState.RUNNING)


def supervise(work: Path, session_name: str) -> int:
    """Run a session's queued units one after another; 0 when none is left, 1 when it was told to stop."""
    return Supervisor(work, session_name).work_off()


@dataclass(slots=True)
class _Waiting:
    """The unit at the head of the queue, while somebody else computes on its accelerator."""

    unit: str = ""
    since: float = field(default_factory=time.monotonic)


class Supervisor:
    """Works off one session's queue. Signals only set a flag, so that none of them can tear a unit from its end."""

    def __init__(self, work: Path, session_name: str) -> None:
        self._work = work
        self._session = work / "runs" / session_name
        self._lock_path = work / "supervisor.lock"
        self._stopping = False
        self._beaten = 0.0
        self._began = 0.0
        self._waiting = _Waiting()
        self._guard: subprocess.Popen[bytes] | None = None
        self._spot = spot.Watcher()

    def work_off(self) -> int:
        """Wait for the host, then run what is queued."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        processes.adopt()
        self._guard = _start_guard()
        with self._lock_path.open("a+", encoding="utf-8") as lock:
            if self._wait_for(lock.fileno()):
                with suppress(OSError), locked(self._session / "queue.lock"):
                    # The lock is ours: whatever is marked as running in this session has lost its supervisor.
                    unit_queue.settle(self._work, self._session, alone=True)
                sweep.sweep(self._work)
                self._work_off(lock.fileno())
            if self._stopping:
                with locked(self._session / "queue.lock"):
                    self._interrupt_queued(End(UnitState.INTERRUPTED, STOPPED, Reason.INTERRUPTED))
        return int(self._stopping)

    def _work_off(self, lock: int) -> None:
        while not self._stopping and (folder := self._first()) is not None:
            held = self._hold(folder)
            if held is None:
                self._beat()
                time.sleep(BEAT_SECONDS / 4)
                continue
            try:
                if self._mark(folder):
                    self._run_unit(folder, [lock, *(item.fileno() for item in held)])
            except (OSError, ValueError) as error:
                self._fail(folder, error)
            finally:
                accelerator_locks.release(held)
                space.reserve(self._session)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._stopping = True

    def _beat(self) -> None:
        """Say that somebody works on the queue, about once a second; a full disk is no reason to stop."""
        if time.monotonic() - self._beaten < BEAT_SECONDS:
            return
        self._beaten = time.monotonic()
        with suppress(OSError):
            space.write_over_or_new(self._session / "supervisor.json", self._pulse())

    def _pulse(self) -> SupervisorBeat:
        return SupervisorBeat(
            pid=os.getpid(), boot_id=processes.boot_id(), heartbeat_at=time.time(), beat_uptime=processes.uptime(),
            leaving=self._spot.notice,
        )  # fmt: skip

    def _leaving(self) -> End | None:
        """How units end when this host is about to go away, which is said before any of them ends; else None."""
        if not (notice := self._spot.notice):
            return None
        with suppress(OSError):
            space.write(self._session / "supervisor.json", self._pulse(), self._session)
        return End(UnitState.INTERRUPTED, notice, Reason.INTERRUPTED)

    def _wait_for(self, lock: int) -> bool:
        """Take the host's lock; False when told to stop before it was free."""
        while not self._stopping:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not self._another_beats():
                    self._beat()
                if not processes.lives(_read_owner(lock)):
                    # What a killed supervisor left may hold the lock with nobody to watch it.
                    processes.end_orphans()
                time.sleep(BEAT_SECONDS * WAIT_BEATS)
            else:
                return True
        return False

    def _another_beats(self) -> bool:
        """Whether another supervisor of this session does: what it says, say that the host goes away, must stand."""
        try:
            beat = SupervisorBeat(**json.loads((self._session / "supervisor.json").read_text(encoding="utf-8")))
            fresh = processes.uptime() - (beat.beat_uptime or 0.0) < BEAT_SECONDS * FRESH_BEATS
        except (OSError, ValueError, TypeError):
            return False
        return fresh and beat.boot_id == processes.boot_id() and beat.pid != os.getpid() and processes.lives(beat.pid)

    def _first(self) -> Path | None:
        """The first queued unit."""
        with locked(self._session / "queue.lock"):
            if (self._session / "cancel").exists():
                self._interrupt_queued(End(UnitState.INTERRUPTED, "cancelled", Reason.CANCELLED))
            if how := self._leaving():
                self._interrupt_queued(how)
            for name in read_order(self._session):
                status = read_status(self._session / name)
                if status is not None and status.state is UnitState.QUEUED:
                    return self._session / name
        return None

    def _hold(self, folder: Path) -> "list[accelerator_locks.Lock] | None":
        """Locks on what the unit computes on; None while somebody else has one, until its deadline ends the unit."""
        try:
            spec = read_spec(folder / "run_spec.json")
            self._spot.want(spec.market)
            held = accelerator_locks.take(accelerator_locks.names(spec))
        except (OSError, ValueError) as error:
            self._fail(folder, error)
            return None
        except accelerator_locks.BusyError as error:
            self._note_busy(folder, spec, f"the accelerator {error} is in use by somebody else on this machine")
            return None
        self._waiting = _Waiting()
        return held

    def _note_busy(self, folder: Path, spec: RunSpec, cause: str) -> None:
        if self._waiting.unit != spec.unit:
            self._waiting = _Waiting(spec.unit)
        waited = time.monotonic() - self._waiting.since
        with suppress(OSError), locked(self._session / "queue.lock"):
            status = read_status(folder)
            if status is None or status.state is not UnitState.QUEUED:
                return
            if waited > spec.deadline_s:
                unit_queue.end(folder, status, UnitState.FAILED, f"{cause}: {waited:.0f} s waited", Reason.BUSY)
                self._waiting = _Waiting()
            elif status.cause != cause:
                space.write(folder / "status.json", replace(status, cause=cause), self._session)

    def _mark(self, folder: Path) -> bool:
        """Mark a unit as running, before anybody else can see the queue; False when it is not queued any more."""
        with locked(self._session / "queue.lock"):
            status = read_status(folder)
            if status is None or status.state is not UnitState.QUEUED or (self._session / "cancel").exists():
                return False
            running = replace(
                status, state=UnitState.RUNNING, cause="", started_at=time.time(), heartbeat_at=time.time(),
                beat_uptime=processes.uptime(), boot_id=processes.boot_id(),
            )  # fmt: skip
            space.write(folder / "status.json", running, self._session)
        return True

    def _interrupt_queued(self, how: End) -> None:
        for name in read_order(self._session):
            status = read_status(self._session / name)
            if status is not None and status.state is UnitState.QUEUED:
                unit_queue.end(self._session / name, status, how.state, how.cause, how.reason)

    def _fail(self, folder: Path, error: Exception) -> None:
        status = read_status(folder) or UnitStatus(unit=folder.name, state=UnitState.FAILED)
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        sys.stderr.write(f"{folder.name}: {cause}\n")
        with suppress(OSError):
            unit_queue.end(folder, status, UnitState.FAILED, cause, reasons.of(error))
            return
        time.sleep(BEAT_SECONDS)  # Not even the reserve helped: the unit is still queued, and is tried again.

    def _run_unit(self, folder: Path, keep: list[int]) -> None:
        """One unit in a process group of its own, watched until it ends or is ended; it inherits the files `keep`."""
        spec = read_spec(folder / "run_spec.json")
        conditions = power.Conditions(spec.conditions)
        conditions.start()
        # Of the unit, however many processes it takes: its deadline is one.
        self._began = time.monotonic()
        try:
            how = self._attempt(folder, spec, keep, conditions)
            if how is ITSELF:
                # It asks to be started again, with what it measured; a second time it says it is done.
                how = self._attempt(folder, spec, keep, conditions)
                if how is ITSELF:
                    how = End(UnitState.FAILED, "it was too short twice", Reason.OTHER)
        finally:
            conditions.stop()
        status = read_status(folder) or UnitStatus(unit=spec.unit, state=how.state)
        status = replace(status, samples_done=_progress(folder)[0], conditions=conditions.seen)
        unit_queue.end(folder, status, how.state, how.cause, how.reason)

    def _attempt(self, folder: Path, spec: RunSpec, keep: list[int], conditions: power.Conditions) -> End:
        """How one process ended; ITSELF when the unit wants another."""
        (folder / "progress").unlink(missing_ok=True)
        killed = reasons.oom_kills()
        with (folder / "harness.log").open("ab") as log:
            process = subprocess.Popen(
                [processes.python(), processes.entry(), "run", str(folder)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=folder,
                env=processes.environment(folder),
                # With the locks: no other unit starts here while this one lives, even if its supervisor dies.
                pass_fds=keep,
            )  # fmt: skip
        gone = True
        try:
            how = self._watch(process, folder, spec, keep[0], conditions)
        finally:
            gone = processes.end(process, folder, [self._guard.pid] if self._guard else [])
        if not gone:
            return End(UnitState.FAILED, "its processes cannot be killed: the host needs a reboot", Reason.OTHER)
        found = _verdict(process, folder, out_of_memory=reasons.oom_kills() > killed)
        # What was measured to its end before it was stopped is done all the same.
        return found if how is ITSELF or found.state is UnitState.DONE else how

    def _watch(
        self, process: "subprocess.Popen[bytes]", folder: Path, spec: RunSpec, lock: int, conditions: power.Conditions
    ) -> End:
        """ITSELF when the unit ended by itself, else why it must end."""
        _write_owner(lock, process.pid, folder)
        status = read_status(folder) or UnitStatus(unit=spec.unit, state=UnitState.RUNNING, started_at=time.time())
        while process.poll() is None:
            self._beat()
            spent = time.monotonic() - self._began
            with suppress(OSError):
                done, left = _progress(folder)
                status = replace(
                    status, pid=process.pid, heartbeat_at=time.time(), beat_uptime=processes.uptime(),
                    samples_done=done, expected_s=status.expected_s if left is None else spent + left,
                    conditions=conditions.seen,
                )  # fmt: skip
                space.write_over_or_new(folder / "status.json", status)
            if spent > spec.deadline_s:
                cause = f"stopped after its deadline of {spec.deadline_s:.0f} s"
                return End(UnitState.TIMEOUT, cause, Reason.TIMEOUT)
            if (self._session / "cancel").exists() or (folder / "cancel").exists():
                return End(UnitState.INTERRUPTED, "cancelled", Reason.CANCELLED)
            if how := self._leaving():
                return how
            if cause := conditions.stops:
                return End(UnitState.INTERRUPTED, cause, Reason.POWER)
            if self._stopping:
                return End(UnitState.INTERRUPTED, STOPPED, Reason.INTERRUPTED)
            processes.wait(process, BEAT_SECONDS)
        return ITSELF


def _start_guard() -> "subprocess.Popen[bytes] | None":
    """A process that ends the unit's processes if this one is killed. Its stdin ends with us, however we end."""
    try:
        return subprocess.Popen(
            [processes.python(), processes.entry(), "guard", str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, cwd="/",
        )  # fmt: skip
    except OSError:
        # Without it the kernel still kills the unit's first process, and the next start what is left.
        return None


def _write_owner(lock: int, unit: int, folder: Path) -> None:
    """Who holds the lock, in the lock file itself: preflight reads it."""
    owner = {"supervisor": os.getpid(), "unit": unit, "folder": str(folder), "boot_id": processes.boot_id()}
    with suppress(OSError):
        os.ftruncate(lock, 0)
        os.write(lock, json.dumps(owner).encode())


def _read_owner(lock: int) -> int:
    """The pid of the supervisor that holds the lock, as far as it has said so since the boot; else 0."""
    try:
        told = json.loads(os.pread(lock, 4096, 0))
        return int(told["supervisor"]) if told["boot_id"] == processes.boot_id() else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _verdict(process: "subprocess.Popen[bytes]", folder: Path, *, out_of_memory: bool) -> End:
    """How a unit that ended by itself ended; `out_of_memory` when the kernel has killed for memory meanwhile."""
    code = process.returncode
    if code == REPEAT and not (folder / "manifest.json").is_file():
        return ITSELF
    # The folder was fresh and the manifest is written last: a process that dies after it has finished its work.
    if (folder / "manifest.json").is_file():
        return End(UnitState.DONE)
    cause, reason = _error(folder)
    state = UnitState.FAILED
    if code < 0:
        name = signal.Signals(-code).name
        cause = f"killed by {name}"
        if name in {"SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"}:
            # Nobody but somebody else sends these.
            state, reason = UnitState.INTERRUPTED, Reason.INTERRUPTED
    if out_of_memory:
        state, reason = UnitState.FAILED, Reason.OUT_OF_MEMORY
        cause = f"out of memory: {cause or 'one of its processes was killed'}"
    return End(state, cause or f"harness ended with {code}, see harness.log", reason)


def _error(folder: Path) -> tuple[str, Reason]:
    """What the unit itself wrote of its failure."""
    try:
        told = json.loads((folder / "error.json").read_text(encoding="utf-8"))
        return str(told["cause"]), Reason(told.get("reason", Reason.OTHER))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "", Reason.OTHER


def _progress(folder: Path) -> tuple[int, float | None]:
    """Samples done, and seconds left where the unit can tell; as fleet.harness.run writes them."""
    try:
        told = json.loads((folder / "progress").read_text(encoding="ascii"))
        left = told["left_s"]
        return int(told["samples_done"]), None if left is None else float(left)
    except (OSError, ValueError, KeyError, TypeError):
        return 0, None
