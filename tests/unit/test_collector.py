"""Units on their way home: transfers that break off, hosts that announce what is not so, and units that never ran."""

import gzip
import hashlib
import io
import json
import os
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fleet import collect, handoff
from fleet.handoff import Collected, Plan
from fleet.harness import packing
from fleet.harness.contract import UnitState
from fleet.inventory import reach
from fleet.terms import HostState
from tests.unit.collecting import UNIT, archive_of, member, packed, planned, record, spec_of, unit_folder
from tests.unit.fakes import PackingConnection, RecordingWatch
from tests.unit.harness.units import TOP


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> PackingConnection:
    """The connection behind reach.connect."""
    connection = PackingConnection()
    monkeypatch.setattr(reach, "connect", lambda _: connection)
    return connection


def offsets(host: PackingConnection) -> list[int]:
    """From which byte on archives were sent for."""
    return [int(command.split()[-1]) for command in host.copied]


def test_done_units_come_home_verified_and_only_once(tmp_path: Path, host: PackingConnection) -> None:
    session = planned(tmp_path, UNIT)
    unit_folder(tmp_path / "host" / UNIT)
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    watch = RecordingWatch()
    found = collect.collect(session, watch)
    assert found == {UNIT: Collected(folder=f"collect/h01/{UNIT}", complete=True, attempt=1)}
    assert (session.collect / "h01" / UNIT / "sub" / "empty").is_file()
    assert list((session.collect / ".incoming").iterdir()) == []
    assert handoff.collected(session) == found
    assert watch.ended == ["h01"]
    (pack,) = host.commands
    assert f"pack /home/me/.mlperf-fleet {session.token} {UNIT};" in pack
    assert collect.collect(session, watch) == found
    assert len(host.commands) == 1
    assert host.closed == 1


def test_a_transfer_that_broke_off_goes_on_where_it_stopped(tmp_path: Path, host: PackingConnection) -> None:
    session = planned(tmp_path, UNIT)
    unit_folder(tmp_path / "host" / UNIT)
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    host.breaks_after = 100
    broken = collect.collect(session, RecordingWatch())[UNIT]
    assert (broken.complete, broken.cause) == (False, "while its files were fetched: nothing came for 30 s")
    (partial,) = (session.collect / ".incoming").iterdir()
    assert partial.stat().st_size == 100
    assert collect.collect(session, RecordingWatch())[UNIT].complete
    assert offsets(host) == [0, 100]


def test_a_part_of_another_archive_is_not_gone_on_with(tmp_path: Path, host: PackingConnection) -> None:
    session = planned(tmp_path, UNIT)
    unit_folder(tmp_path / "host" / UNIT)
    host.archives[UNIT], host.breaks_after = b"something else" * 30, 100
    collect.collect(session, RecordingWatch())
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    assert collect.collect(session, RecordingWatch())[UNIT].complete
    assert offsets(host)[-1] == 0
    assert list((session.collect / ".incoming").iterdir()) == []


def test_a_unit_that_ran_again_by_another_spec_is_fetched_again(tmp_path: Path, host: PackingConnection) -> None:
    session = planned(tmp_path, UNIT)
    unit_folder(tmp_path / "host" / UNIT)
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    collect.collect(session, RecordingWatch())
    longer = replace(spec_of(UNIT), user_conf="*.Offline.min_duration = 600000\n")
    session.write(session.run / "plan.json", Plan(quick=False, units=(longer,)))
    found = collect.collect(session, RecordingWatch())[UNIT]
    assert len(host.copied) == 2
    assert (found.complete, found.cause) == (False, "it ran by another spec than was planned: fleet run")


def test_units_that_never_ran_have_their_cause(tmp_path: Path) -> None:
    session = planned(tmp_path, UNIT, state=UnitState.NOT_READY)
    record(session, UNIT, UnitState.NOT_READY, "no venv")
    found = collect.collect(session, RecordingWatch())
    assert found[UNIT] == Collected(folder="", complete=False, cause="no venv")
    assert handoff.collected(session) == found


