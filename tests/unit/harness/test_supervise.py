"""Units under their supervisor, with real processes: a stand-in for the harness's own entry does what a unit says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fleet.harness import processes, supervise, unit_queue
from fleet.harness.contract import Reason, SupervisorBeat, UnitState, UnitStatus, read_spec, write_json
from fleet.harness.supervise import End
from tests.unit.harness.hosting import (
    CHILD,
    WAIT_FOR_GO,
    ended,
    full_disk,
    idle,
    lines,
    pids,
    running,
    status,
    unit,
    wait,
)
from tests.unit.harness.units import TOP, folder_of, queue, spec


def test_units_run_one_after_another_in_the_order_given(work: Path) -> None:
    specs = [unit(work, name, "time.sleep(0.1)") for name in ("b", "a", "c")]
    answer = unit_queue.start(work, queue(*specs))
    assert answer == {"queued": ["b", "a", "c"], "kept": [], "running": [], "refused": {}}
    wait(ended(work, "a", "b", "c"))
    assert lines(work) == ["+b", "-b", "+a", "-a", "+c", "-c"]
    found = status(work, "c")
    assert (found.state, found.cause, found.samples_done) == (UnitState.DONE, "", 7)
    assert found.boot_id == processes.boot_id()
    assert found.started_at is not None
    assert found.ended_at is not None
    assert found.started_at <= found.ended_at


def test_a_done_unit_is_kept_and_a_changed_or_failed_one_starts_over(work: Path) -> None:
    first = [unit(work, "same"), unit(work, "changed"), unit(work, "failed", "sys.exit(3)")]
    unit_queue.start(work, queue(*first))
    wait(ended(work, "same", "changed", "failed"))
    assert status(work, "failed").state is UnitState.FAILED
    assert status(work, "failed").cause == "harness ended with 3, see harness.log"
    kept = (work / "runs" / "s" / "same" / "manifest.json").stat().st_mtime_ns
    stray = work / "runs" / "s" / "changed" / "stray"
    stray.touch()
    again = [unit(work, "same"), unit(work, "changed", "pass"), unit(work, "failed", "pass")]
    answer = unit_queue.start(work, queue(*again))
    assert answer == {"queued": ["changed", "failed"], "kept": ["same"], "running": [], "refused": {}}
    wait(ended(work, "changed", "failed"))
    assert not stray.exists()
    assert (work / "runs" / "s" / "same" / "manifest.json").stat().st_mtime_ns == kept
    assert status(work, "failed").state is UnitState.DONE


def test_a_running_unit_is_left_alone(work: Path) -> None:
    one = unit(work, "one", WAIT_FOR_GO)
    unit_queue.start(work, queue(one))
    wait(running(work, "one"))
    assert unit_queue.start(work, queue(one)) == {"queued": [], "kept": [], "running": ["one"], "refused": {}}
    (work / "go").touch()
    wait(ended(work, "one"))
    wait(idle(work))
    assert lines(work) == ["+one", "-one"]


def test_two_supervisors_never_run_units_at_once(work: Path) -> None:
    for name in ("a", "b", "c"):
        unit_queue.start(work, {**queue(unit(work, name, "time.sleep(0.2)")), "session": f"s-{name}"})
    folders = [work / "runs" / f"s-{name}" / name for name in "abc"]

    def over() -> bool:
        return all((found := unit_queue.read_status(folder)) is not None and found.state.ended for folder in folders)

    wait(over)
    found = lines(work)
    assert len(found) == 6
    assert all(
        first[0] == "+" and second == "-" + first[1:] for first, second in zip(found[::2], found[1::2], strict=True)
    )


def test_past_its_deadline_a_unit_is_stopped_with_all_its_processes(work: Path) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + CHILD + "time.sleep(60)"
    unit_queue.start(work, queue(unit(work, "slow", stubborn, deadline_s=0.5), unit(work, "next")))
    wait(ended(work, "slow", "next"))
    found = status(work, "slow")
    assert (found.state, found.cause) == (UnitState.TIMEOUT, "stopped after its deadline of 0 s")
    assert status(work, "next").state is UnitState.DONE
    wait(idle(work), 5)


def test_a_child_that_outlives_its_unit_is_ended(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one", CHILD)))
    wait(ended(work, "one"))
    wait(idle(work), 5)
    assert status(work, "one").state is UnitState.DONE


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("SIGKILL", Reason.INTERRUPTED),
        ("SIGTERM", Reason.INTERRUPTED),
        ("SIGSEGV", Reason.OTHER),
        ("SIGABRT", Reason.OTHER),
    ],
)
def test_a_killed_unit_says_by_which_signal(work: Path, name: str, reason: Reason) -> None:
    does = f"import resource, signal; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.kill(os.getpid(), signal.{name})"
    unit_queue.start(work, queue(unit(work, "one", does)))
    wait(ended(work, "one"))
    found = status(work, "one")
    state = UnitState.INTERRUPTED if reason is Reason.INTERRUPTED else UnitState.FAILED
    assert (found.state, found.cause, found.reason) == (state, f"killed by {name}", reason)


def test_an_error_the_harness_wrote_is_the_cause(work: Path) -> None:
    told = {"cause": "ValueError: no weights", "reason": "missing-asset"}
    does = f"write_json(folder / 'error.json', {told}); sys.exit(1)"
    unit_queue.start(work, queue(unit(work, "one", does)))
    wait(ended(work, "one"))
    found = status(work, "one")
    assert (found.cause, found.reason) == ("ValueError: no weights", Reason.MISSING_ASSET)


def test_success_without_a_manifest_is_none(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one", "sys.exit(0)")))
    wait(ended(work, "one"))
    assert status(work, "one").state is UnitState.FAILED


def test_cancel_stops_the_running_unit_and_the_queue(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one", CHILD + "time.sleep(60)"), unit(work, "two")))
    wait(running(work, "one"))
    assert unit_queue.cancel(work, "s") == {"one": "interrupted", "two": "interrupted"}
    assert {(status(work, name).cause, status(work, name).reason) for name in ("one", "two")} == {
        ("cancelled", Reason.CANCELLED)
    }
    wait(idle(work), 5)
    assert lines(work) == ["+one"]
    assert unit_queue.cancel(work, "unknown") == {}
    unit_queue.start(work, queue(unit(work, "two")))
    wait(lambda: status(work, "two").state is UnitState.DONE)


def test_a_stopped_supervisor_leaves_nothing_running_and_says_so(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one", CHILD + "time.sleep(60)"), unit(work, "two")))
    wait(running(work, "one"))
    supervisor = pids(work)[0]
    assert supervisor != status(work, "one").pid
    os.kill(supervisor, signal.SIGTERM)
    wait(ended(work, "one", "two"))
    assert {(status(work, name).state, status(work, name).cause) for name in ("one", "two")} == {
        (UnitState.INTERRUPTED, "the supervisor was stopped")
    }
    wait(idle(work), 5)


def test_who_waits_for_a_living_supervisor_ends_nothing_and_both_beat(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one", WAIT_FOR_GO)))
    wait(running(work, "one"))
    unit_queue.start(work, {**queue(unit(work, "other")), "session": "s2"})
    for session in ("s", "s2"):
        path = work / "runs" / session / "supervisor.json"
        wait(path.is_file)
        first = read_beat(path)
        assert first.boot_id == processes.boot_id()
        assert first.pid in pids(work)
        wait(lambda path=path, at=first.heartbeat_at: read_beat(path).heartbeat_at > at)  # type: ignore[misc]
    assert lines(work) == ["+one"]
    (work / "go").touch()
    wait(ended(work, "one"))
    wait(idle(work))
    assert lines(work) == ["+one", "-one", "+other", "-other"]


@pytest.mark.parametrize("lives", [True, False])
def test_who_waits_takes_nothing_from_a_unit_that_is_watched(
    work: Path, monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    """Looking through every process costs CPU, and what a living supervisor says must stand."""
    session, pid, scans = work / "runs" / "s", os.getppid() if lives else 2**22, []
    session.mkdir(parents=True)
    beat = SupervisorBeat(
        pid=pid, boot_id=processes.boot_id(), heartbeat_at=1.0, beat_uptime=processes.uptime(), leaving="taken back"
    )
    write_json(session / "supervisor.json", beat)
    write_json(work / "supervisor.lock", {"supervisor": pid, "boot_id": processes.boot_id()})
    supervisor = supervise.Supervisor(work, "s")
    monkeypatch.setattr(processes, "end_orphans", lambda: scans.append(1))
    monkeypatch.setattr("time.sleep", lambda _: setattr(supervisor, "_stopping", True))
    with unit_queue.locked(work / "supervisor.lock"), (work / "supervisor.lock").open("a+") as lock:
        assert not supervisor._wait_for(lock.fileno())
    assert len(scans) == (0 if lives else 1)
    assert read_beat(session / "supervisor.json").leaving == ("taken back" if lives else "")


def test_on_a_full_disk_a_supervisor_still_beats(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = work / "runs" / "s" / "supervisor.json"
    path.parent.mkdir(parents=True)
    write_json(path, SupervisorBeat(pid=1, boot_id="b" * 36, heartbeat_at=1.0, beat_uptime=1.0))
    supervisor = supervise.Supervisor(work, "s")
    with full_disk(monkeypatch):
        supervisor._beat()
    assert read_beat(path).pid == os.getpid()
    assert read_beat(path).heartbeat_at > 1.0


def read_beat(path: Path) -> SupervisorBeat:
    return SupervisorBeat(**json.loads(path.read_text(encoding="utf-8")))


def test_a_unit_that_runs_by_another_spec_starts_over(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one", WAIT_FOR_GO)))
    wait(running(work, "one"))
    unit_queue.start(work, queue(unit(work, "one", "pass")))
    (work / "go").touch()
    wait(ended(work, "one"))
    wait(idle(work))
    assert read_spec(work / "runs" / "s" / "one" / "run_spec.json").user_conf == "pass"


def test_a_queue_that_asks_for_another_schema_is_refused(work: Path) -> None:
    with pytest.raises(ValueError, match="not a run spec of schema 1"):
        unit_queue.start(work, queue(spec("one", work_dir=str(work), schema=9)))


def test_a_status_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    for text in ("", "{", "[]", '{"unit": "u"}', '{"unit": "u", "state": "flying"}'):
        (tmp_path / "status.json").write_text(text, encoding="utf-8")
        assert unit_queue.read_status(tmp_path) is None
    write_json(tmp_path / "status.json", UnitStatus(unit="u", state=UnitState.QUEUED))
    assert unit_queue.read_status(tmp_path) == UnitStatus(unit="u", state=UnitState.QUEUED)


AGAIN = f"""
if not (folder / "repeat.json").exists():
    (folder / "repeat.json").write_text("{{}}")
    sys.exit({supervise.REPEAT})
