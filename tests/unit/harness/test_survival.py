"""What must not happen whatever dies: a process left behind, a measured unit lost, a dead one alive, a live one dead."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fleet.harness import accelerator_locks, processes, unit_queue
from fleet.harness.contract import Reason, UnitState, UnitStatus, write_json
from tests.unit.harness.hosting import (
    CHILD,
    WAIT_FOR_GO,
    ended,
    full_disk,
    idle,
    lines,
    ours,
    owner,
    pids,
    running,
    status,
    unit,
    wait,
)
from tests.unit.harness.units import TOP, queue, spec

DAEMON = """
daemon = subprocess.Popen(
    [sys.executable, "-c", "import os, subprocess, sys; os.fork() and os._exit(0); os.setsid();"
     "child = subprocess.Popen(['sleep', '60'], start_new_session=True);"
     "print(child.pid, file=open(sys.argv[1], 'a'), flush=True); child.wait()", str(Path(spec.work_dir, "pids"))],
    start_new_session=True,
)
daemon.wait()
while len(Path(spec.work_dir, "pids").read_text().split()) < 3: time.sleep(0.02)
"""
"""Leaves a process behind that has lost its parent and is in a session of its own, twice."""


def kill(pid: int, work: Path) -> None:
    os.kill(pid, signal.SIGKILL)
    wait(lambda: not ours(pid, work.parent), 5)


@pytest.mark.parametrize("leaves", [CHILD, DAEMON])
def test_with_its_supervisor_a_unit_ends_and_all_it_started(work: Path, leaves: str) -> None:
    unit_queue.start(work, queue(unit(work, "one", leaves + "time.sleep(60)"), unit(work, "two")))
    wait(running(work, "one"))
    wait(lambda: len(pids(work)) == 3)
    wait(lambda: owner(work)["unit"] == pids(work)[1])
    assert owner(work)["supervisor"] == pids(work)[0]
    kill(pids(work)[0], work)
    wait(idle(work), 5)
    assert unit_queue.start(work, queue(unit(work, "one"), unit(work, "two")))["queued"] == ["one", "two"]
    wait(ended(work, "one", "two"))
    assert lines(work) == ["+one", "+one", "-one", "+two", "-two"]


def test_a_unit_leaves_no_daemon_behind(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one", DAEMON), unit(work, "two", DAEMON + "time.sleep(60)", deadline_s=1)))
    wait(ended(work, "one", "two"))
    assert [status(work, name).state for name in ("one", "two")] == [UnitState.DONE, UnitState.TIMEOUT]
    assert status(work, "two").reason is Reason.TIMEOUT
    wait(idle(work), 5)


def test_what_a_supervisor_and_its_guard_leave_is_ended_by_the_next_start(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one", DAEMON + "time.sleep(60)")))
    wait(running(work, "one"))
    wait(lambda: len(pids(work)) == 3)
    supervisor, _, daemon = pids(work)
    (guard,) = [pid for pid in processes._pids() if processes._arguments(pid)[-2:] == ["guard", str(supervisor)]]
    os.kill(guard, signal.SIGKILL)
    kill(supervisor, work)
    assert ours(daemon, work.parent)
    unit_queue.start(work, {**queue(unit(work, "other")), "session": "s2"})
    assert not ours(daemon, work.parent)


def test_a_waiting_supervisor_of_the_same_session_gives_the_dead_ones_unit_an_end(work: Path) -> None:
    one = unit(work, "one", WAIT_FOR_GO)
    unit_queue.start(work, queue(one))
    wait(running(work, "one"))
    unit_queue.start(work, queue(one, unit(work, "two")))
    wait(lambda: len(pids(work)) == 3)
    kill(pids(work)[0], work)
    wait(ended(work, "one", "two"))
    found = status(work, "one")
    assert (found.state, found.cause, found.reason) == (
        UnitState.FAILED, "its supervisor died", Reason.SUPERVISOR_DIED,
    )  # fmt: skip
    assert status(work, "two").state is UnitState.DONE


def test_a_unit_that_was_measured_before_its_supervisor_could_say_so_is_done(work: Path) -> None:
    one = unit(work, "one")
    unit_queue.start(work, queue(one))
    wait(ended(work, "one"))
    wait(idle(work))
    folder = work / "runs" / "s" / "one"
    marker = folder / "measured"
    marker.touch()
    # As it lies there after a kill between the manifest and the last status, and after a disk without space for it.
    for text in ('{"unit": "one", "state": "running", "pid": 1}', ""):
        (folder / "status.json").write_text(text, encoding="utf-8")
        assert unit_queue.start(work, queue(one)) == {"queued": [], "kept": ["one"], "running": [], "refused": {}}
        assert status(work, "one").state is UnitState.DONE
        assert marker.exists()


def test_a_rebooted_hosts_unit_was_interrupted(work: Path) -> None:
    session = work / "runs" / "s"
    (session / "one").mkdir(parents=True)
    write_json(session / "queue.json", ["one"])
    before = UnitStatus(unit="one", state=UnitState.RUNNING, boot_id="before", heartbeat_at=time.time())
    write_json(session / "one" / "status.json", before)
    unit_queue.settle(work, session)
    assert (status(work, "one").state, status(work, "one").reason) == (UnitState.INTERRUPTED, Reason.INTERRUPTED)


@pytest.mark.parametrize("days", [-1, 1])
def test_no_set_clock_makes_a_dead_unit_alive_nor_a_live_one_dead(
    work: Path, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    real = time.time
    one = unit(work, "one", WAIT_FOR_GO)
    unit_queue.start(work, queue(one))
    wait(running(work, "one"))
    monkeypatch.setattr(time, "time", lambda: real() + days * 86400)
    assert unit_queue.start(work, queue(one)) == {"queued": [], "kept": [], "running": ["one"], "refused": {}}
    wait(lambda: len(pids(work)) == 3)
    for pid in (pids(work)[2], pids(work)[0]):
        kill(pid, work)
    wait(idle(work), 5)
    assert unit_queue.start(work, queue(one)) == {"queued": ["one"], "kept": [], "running": [], "refused": {}}
    (work / "go").touch()
    wait(ended(work, "one"))
    assert status(work, "one").state is UnitState.DONE


def test_beats_are_told_by_the_time_since_the_boot(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one", WAIT_FOR_GO)))
    wait(running(work, "one"))
    first = status(work, "one").beat_uptime
    assert first is not None
    assert abs(processes.uptime() - first) < 10
    wait(lambda: (status(work, "one").beat_uptime or 0) > first)
    told = json.loads((work / "runs" / "s" / "supervisor.json").read_text(encoding="utf-8"))
    assert abs(processes.uptime() - told["beat_uptime"]) < 10
    (work / "go").touch()
    wait(ended(work, "one"))


def test_single_units_are_cancelled_queued_or_running(work: Path) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + DAEMON + "time.sleep(60)"
    unit_queue.start(work, queue(unit(work, "one", stubborn), unit(work, "two"), unit(work, "three")))
    wait(running(work, "one"))
    assert unit_queue.cancel(work, "s", ["two", "unknown"]) == {"two": "interrupted"}
    assert status(work, "one").state is UnitState.RUNNING
    began = time.monotonic()
    assert unit_queue.cancel(work, "s", ["one"]) == {"one": "interrupted"}
    assert time.monotonic() - began < 15
    assert not [pid for pid in pids(work)[1:3] if ours(pid, work.parent)]
    wait(ended(work, "three"))
    assert [status(work, name).reason for name in ("one", "two")] == [Reason.CANCELLED] * 2
    assert status(work, "three").state is UnitState.DONE
    assert unit_queue.cancel(work, "s", ["three"]) == {"three": "done"}
    assert lines(work) == ["+one", "+three", "-three"]


def test_a_unit_is_cancelled_even_where_its_supervisor_does_not_answer(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_queue, "END_SECONDS", 0.5)
    unit_queue.start(work, queue(unit(work, "one", CHILD + "time.sleep(60)")))
    wait(running(work, "one"))
    wait(lambda: len(pids(work)) == 3)
    supervisor, first, child = pids(work)
    os.kill(supervisor, signal.SIGSTOP)
    try:
        assert unit_queue.cancel(work, "s") == {"one": "interrupted"}
        wait(lambda: not (ours(first, work.parent) or ours(child, work.parent)), 5)
    finally:
        os.kill(supervisor, signal.SIGCONT)
    wait(idle(work))
    assert status(work, "one").reason in {Reason.CANCELLED, Reason.INTERRUPTED}


def test_a_cancelled_session_whose_supervisor_is_dead_has_ended(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one", WAIT_FOR_GO), unit(work, "two")))
    wait(running(work, "one"))
    kill(pids(work)[0], work)
    assert set(unit_queue.cancel(work, "s").values()) <= {"interrupted", "failed"}
    assert ended(work, "one", "two")()


def test_what_was_measured_by_an_older_spec_and_is_not_home_is_kept_aside(work: Path) -> None:
    for number, does in enumerate(("a = 1", "b = 2", "c = 3")):
        unit_queue.start(work, queue(unit(work, "one", does)))
        wait(ended(work, "one"))
        if number == 1:
            assert unit_queue.home(work, "s", ["one", "unknown"]) == ["one"]
    kept = list((work / "runs" / "s" / ".earlier").iterdir())
    assert [path.name for path in kept] == ["one.1"]
    assert "a = 1" in (kept[0] / "run_spec.json").read_text(encoding="utf-8")


def test_on_a_full_disk_what_runs_is_left_alone_and_only_the_rest_is_refused(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = unit(work, "one", WAIT_FOR_GO), unit(work, "two")
    unit_queue.start(work, queue(one))
    wait(running(work, "one"))
    with full_disk(monkeypatch):
        assert unit_queue.start(work, queue(one, two)) == {
            "queued": [], "kept": [], "running": ["one"], "refused": {"two": "[Errno 28] No space left on device"},
        }  # fmt: skip
    assert unit_queue.start(work, queue(one, two))["queued"] == ["two"]
    with full_disk(monkeypatch):
        # Nothing is new: nothing need be written.
        (work / "runs" / "s" / "reserve").unlink()
        told = unit_queue.start(work, queue(one, two))
    assert (told["running"], told["queued"], told["refused"]) == (["one"], ["two"], {})
    (work / "go").touch()
    wait(ended(work, "one", "two"))
    assert lines(work) == ["+one", "-one", "+two", "-two"]


def take_cpu(work: Path) -> "list[accelerator_locks.Lock]":
    name = f"mlperf-fleet test of {work.parent / 'entry'}{accelerator_locks.CPU}"
    lock = accelerator_locks.Lock(socket.AF_UNIX)
    lock.bind("\0" + name)
    return [lock]


def test_a_unit_waits_while_somebody_elses_is_on_its_accelerator(work: Path) -> None:
    held = take_cpu(work)
    unit_queue.start(work, queue(unit(work, "one")))
    wait(lambda: "accelerator cpu is in use" in status(work, "one").cause)
    assert status(work, "one").state is UnitState.QUEUED
    accelerator_locks.release(held)
    wait(ended(work, "one"))
    assert (status(work, "one").state, status(work, "one").cause) == (UnitState.DONE, "")


def test_a_unit_that_waited_past_its_deadline_found_the_accelerator_busy(work: Path) -> None:
    held = take_cpu(work)
    unit_queue.start(work, queue(unit(work, "one", deadline_s=0.3), unit(work, "two", deadline_s=60)))
    wait(ended(work, "one"))
    found = status(work, "one")
    assert (found.state, found.reason) == (UnitState.FAILED, Reason.BUSY)
    assert found.cause.startswith("the accelerator cpu is in use by somebody else on this machine: ")
    assert unit_queue.cancel(work, "s", ["two"]) == {"two": "interrupted"}
    accelerator_locks.release(held)
    wait(idle(work))
    assert not (work / "order").exists()


def test_the_accelerator_is_held_by_the_units_own_process_too(work: Path) -> None:
    held_open = "time.sleep(60)"
    unit_queue.start(work, queue(unit(work, "one", held_open)))
    wait(running(work, "one"))
    with pytest.raises(OSError, match="in use"):
        take_cpu(work)
    os.kill(pids(work)[0], signal.SIGSTOP)
    with pytest.raises(OSError, match="in use"):
        take_cpu(work)
    os.kill(pids(work)[0], signal.SIGCONT)
    unit_queue.cancel(work, "s")
    wait(idle(work))
    accelerator_locks.release(take_cpu(work))


def test_the_command_line_cancels_and_notes_what_is_home(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one"), unit(work, "two", "time.sleep(60)")))
    wait(running(work, "two"))

    def harness(*arguments: str) -> dict[str, object]:
        command = [sys.executable, "-m", "fleet.harness", *arguments]
        told: dict[str, object] = json.loads(subprocess.run(command, capture_output=True, cwd=TOP, check=True).stdout)
        return told

    assert harness("home", str(work), "s", "one", "two") == {"home": ["one"]}
    assert (work / "runs" / "s" / "one" / "home").exists()
    assert harness("cancel", str(work), "s", "two") == {"two": "interrupted"}
    assert harness("cancel", str(work), "s") == {"one": "done", "two": "interrupted"}


def test_a_unit_with_a_spec_that_cannot_be_read_does_not_stop_the_next(work: Path) -> None:
    held = take_cpu(work)
    unit_queue.start(work, queue(unit(work, "one"), unit(work, "two")))
    (work / "runs" / "s" / "one" / "run_spec.json").write_text("{", encoding="utf-8")
    accelerator_locks.release(held)
    wait(ended(work, "one", "two"))
    assert status(work, "one").reason is Reason.OTHER
    assert status(work, "two").state is UnitState.DONE


def test_who_runs_a_unit_by_hand_is_no_supervisor(work: Path) -> None:
    value = spec("one", work_dir=str(work), module="no_such_module")
    folder = work / "runs" / "s" / "one"
    folder.mkdir(parents=True)
    write_json(folder / "run_spec.json", value)
    done = subprocess.run([sys.executable, "-m", "fleet.harness", "run", str(folder)], cwd=TOP, check=False)
    assert done.returncode == 1
    assert json.loads((folder / "error.json").read_text(encoding="utf-8"))["reason"] == "other"