def test_a_failed_units_files_come_home_and_say_so(tmp_path: Path, host: PackingConnection) -> None:
    session = planned(tmp_path, UNIT, state=UnitState.FAILED)
    record(session, UNIT, UnitState.FAILED, "killed by SIGKILL")
    (tmp_path / "host" / UNIT).mkdir(parents=True)
    (tmp_path / "host" / UNIT / "harness.log").write_text("last words", encoding="utf-8")
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    found = collect.collect(session, RecordingWatch())
    assert found[UNIT] == Collected(folder=f"collect/h01/{UNIT}", complete=False, cause="killed by SIGKILL")
    assert (session.collect / "h01" / UNIT / "harness.log").is_file()


def test_a_lying_unit_does_not_spoil_the_others(tmp_path: Path, host: PackingConnection) -> None:
    other = UNIT.replace("performance", "accuracy")
    session = planned(tmp_path, UNIT, other)
    for unit in (UNIT, other):
        unit_folder(tmp_path / "host" / unit)
    (tmp_path / "host" / UNIT / "sub" / "empty").write_bytes(b"!")
    host.archives = {unit: archive_of(tmp_path / "host", unit) for unit in (UNIT, other)}
    found = collect.collect(session, RecordingWatch())
    assert found[other].complete
    assert not found[UNIT].complete
    assert "sub/empty" in found[UNIT].cause


def test_a_unit_the_host_lost_is_said(tmp_path: Path, host: PackingConnection) -> None:
    session = planned(tmp_path, UNIT)
    host.archives[UNIT] = archive_of(tmp_path, UNIT)
    assert collect.collect(session, RecordingWatch())[UNIT].cause == "the host has no files of it any more"


def test_a_host_that_cannot_pack_says_why(tmp_path: Path, host: PackingConnection) -> None:
    session = planned(tmp_path, UNIT)
    cause = collect.collect(session, RecordingWatch())[UNIT].cause
    assert cause == "the archive it sent cannot be used: OSError: no room for the archive"
    assert host.copied == []


def test_a_host_that_could_not_be_asked_has_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_: Any) -> Any:
        raise reach.Unreachable(HostState.UNREACHABLE, "timed out")

    monkeypatch.setattr(reach, "connect", away)
    session, watch = planned(tmp_path, UNIT), RecordingWatch()
    assert collect.collect(session, watch)[UNIT].cause == "timed out"
    assert watch.ended == ["h01"]


@pytest.mark.parametrize(
    ("announced", "said"),
    [
        ({"sha256": "../../../etc/passwd"}, "sha256"),
        ({"sha256": "0" * 63 + "G"}, "sha256"),
        ({"sha256": "0" * 64 + "\n"}, "sha256"),
        ({"sha256": "A" * 64}, "sha256"),
        ({"sha256": None}, "sha256"),
        ({"sha256": "0" * 64}, "its sha256 is not the one announced"),
        ({"size": -1}, "size"),
        ({"size": 2**40}, "more than 4 GiB"),
        ({"size": 10**400}, "more than 4 GiB"),
        ({"size": "all of it"}, "size"),
        ({"size": 3}, "it sends more than it announced"),
    ],
)
def test_what_a_host_announces_is_not_believed(
    tmp_path: Path, host: PackingConnection, announced: dict[str, Any], said: str
) -> None:
    session = planned(tmp_path, UNIT)
    unit_folder(tmp_path / "host" / UNIT)
    host.archives[UNIT], host.announced = archive_of(tmp_path / "host", UNIT), announced
    found = collect.collect(session, RecordingWatch())[UNIT]
    assert not found.complete
    assert said in found.cause
    assert found.cause.isprintable()
    assert {path.parent for path in tmp_path.rglob("*.tar")} <= {session.collect / ".incoming"}
    # It is asked again each time, and once it says the truth all is well.
    host.announced = {}
    assert collect.collect(session, RecordingWatch())[UNIT].complete


@pytest.mark.parametrize("size", [2**40, 4 * 2**30 + 1])
def test_nothing_is_sent_for_that_is_too_large_to_be_taken(tmp_path: Path, host: PackingConnection, size: int) -> None:
    session = planned(tmp_path, UNIT)
    host.archives[UNIT], host.announced = b"x", {"size": size}
    collect.collect(session, RecordingWatch())
    assert host.copied == []
    assert list((session.collect / ".incoming").iterdir()) == []