"""


def test_a_unit_that_asks_for_it_is_started_once_more(work: Path) -> None:
    """The harness's run ends with REPEAT for a run that was too short for its target alone."""
    unit_queue.start(work, queue(unit(work, "one", AGAIN), unit(work, "two")))
    wait(ended(work, "one", "two"))
    assert status(work, "one").state is UnitState.DONE
    assert (work / "order").read_text(encoding="utf-8").split() == ["+one", "+one", "-one", "+two", "-two"]


def test_a_unit_that_asks_for_it_twice_has_failed(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one", f"sys.exit({supervise.REPEAT})")))
    wait(ended(work, "one"))
    assert (status(work, "one").state, status(work, "one").cause) == (UnitState.FAILED, "it was too short twice")
    assert (work / "order").read_text(encoding="utf-8").split() == ["+one", "+one"]


def test_both_processes_of_a_unit_have_one_deadline(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "runs" / "s").mkdir(parents=True)
    folder = folder_of(work / "runs" / "s", unit(work, "one", AGAIN + "time.sleep(5)", deadline_s=60.0))
    shift, verdict = [0.0], supervise._verdict

    def ended(process: "subprocess.Popen[bytes]", *arguments: Any, **more: Any) -> End:
        shift[0] += 60.0
        return verdict(process, *arguments, **more)

    def kill(process: "subprocess.Popen[bytes]", *_: Any) -> bool:
        # Not with every other child of this process.
        process.kill()
        process.wait()
        return True

    monkeypatch.setattr(supervise, "_verdict", ended)
    monkeypatch.setattr(processes, "end", kill)
    clock = SimpleNamespace(time=time.time, sleep=time.sleep, monotonic=lambda: time.monotonic() + shift[0])
    monkeypatch.setattr(supervise, "time", clock)
    with (work / "supervisor.lock").open("a+") as lock:
        supervise.Supervisor(work, "s")._run_unit(folder, [lock.fileno()])
    assert (status(work, "one").state, status(work, "one").reason) == (UnitState.TIMEOUT, Reason.TIMEOUT)
    assert shift == [120.0]


def test_what_a_unit_says_of_its_progress_is_read_or_nothing(tmp_path: Path) -> None:
    for text in ("", "7", '{"samples_done": 7}', '{"samples_done": "x", "left_s": 1}'):
        (tmp_path / "progress").write_text(text)
        assert supervise._progress(tmp_path) == (0, None)
    (tmp_path / "progress").write_text('{"samples_done": 3, "left_s": null}')
    assert supervise._progress(tmp_path) == (3, None)


def test_a_units_expectation_follows_what_it_says_is_left(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one", WAIT_FOR_GO, expected_s=9999.0)))
    wait(lambda: 90 < status(work, "one").expected_s < 150)
    (work / "go").touch()
    wait(ended(work, "one"))


def test_the_command_line_takes_a_queue_from_stdin(work: Path) -> None:
    # The harness's own entry this time, with the null backend's module missing: a unit that fails by itself.
    value = spec("one", work_dir=str(work), module="no_such_module", loadgen_version="6.0.17")
    done = subprocess.run(
        [sys.executable, "-m", "fleet.harness", "start", str(work)],
        input=json.dumps(queue(value)), capture_output=True, text=True, cwd=TOP, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == {"queued": ["one"], "kept": [], "running": [], "refused": {}}
    wait(ended(work, "one"))
    assert "no_such_module" in status(work, "one").cause


def test_a_unit_that_dies_after_its_manifest_is_done(tmp_path: Path) -> None:
    """Taking an interpreter down beside native threads can abort; the work was finished before."""
    dead = subprocess.Popen([sys.executable, "-c", "import os; os.abort()"], stderr=subprocess.DEVNULL)
    dead.wait(timeout=20)
    assert supervise._verdict(dead, tmp_path, out_of_memory=False) == End(
        UnitState.FAILED, "killed by SIGABRT", Reason.OTHER
    )
    assert supervise._verdict(dead, tmp_path, out_of_memory=True) == End(
        UnitState.FAILED, "out of memory: killed by SIGABRT", Reason.OUT_OF_MEMORY
    )
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    assert supervise._verdict(dead, tmp_path, out_of_memory=True) == End(UnitState.DONE)
