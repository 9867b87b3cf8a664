"""Units under their supervisor, with real processes: a stand-in for the harness's own entry does what a unit says."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fleet.harness import packing, processes, supervise, unit_queue
from fleet.harness.contract import RunSpec, SupervisorBeat, UnitState, UnitStatus, read_spec, write_json
from tests.unit.harness.units import TOP, queue, spec

# Started as `python FOLDER verb …`, as the harness is; `run` does what the unit's user_conf says.
ENTRY = f"""
import os, sys, subprocess, time
from pathlib import Path
sys.path.insert(0, {str(TOP)!r})
from fleet.harness import packing, processes, supervise, unit_queue
supervise.BEAT_SECONDS, processes.GRACE_SECONDS = 0.05, 1.0
verb, *rest = sys.argv[1:]
if verb == "supervise":
    with open(Path(rest[0], "pids"), "a") as notes:
        notes.write(f"{{os.getpid()}}\\n")
    sys.exit(supervise.supervise(Path(rest[0]), rest[1]))
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


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A work folder whose supervisors run ENTRY; what they started and noted is ended afterwards."""
    entry = tmp_path / "entry"
    entry.mkdir()
    (entry / "__main__.py").write_text(ENTRY, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(entry)])
    folder = tmp_path / "work"
    folder.mkdir()
    yield folder
    for pid in pids(folder):
        if ours(pid, tmp_path):
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


def unit(work: Path, name: str, does: str = "", **more: float) -> RunSpec:
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


def lines(work: Path) -> list[str]:
    return (work / "order").read_text(encoding="ascii").split()


def test_units_run_one_after_another_in_the_order_given(work: Path) -> None:
    specs = [unit(work, name, "time.sleep(0.1)") for name in ("b", "a", "c")]
    answer = unit_queue.start(work, queue(*specs))
    assert answer == {"queued": ["b", "a", "c"], "kept": [], "running": []}
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
    assert answer == {"queued": ["changed", "failed"], "kept": ["same"], "running": []}
    wait(ended(work, "changed", "failed"))
    assert not stray.exists()
    assert (work / "runs" / "s" / "same" / "manifest.json").stat().st_mtime_ns == kept
    assert status(work, "failed").state is UnitState.DONE


def test_a_running_unit_is_left_alone(work: Path) -> None:
    one = unit(work, "one", WAIT_FOR_GO)
    unit_queue.start(work, queue(one))
    wait(running(work, "one"))
    assert unit_queue.start(work, queue(one)) == {"queued": [], "kept": [], "running": ["one"]}
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
    ("name", "cause"),
    [
        ("SIGKILL", "killed by SIGKILL: out of memory?"),
        ("SIGSEGV", "killed by SIGSEGV"),
        ("SIGABRT", "killed by SIGABRT"),
    ],
)
def test_a_killed_unit_says_by_which_signal(work: Path, name: str, cause: str) -> None:
    does = f"import resource, signal; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.kill(os.getpid(), signal.{name})"
    unit_queue.start(work, queue(unit(work, "one", does)))
    wait(ended(work, "one"))
    found = status(work, "one")
    assert (found.state, found.cause) == (UnitState.FAILED, cause)


def test_an_error_the_harness_wrote_is_the_cause(work: Path) -> None:
    does = "write_json(folder / 'error.json', {'cause': 'ValueError: no weights'}); sys.exit(1)"
    unit_queue.start(work, queue(unit(work, "one", does)))
    wait(ended(work, "one"))
    assert status(work, "one").cause == "ValueError: no weights"


def test_success_without_a_manifest_is_none(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one", "sys.exit(0)")))
    wait(ended(work, "one"))
    assert status(work, "one").state is UnitState.FAILED


def test_cancel_stops_the_running_unit_and_the_queue(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one", CHILD + "time.sleep(60)"), unit(work, "two")))
    wait(running(work, "one"))
    assert unit_queue.cancel(work, "s") is True
    wait(ended(work, "one", "two"))
    assert {(status(work, name).state, status(work, name).cause) for name in ("one", "two")} == {
        (UnitState.INTERRUPTED, "cancelled")
    }
    wait(idle(work), 5)
    assert lines(work) == ["+one"]
    assert unit_queue.cancel(work, "unknown") is False
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


def test_a_killed_supervisors_unit_starts_over_with_the_next(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit_queue.start(work, queue(unit(work, "one", "time.sleep(60)")))
    wait(running(work, "one"))
    for pid in pids(work):
        os.kill(pid, signal.SIGKILL)
    wait(idle(work), 5)
    assert status(work, "one").state is UnitState.RUNNING
    monkeypatch.setattr(unit_queue, "FRESH_SECONDS", 0.001)
    time.sleep(0.01)
    assert unit_queue.start(work, queue(unit(work, "one", "pass")))["queued"] == ["one"]
    wait(lambda: status(work, "one").state is UnitState.DONE)


def test_the_unit_of_a_killed_supervisor_does_not_run_beside_the_next(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit_queue.start(work, queue(unit(work, "one", "time.sleep(60)")))
    wait(running(work, "one"))
    supervisor, first = pids(work)
    os.kill(supervisor, signal.SIGKILL)
    wait(lambda: not ours(supervisor, work.parent))
    monkeypatch.setattr(unit_queue, "FRESH_SECONDS", 0.001)
    time.sleep(0.01)
    unit_queue.start(work, queue(unit(work, "one", "pass")))
    wait(lambda: status(work, "one").state is UnitState.DONE)
    assert not ours(first, work.parent)
    assert lines(work) == ["+one", "+one", "-one"]


def owner(work: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((work / "supervisor.lock").read_text(encoding="utf-8"))
    return found


def test_an_orphan_is_ended_by_the_next_supervisor_whoever_sent_it(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one", CHILD + "time.sleep(60)"), unit(work, "two")))
    wait(running(work, "one"))
    supervisor, first, child = pids(work)
    wait(lambda: owner(work)["unit"] == first)
    assert owner(work)["supervisor"] == supervisor
    os.kill(supervisor, signal.SIGKILL)
    wait(lambda: not ours(supervisor, work.parent))
    assert ours(first, work.parent)
    unit_queue.start(work, {**queue(unit(work, "other")), "session": "s2"})
    wait(lambda: (found := unit_queue.read_status(work / "runs" / "s2" / "other")) is not None and found.state.ended)
    assert not ours(first, work.parent)
    assert not ours(child, work.parent)
    assert lines(work) == ["+one", "+other", "-other"]


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


def read_beat(path: Path) -> SupervisorBeat:
    return SupervisorBeat(**json.loads(path.read_text(encoding="utf-8")))


def test_only_the_noted_unit_of_a_dead_supervisor_is_ended(work: Path) -> None:
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    waiting = supervise.Supervisor(work, "s")
    right = {"supervisor": 2**22 + 1, "unit": stranger.pid, "folder": "60", "boot_id": processes.boot_id()}

    def end_orphan(note: str) -> int | None:
        (work / "supervisor.lock").write_text(note, encoding="utf-8")
        waiting._end_orphan()
        time.sleep(0.02)
        return stranger.poll()

    try:
        for note in ("", "{", "[]", "3", '{"unit": 1}'):
            assert end_orphan(note) is None
        # Numbers are used again, by other programs and after a reboot.
        assert end_orphan(json.dumps(right | {"folder": "/w/runs/s/u"})) is None
        assert end_orphan(json.dumps(right | {"boot_id": "another"})) is None
        (work / "supervisor.lock").write_text(json.dumps(right), encoding="utf-8")
        waiting._end_orphan()
        assert stranger.wait(5) == -signal.SIGKILL
    finally:
        stranger.kill()
        stranger.wait()


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


def test_pack_has_every_file_of_the_unit_and_is_the_same_each_time(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one")))
    wait(ended(work, "one"))
    told = packing.pack(work, "s", "one")
    data = Path(told["archive"]).read_bytes()
    assert (told["size"], told["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    with tarfile.open(told["archive"]) as archive:
        names = {name for name in archive.getnames() if archive.getmember(name).isfile()}
    folder = work / "runs" / "s" / "one"
    assert names == {f"one/{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file()}
    Path(told["archive"]).unlink()
    assert packing.pack(work, "s", "one") == told


def test_pack_skips_nothing_and_depends_on_nothing_but_the_unit(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = work / "runs" / "s" / "one"
    for name in ("z", ".hidden", "deep/er/b", "deep/a", "with space", "nul\xe9"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 1000)
    (folder / "empty").touch()
    (folder / "empty folder").mkdir()
    (folder.parent / "another").mkdir()
    (folder.parent / "another" / "file").touch()
    told = packing.pack(work, "s", "one")
    data = Path(told["archive"]).read_bytes()
    with tarfile.open(told["archive"]) as archive:
        archive.extractall(work / "unpacked", filter="data")
    assert tree(work / "unpacked" / "one") == tree(folder)
    assert [path.name for path in (work / "unpacked").iterdir()] == ["one"]
    # gzip would write the hour into its head, and a folder lists its files in no order.
    unsorted = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(unsorted(self, pattern), reverse=True))
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert packing.pack(work, "s", "one") == told
    assert Path(told["archive"]).read_bytes() == data
    (folder / "z").write_bytes(b"another")
    assert packing.pack(work, "s", "one")["sha256"] != told["sha256"]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: a file's bytes, None for a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def test_pack_of_a_unit_that_is_gone_is_empty(work: Path) -> None:
    with tarfile.open(packing.pack(work, "s", "gone")["archive"]) as archive:
        assert archive.getnames() == []


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


def test_a_units_expectation_follows_what_it_says_is_left(tmp_path: Path) -> None:
    begun = UnitStatus(unit="one", state=UnitState.RUNNING, started_at=100.0, heartbeat_at=160.0, expected_s=9999.0)
    assert supervise._expected(begun, None) == 9999.0
    assert supervise._expected(begun, 540.0) == pytest.approx(600.0)
    for text in ("", "7", '{"samples_done": 7}', '{"samples_done": "x", "left_s": 1}'):
        (tmp_path / "progress").write_text(text)
        assert supervise._progress(tmp_path) == (0, None)
    (tmp_path / "progress").write_text('{"samples_done": 3, "left_s": null}')
    assert supervise._progress(tmp_path) == (3, None)


def test_the_command_line_takes_a_queue_from_stdin(work: Path) -> None:
    # The harness's own entry this time, with the null backend's module missing: a unit that fails by itself.
    value = spec("one", work_dir=str(work), module="no_such_module", loadgen_version="6.0.17")
    done = subprocess.run(
        [sys.executable, "-m", "fleet.harness", "start", str(work)],
        input=json.dumps(queue(value)), capture_output=True, text=True, cwd=TOP, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == {"queued": ["one"], "kept": [], "running": []}
    wait(ended(work, "one"))
    assert "no_such_module" in status(work, "one").cause


def test_a_unit_that_dies_after_its_manifest_is_done(tmp_path: Path) -> None:
    """Taking an interpreter down beside native threads can abort; the work was finished before."""
    dead = subprocess.Popen([sys.executable, "-c", "import os; os.abort()"], stderr=subprocess.DEVNULL)
    dead.wait(timeout=20)
    assert supervise._verdict(dead, tmp_path) == (UnitState.FAILED, "killed by SIGABRT")
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    assert supervise._verdict(dead, tmp_path) == (UnitState.DONE, "")
