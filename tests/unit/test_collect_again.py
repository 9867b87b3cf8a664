"""What collect makes of hosts that come back, of attempts after the first, and of this machine's own full disk."""

import errno
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fleet import collect, handoff
from fleet.handoff import Attempt, Collected, Plan, UnitRecord
from fleet.harness.contract import Reason, UnitState, read_spec, write_json
from fleet.inventory import reach
from fleet.session import Session
from fleet.terms import HostState
from tests.unit.collecting import UNIT, archive_of, entry, member, packed, planned, record, spec_of, unit_folder
from tests.unit.fakes import PackingConnection, RecordingWatch, answer, status

OTHER = UNIT.replace("performance", "accuracy")
HOME = Collected(folder=f"collect/h01/{UNIT}", complete=True, attempt=1)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> PackingConnection:
    """The connection behind reach.connect."""
    connection = PackingConnection()
    monkeypatch.setattr(reach, "connect", lambda _: connection)
    return connection


def again(folder: Path, **changes: Any) -> bytes:
    """The archive of a further attempt, whose files differ."""
    shutil.rmtree(folder, ignore_errors=True)
    unit_folder(folder, **changes)
    (folder / "mlperf_log_detail.txt").write_bytes(b":::MLLOG {}\n" * 7)
    remade(folder)
    return archive_of(folder.parent, folder.name)


def remade(folder: Path) -> None:
    """Make the manifest anew."""
    data = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    files = {
        path.relative_to(folder).as_posix(): asdict(entry(path))
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    write_json(folder / "manifest.json", {**data, "files": files, "spec_sha256": files["run_spec.json"]["sha256"]})


@pytest.mark.parametrize(
    ("state", "heard"),
    [
        *[(state, heard) for state in (UnitState.UNREACHABLE, UnitState.RUNNING, UnitState.QUEUED) for heard in (0, 1)],
        # Its disk is full, say, or it was left out: what it had been given it may have measured.
        (UnitState.NOT_READY, True),
        (UnitState.LEFT_OUT, True),
    ],
)
def test_a_host_that_comes_back_is_asked_anew_and_its_unit_completed(
    tmp_path: Path, host: PackingConnection, state: UnitState, heard: bool
) -> None:
    session = planned(tmp_path, UNIT)
    running = status(UNIT, UnitState.RUNNING) if heard else None
    lost = UnitRecord(unit=UNIT, host="h01", state=state, status=running, cause="gone", reason=Reason.UNREACHABLE)
    session.write(session.run / "units" / f"{UNIT}.json", lost)
    unit_folder(tmp_path / "host" / UNIT)
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    host.answers = [answer(status(UNIT))]
    assert collect.collect(session, RecordingWatch()) == {UNIT: HOME}
    found = handoff.records(session)[UNIT]
    assert (found.state, found.cause, found.reason, found.status) == (UnitState.DONE, "", Reason.NONE, status(UNIT))


def test_a_unit_that_still_runs_is_said_to_and_left_alone(tmp_path: Path, host: PackingConnection) -> None:
    session = planned(tmp_path, UNIT, state=UnitState.UNREACHABLE)
    host.answers = [answer(status(UNIT, UnitState.RUNNING))]
    found = collect.collect(session, RecordingWatch())[UNIT]
    assert found.cause == "still running there, as far as is known: fleet bench --session s1"
    assert handoff.records(session)[UNIT].state is UnitState.RUNNING
    assert host.copied == []


def test_a_unit_that_the_host_never_had_stays_what_it_was(tmp_path: Path, host: PackingConnection) -> None:
    session = planned(tmp_path, UNIT, state=UnitState.UNREACHABLE)
    host.answers, host.archives = [answer()], {UNIT: archive_of(tmp_path, UNIT)}
    assert collect.collect(session, RecordingWatch())[UNIT].cause == "the host has no files of it any more"
    assert handoff.records(session)[UNIT].state is UnitState.UNREACHABLE


def test_what_is_unreachable_still_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_: Any) -> Any:
        raise reach.Unreachable(HostState.UNREACHABLE, "timed out")

    monkeypatch.setattr(reach, "connect", away)
    session = planned(tmp_path, UNIT, OTHER, state=UnitState.UNREACHABLE)
    found = collect.collect(session, RecordingWatch())
    assert {(home.cause, home.reason) for home in found.values()} == {("timed out", Reason.UNREACHABLE)}


