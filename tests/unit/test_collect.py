"""What comes from a host is not trusted: archives that reach out, and manifests that lie."""

import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleet import collect
from fleet.harness.contract import write_json
from tests.unit.collecting import UNIT, entry, member, packed, unit_folder


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


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.REGTYPE])
def test_a_negative_size_makes_no_room_for_more(tmp_path: Path, kind: bytes) -> None:
    # As pax, since the older header has no place for a sign.
    lying = member("u/a", b"", type=kind, pax_headers={"size": str(-(2**60))})
    path = packed(tmp_path / "a.tar", lying, member("u/b"))
    with pytest.raises(ValueError, match="bytes"):
        collect.unpack(path, tmp_path / "out", ["u"])
    assert not (tmp_path / "out" / "u").exists()


@pytest.mark.parametrize("name", ["manifest.json", "run_spec.json", "mlperf_log_detail.txt"])
def test_what_is_read_whole_is_no_longer_than_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(collect, "MAX_FILE_BYTES", 5000)
    unit_folder(tmp_path / "u")
    assert collect.verify(tmp_path / "u") == ""
    with (tmp_path / "u" / name).open("ab") as stream:
        # As a disk here has it without a byte of it: nobody reads it.
        stream.truncate(2**40)
    assert collect.verify(tmp_path / "u") == f"{name} has {2**40} bytes, more than 5000"


def test_modes_and_owners_of_the_host_are_not_taken_over(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tar", member("u/a", mode=0o6777, uid=12345))
    collect.unpack(path, tmp_path / "out", ["u"])
    found = (tmp_path / "out" / "u" / "a").stat()
    assert not found.st_mode & 0o6000
    assert found.st_uid == os.getuid()


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