@pytest.mark.parametrize("words", ["", "Traceback", "{}", "[]", "null", '{"archive": "/a", "size": 1', "\x1b[31m"])
def test_an_answer_of_pack_that_is_none_is_the_cause(
    tmp_path: Path, host: PackingConnection, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setattr(host, "run", lambda *_, **__: reach.Answer(rc=0, out=words, err=""))
    found = collect.collect(planned(tmp_path, UNIT), RecordingWatch())[UNIT]
    assert not found.complete
    assert found.cause.startswith("the archive it sent cannot be used: ")
    assert found.cause.isprintable()


def test_a_damaged_transfer_is_thrown_away_and_made_anew(tmp_path: Path, host: PackingConnection) -> None:
    session = planned(tmp_path, UNIT)
    unit_folder(tmp_path / "host" / UNIT)
    host.archives[UNIT], host.breaks_after = archive_of(tmp_path / "host", UNIT), 100
    collect.collect(session, RecordingWatch())
    (partial,) = (session.collect / ".incoming").iterdir()
    partial.write_bytes(b"?" + partial.read_bytes()[1:])
    found = collect.collect(session, RecordingWatch())[UNIT]
    assert found.cause == "the archive it sent cannot be used: its sha256 is not the one announced"
    assert list((session.collect / ".incoming").iterdir()) == []
    assert collect.collect(session, RecordingWatch())[UNIT].complete
    assert offsets(host) == [0, 100, 0]


def test_an_archive_that_was_whole_when_the_controller_died_is_not_sent_again(
    tmp_path: Path, host: PackingConnection
) -> None:
    session = planned(tmp_path, UNIT)
    unit_folder(tmp_path / "host" / UNIT)
    data = host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    incoming = session.collect / ".incoming"
    incoming.mkdir(parents=True)
    (incoming / f"{UNIT}.{hashlib.sha256(data).hexdigest()}.tar").write_bytes(data)
    assert collect.collect(session, RecordingWatch())[UNIT].complete
    assert offsets(host) == [len(data)]


def test_a_broken_transfer_of_one_unit_leaves_those_of_others_alone(tmp_path: Path, host: PackingConnection) -> None:
    other = UNIT.replace("performance", "accuracy")
    session = planned(tmp_path, UNIT, other)
    for unit in (UNIT, other):
        unit_folder(tmp_path / "host" / unit)
    host.archives = {unit: archive_of(tmp_path / "host", unit) for unit in (UNIT, other)}
    host.breaks_after = 100
    found = collect.collect(session, RecordingWatch())
    assert [found[unit].complete for unit in (UNIT, other)] == [False, True]
    (partial,) = (session.collect / ".incoming").iterdir()
    assert partial.name.startswith(UNIT)
    # Only what is missing is asked for again.
    assert collect.collect(session, RecordingWatch())[UNIT].complete
    assert [
        command.partition(f"{session.token} ")[2].partition(";")[0] for command in host.commands if " pack " in command
    ] == [UNIT, other, UNIT]


def test_the_harness_and_the_shell_do_what_is_asked_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No stand-in: this machine is the host, with its own `pack` and `send`, in a folder with a space."""
    session = planned(tmp_path, UNIT)
    work = tmp_path / "w o"
    folder = work / "runs" / session.token / UNIT
    unit_folder(folder)
    (work / "venv" / "bin").mkdir(parents=True)
    (work / "venv" / "bin" / "python").symlink_to(sys.executable)
    (work / "harness" / "current").mkdir(parents=True)
    start = f"import sys; sys.path.insert(0, {str(TOP)!r}); from fleet.harness.__main__ import main; sys.exit(main())\n"
    (work / "harness" / "current" / "__main__.py").write_text(start, encoding="utf-8")
    rows = tuple(replace(item, work_dir=str(work)) for item in handoff.readiness(session))
    session.write(session.provision / "readiness.json", handoff.ReadinessFile(hosts=rows))
    monkeypatch.setattr(reach, "connect", lambda _: reach.LocalConnection())
    packed_here = packing.pack(work, session.token, UNIT)
    begun = session.collect / ".incoming" / f"{UNIT}.{packed_here['sha256']}.tar"
    begun.parent.mkdir(parents=True)
    whole = io.BytesIO()
    packing.send(work, session.token, UNIT, 0, whole)
    begun.write_bytes(whole.getvalue()[:123])
    found = collect.collect(session, RecordingWatch())[UNIT]
    assert found == Collected(folder=f"collect/h01/{UNIT}", complete=True, attempt=1)
    for path in folder.rglob("*"):
        if path.is_file():
            assert (session.collect / "h01" / UNIT / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert not (work / "tmp").exists()
    assert list(begun.parent.iterdir()) == []


def test_units_of_several_hosts_brought_at_once_are_all_kept(tmp_path: Path) -> None:
    units = [f"h01.tiny-bert.Offline.u{number}" for number in range(24)]
    session = planned(tmp_path, *units)
    for unit in units:
        unit_folder(tmp_path / "host" / unit)
    archives = {unit: archive_of(tmp_path / "host", unit) for unit in units}
    collector = collect.Collector(session)

    def bring(unit: str) -> Collected:
        return collector.bring(PackingConnection(archives=archives), "/w", handoff.records(session)[unit])

    with ThreadPoolExecutor(8) as pool:
        assert all(home.complete for home in pool.map(bring, units))
    assert handoff.collected(session) == {
        unit: Collected(folder=f"collect/h01/{unit}", complete=True, attempt=1) for unit in units
    }
    assert all(collect.Collector(session).is_home(unit) for unit in units)


def test_a_host_that_sends_less_than_it_announced_has_broken_off(tmp_path: Path, host: PackingConnection) -> None:
    session = planned(tmp_path, UNIT)
    host.archives[UNIT] = b"half"
    host.announced = {"size": 8}
    assert collect.collect(session, RecordingWatch())[UNIT].cause.endswith("the transfer broke off")


def test_units_noted_from_many_threads_are_all_kept(tmp_path: Path) -> None:
    units = [f"h01.tiny-bert.Offline.u{number}" for number in range(40)]
    session = planned(tmp_path, *units)
    collector = collect.Collector(session)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda unit: collector.note(unit, Collected(folder="", complete=False, cause=unit)), units))
    assert {unit: home.cause for unit, home in handoff.collected(session).items()} == {unit: unit for unit in units}


def broken(how: str) -> bytes:
    data = gzip.compress(b"".join(os.urandom(512) for _ in range(64)))
    if how == "evil":
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz") as archive:
            evil, _ = member("../evil")
            archive.addfile(evil, io.BytesIO(b"x"))
        return stream.getvalue()
    return {"empty": b"", "text": b"hello", "noise": data, "short": data[:100]}[how]


@pytest.mark.parametrize("how", ["empty", "text", "noise", "short", "evil"])
def test_a_broken_archive_is_the_cause(tmp_path: Path, host: PackingConnection, how: str) -> None:
    session = planned(tmp_path, UNIT)
    host.archives[UNIT] = broken(how)
    found = collect.collect(session, RecordingWatch())
    assert found[UNIT].cause.startswith("the archive it sent cannot be used: ")
    assert not found[UNIT].complete
    assert list((session.collect / ".incoming").iterdir()) == []


@pytest.mark.parametrize("kind", ["w:gz", "w:xz"])
def test_a_damaged_archive_is_the_cause_wherever_the_damage_is(
    tmp_path: Path, host: PackingConnection, kind: str
) -> None:
    session = planned(tmp_path, UNIT)
    text = json.dumps([asdict(spec_of(UNIT)) for _ in range(3)]).encode() + os.urandom(20_000).hex().encode()
    whole = packed(tmp_path / "whole.tar", member(f"{UNIT}/a", text), mode=kind).read_bytes()
    for place in range(0, len(whole), 997):
        host.archives[UNIT] = (
            whole[:place] + bytes(byte ^ 0xFF for byte in whole[place : place + 40]) + whole[place + 40 :]
        )
        assert not collect.collect(session, RecordingWatch())[UNIT].complete
