"""What comes from a host is not trusted: archives that reach out, and manifests that lie."""

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleet import collect, handoff
from fleet.handoff import Collected, Plan, UnitRecord
from fleet.harness.contract import FileEntry, RunManifest, RunSpec, UnitState, UnitStatus, write_json
from fleet.inventory import reach
from fleet.session import Session
from fleet.terms import HostState
from tests.unit.fakes import PackingConnection, RecordingWatch, scene
from tests.unit.results.session_files import Unit
from tests.unit.results.session_files import spec as make_spec

UNIT = "h01.tiny-bert.Offline.performance"


def member(name: str, data: bytes = b"x", **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    for key, value in more.items():
        setattr(entry, key, value)
    return entry, data


def packed(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for entry, data in members:
            archive.addfile(entry, io.BytesIO(data) if entry.isreg() else None)
    return path


def test_files_of_the_units_asked_for_are_extracted(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tar", member("u", b"", type=tarfile.DIRTYPE), member("u/a"), member("u/deep/b", b"bb"))
    collect.unpack(path, tmp_path / "out", ["u"])
    assert (tmp_path / "out" / "u" / "deep" / "b").read_bytes() == b"bb"


@pytest.mark.parametrize(
    "bad",
    [
        member("../evil"),
        member("u/../../evil"),
        member("/etc/evil"),
        member("//u/evil"),
        member("other/evil"),
        member(""),
        member("."),
        member("u/evil\nname"),
        member("u/evil\x1b[31m"),
        member("u/evil", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("u/evil", b"", type=tarfile.SYMTYPE, linkname="a"),
        member("u/evil", b"", type=tarfile.LNKTYPE, linkname="u/a"),
        member("u/evil", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("u/evil", b"", type=tarfile.BLKTYPE),
        member("u/evil", b"", type=tarfile.FIFOTYPE),
    ],
    ids=lambda bad: repr(bad[0].name) + bad[0].type.decode(),
)
def test_anything_else_is_refused(tmp_path: Path, bad: tuple[tarfile.TarInfo, bytes]) -> None:
    path = packed(tmp_path / "in" / "a.tar", member("u/a"), bad)
    with pytest.raises((ValueError, tarfile.TarError)):
        collect.unpack(path, tmp_path / "in" / "out", ["u"])
    assert not [name for name in tmp_path.rglob("*") if "evil" in name.name]


def test_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed(tmp_path / "a.tar", *(member(f"u/{number}", b"12345") for number in range(4)))
    monkeypatch.setattr(collect, "MEMBER_LIMIT", 3)
    with pytest.raises(ValueError, match="more than 3 files"):
        collect.unpack(path, tmp_path / "one", ["u"])
    monkeypatch.setattr(collect, "MEMBER_LIMIT", 4)
    collect.unpack(path, tmp_path / "two", ["u"])
    monkeypatch.setattr(collect, "BYTE_LIMIT", 19)
    with pytest.raises(ValueError, match="more than"):
        collect.unpack(path, tmp_path / "three", ["u"])


def test_modes_and_owners_of_the_host_are_not_taken_over(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tar", member("u/a", mode=0o6777, uid=12345))
    collect.unpack(path, tmp_path / "out", ["u"])
    found = (tmp_path / "out" / "u" / "a").stat()
    assert not found.st_mode & 0o6000
    assert found.st_uid == os.getuid()


def unit_folder(folder: Path, unit: str | None = None, **changes: Any) -> RunManifest:
    """A unit as its host leaves it."""
    (folder / "sub").mkdir(parents=True)
    write_json(folder / "run_spec.json", spec_of(unit or folder.name))
    (folder / "mlperf_log_detail.txt").write_bytes(b":::MLLOG {}\n" * 5)
    (folder / "sub" / "empty").write_bytes(b"")
    manifest = RunManifest(
        unit=unit or folder.name, spec_sha256=entry(folder / "run_spec.json").sha256, started_at=1.0, finished_at=2.0, loadgen_s=1.0,
        versions={}, accuracy={}, model={}, labels=(),
        files={
            path.relative_to(folder).as_posix(): entry(path) for path in sorted(folder.rglob("*")) if path.is_file()
        },
    )  # fmt: skip
    manifest = replace(manifest, **changes)
    write_json(folder / "manifest.json", manifest)
    return manifest


def entry(path: Path) -> FileEntry:
    return FileEntry(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size=path.stat().st_size)


def test_an_honest_folder_is_complete(tmp_path: Path) -> None:
    unit_folder(tmp_path / "u")
    assert collect.verify(tmp_path / "u") == ""
    for name in ("status.json", "progress", "progress.partial"):
        (tmp_path / "u" / name).write_text("{}", encoding="utf-8")
    assert collect.verify(tmp_path / "u") == ""


@pytest.mark.parametrize("name", ["stray", "sub/status.json", "sub/manifest.json", "status.json.bak"])
def test_a_file_that_nobody_listed_is_found(tmp_path: Path, name: str) -> None:
    unit_folder(tmp_path / "u")
    (tmp_path / "u" / name).write_text("{}", encoding="utf-8")
    assert collect.verify(tmp_path / "u") == f"{name} is not in the manifest"


def lie(change: Callable[[Path], object], said: str) -> Any:
    return pytest.param(change, said, id=said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        lie(lambda u: (u / "manifest.json").unlink(), "it has no manifest.json"),
        lie(lambda u: (u / "manifest.json").write_text("{}"), "manifest.json cannot be read"),
        lie(lambda u: (u / "manifest.json").write_text('{"unit'), "manifest.json cannot be read: "),
        lie(lambda u: (u / "sub" / "empty").unlink(), "sub/empty is in the manifest and not among the files"),
        lie(lambda u: (u / "sub" / "empty").write_text("x"), "sub/empty: 1 bytes, the manifest says 0"),
        lie(lambda u: (u / "mlperf_log_detail.txt").write_bytes(b":::MLLOG []\n" * 5), "its sha256 is not"),
    ],
)
def test_every_lie_is_named(tmp_path: Path, change: Callable[[Path], object], said: str) -> None:
    unit_folder(tmp_path / "u")
    change(tmp_path / "u")
    assert said in collect.verify(tmp_path / "u")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/../../outside"])
def test_a_manifest_that_points_out_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_text("x", encoding="utf-8")
    manifest = unit_folder(tmp_path / "u")
    files = {**manifest.files, name: entry(tmp_path / "outside")}
    write_json(tmp_path / "u" / "manifest.json", replace(manifest, files=files))
    assert collect.verify(tmp_path / "u") == f"manifest.json names {name!r}"


def test_another_run_spec_is_found(tmp_path: Path) -> None:
    unit_folder(tmp_path / "u", spec_sha256="0" * 64)
    assert "run_spec.json is not the one" in collect.verify(tmp_path / "u")


def test_a_manifest_that_lists_nothing_is_found(tmp_path: Path) -> None:
    unit_folder(tmp_path / "u", files={}, spec_sha256="")
    assert "run_spec.json is not the one" in collect.verify(tmp_path / "u")


def test_a_log_that_the_manifest_leaves_out_is_found(tmp_path: Path) -> None:
    manifest = unit_folder(tmp_path / "u")
    files = {name: value for name, value in manifest.files.items() if name != "mlperf_log_detail.txt"}
    write_json(tmp_path / "u" / "manifest.json", replace(manifest, files=files))
    assert collect.verify(tmp_path / "u") == "mlperf_log_detail.txt is not in the manifest"


def test_the_files_of_another_unit_are_found(tmp_path: Path) -> None:
    unit_folder(tmp_path / UNIT, unit="h02.tiny-bert.Offline.performance")
    assert collect.verify(tmp_path / UNIT) == "manifest.json is of 'h02.tiny-bert.Offline.performance'"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_found(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "u"
    if not folder.exists():
        unit_folder(folder)
    path = data.draw(st.sampled_from([folder / "mlperf_log_detail.txt", folder / "run_spec.json"]))
    before = path.read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    flip = data.draw(st.integers(1, 255))
    path.write_bytes(before[:place] + bytes([before[place] ^ flip]) + before[place + 1 :])
    try:
        assert path.name in collect.verify(folder)
    finally:
        path.write_bytes(before)
    assert collect.verify(folder) == ""


def planned(base: Path, *units: str, state: UnitState = UnitState.DONE) -> Session:
    """A session whose run stage has been; `units` by full name."""
    session = scene(base).session
    session.write(session.run / "plan.json", Plan(quick=False, units=tuple(spec_of(unit) for unit in units)))
    for unit in units:
        record(session, unit, state)
    return session


def spec_of(unit: str) -> RunSpec:
    return replace(make_spec("h01", Unit()), unit=unit)


def record(session: Session, unit: str, state: UnitState, cause: str = "") -> None:
    value = UnitRecord(
        unit=unit, host="h01", state=state, cause=cause,
        status=None if state is UnitState.NOT_READY else UnitStatus(unit=unit, state=state),
    )  # fmt: skip
    session.write(session.run / "units" / f"{unit}.json", value)


def archive_of(folder: Path, unit: str) -> bytes:
    """What the host's `pack` makes of a unit's folder."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for path in sorted((folder / unit).rglob("*")):
            archive.add(path, arcname=f"{unit}/{path.relative_to(folder / unit)}", recursive=False)
    return stream.getvalue()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> PackingConnection:
    """The connection behind reach.connect."""
    connection = PackingConnection()
    monkeypatch.setattr(reach, "connect", lambda _: connection)
    return connection


def test_done_units_come_home_verified_and_only_once(tmp_path: Path, host: PackingConnection) -> None:
    session = planned(tmp_path, UNIT)
    unit_folder(tmp_path / "host" / UNIT)
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    watch = RecordingWatch()
    found = collect.collect(session, watch)
    assert found == {UNIT: Collected(folder=f"collect/h01/{UNIT}", complete=True)}
    assert (session.collect / "h01" / UNIT / "sub" / "empty").is_file()
    assert list((session.collect / ".incoming").iterdir()) == []
    assert handoff.collected(session) == found
    assert watch.ended == ["h01"]
    pack, remove = host.commands
    assert pack.endswith(f"pack /home/me/.mlperf-fleet {session.token} {UNIT}")
    assert remove == f"rm -f '/t m p/{UNIT}'"
    assert collect.collect(session, watch) == found
    assert len(host.commands) == 2
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
    assert host.copied == [f"tail -c +1 '/t m p/{UNIT}'", f"tail -c +101 '/t m p/{UNIT}'"]


def test_a_part_of_another_archive_is_not_gone_on_with(tmp_path: Path, host: PackingConnection) -> None:
    session = planned(tmp_path, UNIT)
    unit_folder(tmp_path / "host" / UNIT)
    host.archives[UNIT], host.breaks_after = b"something else" * 30, 100
    collect.collect(session, RecordingWatch())
    host.archives[UNIT] = archive_of(tmp_path / "host", UNIT)
    assert collect.collect(session, RecordingWatch())[UNIT].complete
    assert host.copied[-1].startswith("tail -c +1 ")
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
        ({"sha256": "0" * 64}, "its sha256 is not the one announced"),
        ({"size": -1}, "size"),
        ({"size": 2**40}, "more than 4 GiB"),
        ({"size": 3}, "it sends more than it announced"),
        ({"archive": None}, "archive"),
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
    assert {path.parent for path in tmp_path.rglob("*.tar")} <= {session.collect / ".incoming"}


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