def test_a_host_that_falls_silent_is_not_waited_for_once_for_each_unit(
    tmp_path: Path, host: PackingConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, asked = planned(tmp_path, UNIT, OTHER), []

    def silent(command: str, **_: Any) -> reach.Answer:
        asked.append(command)
        raise reach.Unreachable(HostState.UNREACHABLE, "no answer in 15 s")

    monkeypatch.setattr(host, "run", silent)
    found = collect.collect(session, RecordingWatch())
    assert [(home.complete, home.reason) for home in found.values()] == [(False, Reason.UNREACHABLE)] * 2
    assert len(asked) == 2  # one unit, and whether the host is there at all


def test_the_verb_send_makes_the_archive_as_it_goes(tmp_path: Path, host: PackingConnection) -> None:
    session = planned(tmp_path, UNIT)
    unit_folder(tmp_path / "host" / UNIT)
    host.archives[UNIT], host.breaks_after = archive_of(tmp_path / "host", UNIT), 100
    assert collect.collect(session, RecordingWatch())[UNIT].reason is Reason.UNREACHABLE
    assert collect.collect(session, RecordingWatch())[UNIT] == HOME
    work = "/home/me/.mlperf-fleet"
    send = f"{work}/venv/bin/python {work}/harness/current send {work} {session.token} {UNIT}"
    assert host.copied == [f"{send} 0", f"{send} 100"]
    assert not [command for command in host.commands if command.startswith("rm")]


@pytest.mark.parametrize(
    ("state", "lies", "told"),
    [(UnitState.DONE, False, True), (UnitState.DONE, True, False), (UnitState.FAILED, False, True)],
)
def test_a_host_is_told_what_it_may_delete_some_day(
    tmp_path: Path, host: PackingConnection, state: UnitState, lies: bool, told: bool
) -> None:
    session = planned(tmp_path, UNIT, state=state)
    unit_folder(tmp_path / "host" / UNIT)
    (tmp_path / "host" / UNIT / "sub" / "empty").write_bytes(b"!" if lies else b"")
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    collect.collect(session, RecordingWatch())
    assert host.homed == ([UNIT] if told else [])


def earlier(session: Session) -> list[str]:
    return sorted(path.name for path in (session.collect / ".earlier").glob("*"))


def test_what_makes_room_for_a_later_attempt_is_kept(tmp_path: Path, host: PackingConnection) -> None:
    session = planned(tmp_path, UNIT)
    unit_folder(tmp_path / "host" / UNIT)
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    collector = collect.Collector(session)
    known = handoff.records(session)[UNIT]
    assert collector.bring(host, "/w", known) == HOME
    first = (session.collect / "h01" / UNIT / "mlperf_log_detail.txt").read_bytes()
    # The same files once more are nothing new.
    assert collector.bring(host, "/w", known) == HOME
    assert earlier(session) == []
    host.archives[UNIT] = again(tmp_path / "host" / UNIT)
    assert collector.bring(host, "/w", known) == HOME
    (kept,) = earlier(session)
    digest = entry(session.collect / "h01" / UNIT / "run_spec.json").sha256[:12]
    assert kept == f"{UNIT}.{digest}.1"
    assert (session.collect / ".earlier" / kept / "mlperf_log_detail.txt").read_bytes() == first


@pytest.mark.parametrize("state", [UnitState.FAILED, UnitState.DONE])
def test_an_attempt_that_failed_takes_no_good_ones_place(
    tmp_path: Path, host: PackingConnection, state: UnitState
) -> None:
    session = planned(tmp_path, UNIT)
    unit_folder(tmp_path / "host" / UNIT)
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    collector = collect.Collector(session)
    assert collector.bring(host, "/w", handoff.records(session)[UNIT]) == HOME
    first = (session.collect / "h01" / UNIT / "mlperf_log_detail.txt").read_bytes()
    # A further attempt: it failed, or its manifest lies.
    again(tmp_path / "host" / UNIT)
    (tmp_path / "host" / UNIT / "mlperf_log_detail.txt").write_bytes(b"cut sho")
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    record(session, UNIT, state, "killed")
    assert collector.bring(host, "/w", handoff.records(session)[UNIT]) == HOME
    assert (session.collect / "h01" / UNIT / "mlperf_log_detail.txt").read_bytes() == first
    (kept,) = earlier(session)
    assert (session.collect / ".earlier" / kept / "mlperf_log_detail.txt").read_bytes() == b"cut sho"
    assert handoff.collected(session) == {UNIT: HOME}


def test_a_unit_of_another_spec_makes_room_even_for_logs_of_a_failure(tmp_path: Path, host: PackingConnection) -> None:
    session = planned(tmp_path, UNIT)
    unit_folder(tmp_path / "host" / UNIT)
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    collect.Collector(session).bring(host, "/w", handoff.records(session)[UNIT])
    spec = replace(read_spec(session.collect / "h01" / UNIT / "run_spec.json"), user_conf="*.Offline.target_qps = 9\n")
    session.write(session.run / "plan.json", Plan(quick=False, units=(spec,)))
    record(session, UNIT, UnitState.FAILED, "killed")
    host.archives[UNIT] = again(tmp_path / "host" / UNIT)
    found = collect.Collector(session).bring(host, "/w", handoff.records(session)[UNIT])
    assert (found.complete, found.cause) == (False, "killed")
    assert len(earlier(session)) == 1


def test_a_further_fetch_that_breaks_off_forgets_nothing(tmp_path: Path, host: PackingConnection) -> None:
    session = planned(tmp_path, UNIT)
    unit_folder(tmp_path / "host" / UNIT)
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    collector = collect.Collector(session)
    collector.bring(host, "/w", handoff.records(session)[UNIT])
    host.archives[UNIT], host.breaks_after = again(tmp_path / "host" / UNIT), 50
    assert collector.bring(host, "/w", handoff.records(session)[UNIT]).reason is Reason.UNREACHABLE
    assert handoff.collected(session) == {UNIT: HOME}


def spec_with(**changes: Any) -> bytes:
    return json.dumps({**asdict(spec_of(UNIT)), **changes}).encode()


@pytest.mark.parametrize(
    "spec",
    [spec_with(lock=None), spec_with(lock=["a"]), spec_with(lock={"a": 1}), b"[" * 100_000, b"", b"null", b"\xff"],
    ids=range(7),
)
def test_a_spec_that_lies_under_a_manifest_that_matches_costs_its_unit_alone(
    tmp_path: Path, host: PackingConnection, spec: bytes
) -> None:
    session, folder = planned(tmp_path, UNIT, OTHER), tmp_path / "host" / UNIT
    unit_folder(folder)
    unit_folder(folder.with_name(OTHER))
    (folder / "run_spec.json").write_bytes(spec)
    remade(folder)
    host.archives = {unit: archive_of(tmp_path / "host", unit) for unit in (UNIT, OTHER)}
    found = collect.collect(session, RecordingWatch())
    assert (found[UNIT].complete, found[UNIT].reason) == (False, Reason.LOCK_CHANGED)
    assert found[OTHER].complete
    # A further round comes as far.
    assert collect.collect(session, RecordingWatch()) == found


@pytest.mark.parametrize(
    "members",
    [
        [member(f"{UNIT}/{'a/' * 1500}b")],
        [member(f"{UNIT}/{'a/' * 40}b")],
        [member(f"{UNIT}/x"), member(f"{UNIT}/x/y")],
        [member(f"{UNIT}/{'n' * 300}")],
    ],
    ids=["too deep for makedirs", "deep", "a file as a folder", "a long name"],
)
def test_files_that_no_disk_here_can_hold_are_the_hosts_fault(
    tmp_path: Path, host: PackingConnection, members: list[Any]
) -> None:
    session = planned(tmp_path, UNIT)
    host.archives[UNIT] = packed(tmp_path / "a.tar", *members).read_bytes()
    found = collect.collect(session, RecordingWatch())[UNIT]
    assert (found.complete, found.reason) == (False, Reason.CORRUPT_FILES)
    assert found.cause.startswith("the archive it sent cannot be used: ")
    assert list((session.collect / ".incoming").iterdir()) == []


def test_what_nobody_thought_of_is_a_cause_too(
    tmp_path: Path, host: PackingConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = planned(tmp_path, UNIT)
    unit_folder(tmp_path / "host" / UNIT)
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)

    def fails(_: Path) -> str:
        raise RecursionError

    monkeypatch.setattr(collect, "verify", fails)
    found = collect.collect(session, RecordingWatch())[UNIT]
    assert (found.cause, found.reason) == ("the archive it sent cannot be used: RecursionError", Reason.CORRUPT_FILES)
    assert handoff.collected(session) == {UNIT: found}


INVALID = (
    ':::MLLOG {"key": "effective_scenario", "value": "Offline"}\n'
    ':::MLLOG {"key": "effective_test_mode", "value": "PerformanceOnly"}\n'
    ':::MLLOG {"key": "result_validity", "value": "INVALID"}\n'
    ':::MLLOG {"key": "result_min_duration_met", "value": false}\n'
    ':::MLLOG {"key": "num_errors", "value": 0}\n'
)


@pytest.mark.parametrize(
    ("log", "reason", "cause"),
    [
        (INVALID, Reason.INVALID_RESULT, "INVALID: minimum duration not met"),
        (INVALID.replace('"INVALID"', '"VALID"'), Reason.NONE, ""),
        # No verdict of a log that cannot be read: what it is worth is the results' affair.
        ("\N{REPLACEMENT CHARACTER}", Reason.NONE, ""),
    ],
)
def test_loadgens_verdict_comes_home_with_the_files(
    tmp_path: Path, host: PackingConnection, log: str, reason: Reason, cause: str
) -> None:
    session, folder = planned(tmp_path, UNIT), tmp_path / "host" / UNIT
    unit_folder(folder)
    (folder / "mlperf_log_detail.txt").write_text(log, encoding="utf-8")
    remade(folder)
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    found = collect.Collector(session).bring(host, "/w", handoff.records(session)[UNIT])
    assert found == replace(HOME, reason=reason, cause=cause)


@pytest.mark.parametrize("where", ["transfer", "unpacking", "record"])
def test_this_machines_full_disk_is_said_and_loses_nothing(
    tmp_path: Path, host: PackingConnection, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    session = planned(tmp_path, UNIT)
    unit_folder(tmp_path / "host" / UNIT)
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    collector = collect.Collector(session)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "transfer":
            patch.setattr(host, "copy", full)
        elif where == "unpacking":
            patch.setattr(collect, "unpack", full)
        else:
            patch.setattr(Session, "write", full)
        found = collector.bring(host, "/w", handoff.records(session)[UNIT])
    if where == "record":
        assert found == HOME
    else:
        assert (found.complete, found.reason) == (False, Reason.NO_SPACE)
        assert found.cause.startswith("on this machine: No space left on device: free some space in ")
    assert collector.bring(host, "/w", handoff.records(session)[UNIT]) == HOME
    # An archive that came whole is not sent again.
    assert len(host.copied) == (1 if where == "transfer" else 2)
    assert earlier(session) == []


ONCE = Attempt(state=UnitState.DONE, reason=Reason.INVALID_RESULT, cause="INVALID: too short", ended_at=1.0)


def measured_again(tmp_path: Path, host: PackingConnection, **changes: Any) -> Session:
    """The first measurement is INVALID and home, the second was made and is not; its record with `changes`."""
    session, folder = planned(tmp_path, UNIT), tmp_path / "host" / UNIT
    unit_folder(folder)
    (folder / "mlperf_log_detail.txt").write_text(INVALID, encoding="utf-8")
    remade(folder)
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    first = handoff.records(session)[UNIT]
    assert collect.collect(session, RecordingWatch())[UNIT].reason is Reason.INVALID_RESULT
    again(folder)
    write_json(folder / "run_spec.json", replace(spec_of(UNIT), attempt=2))
    remade(folder)
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    best = replace(first, reason=Reason.INVALID_RESULT)
    record = replace(first, **{"attempts": (ONCE,), "best": best, **changes})
    session.write(session.run / "units" / f"{UNIT}.json", record)
    return session


def test_the_second_measurement_is_fetched_although_the_first_is_home(tmp_path: Path, host: PackingConnection) -> None:
    session = measured_again(tmp_path, host)
    host.breaks_after = 50
    collect.collect(session, RecordingWatch())
    assert handoff.missing(handoff.plan(session).units, handoff.records(session), handoff.collected(session)) == [UNIT]
    watch = RecordingWatch()
    found = collect.collect(session, watch)
    assert found == {UNIT: replace(HOME, attempt=2)}
    assert watch.lines[-1] == ("h01", "1 of 1 units verified")
    assert handoff.missing(handoff.plan(session).units, handoff.records(session), found) == []
    assert len(earlier(session)) == 1
    # It is home now, and nobody asks again.
    asked = len(host.commands)
    assert collect.collect(session, RecordingWatch()) == found
    assert len(host.commands) == asked


@pytest.mark.parametrize("state", [UnitState.DONE, UnitState.FAILED, UnitState.RUNNING])
def test_a_host_that_was_lost_during_the_second_measurement_is_asked_what_became_of_it(
    tmp_path: Path, host: PackingConnection, state: UnitState
) -> None:
    lost = {"state": UnitState.UNREACHABLE, "reason": Reason.UNREACHABLE, "cause": "no answer", "status": None}
    session = measured_again(tmp_path, host, **lost)
    host.answers = [answer(status(UNIT, state, cause="" if state is UnitState.DONE else "out of luck"))]
    home = collect.collect(session, RecordingWatch())[UNIT]
    found = handoff.records(session)[UNIT]
    if state is UnitState.DONE:
        assert (home, found.state, found.attempt, found.best) == (replace(HOME, attempt=2), state, 2, None)
        return
    assert (home.attempt, home.reason) == (1, Reason.INVALID_RESULT)
    if state is UnitState.RUNNING:
        assert (found.state, found.attempt) == (state, 2)
        assert found.best is not None
    else:
        assert (found.state, found.reason, found.attempt) == (UnitState.DONE, Reason.INVALID_RESULT, 1)
        assert [(item.state, item.cause) for item in found.later] == [(state, "out of luck")]


def test_a_second_measurement_whose_files_lie_is_kept_once_however_often_it_is_asked_for(
    tmp_path: Path, host: PackingConnection
) -> None:
    session = measured_again(tmp_path, host)
    (tmp_path / "host" / UNIT / "sub" / "empty").write_bytes(b"!")
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    for _ in range(3):
        home = collect.collect(session, RecordingWatch())[UNIT]
        assert (home.attempt, home.reason) == (1, Reason.INVALID_RESULT)
        assert len(earlier(session)) == 1
    assert handoff.missing(handoff.plan(session).units, handoff.records(session), handoff.collected(session)) == [UNIT]


def test_what_an_older_fleet_brought_home_is_not_fetched_again(tmp_path: Path, host: PackingConnection) -> None:
    session = measured_again(tmp_path, host)
    path = session.collect / "collected.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["units"][UNIT]["attempt"]
    path.write_text(json.dumps(data), encoding="utf-8")
    asked = len(host.commands)
    assert collect.collect(session, RecordingWatch())[UNIT].complete
    assert len(host.commands) == asked
