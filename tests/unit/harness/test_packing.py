"""An ended unit's archive: all of the unit, the same bytes each time, from any offset, and nothing written for it."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from fleet.harness import packing
from tests.unit.harness.units import TOP


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work folder with one unit's files."""
    folder = tmp_path / "runs" / "s" / "one"
    for name in ("z", ".hidden", "deep/er/b", "deep/a", "with space", "nul\xe9"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 1000)
    (folder / "random").write_bytes(os.urandom(300_000))
    (folder / "empty").touch()
    (folder / "empty folder").mkdir()
    (folder.parent / "another").mkdir()
    (folder.parent / "another" / "file").touch()
    return tmp_path


def sent(work: Path, offset: int = 0, unit: str = "one") -> bytes:
    sink = io.BytesIO()
    packing.send(work, "s", unit, offset, sink)
    return sink.getvalue()


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: a file's bytes, None for a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def test_it_skips_nothing_and_depends_on_nothing_but_the_unit(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = work / "runs" / "s" / "one"
    data, told = sent(work), packing.pack(work, "s", "one")
    assert told == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(work / "unpacked", filter="data")
    assert tree(work / "unpacked" / "one") == tree(folder)
    assert [path.name for path in (work / "unpacked").iterdir()] == ["one"]
    # gzip would write the hour into its head, and a folder lists its files in no order.
    unsorted = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(unsorted(self, pattern), reverse=True))
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert sent(work) == data
    # What comes and goes after a unit has ended changes nothing.
    for name in ("home", "cancel", "status.json.partial"):
        (folder / name).write_bytes(b"x")
    assert sent(work) == data
    (folder / "z").write_bytes(b"another")
    assert packing.pack(work, "s", "one")["sha256"] != told["sha256"]


def test_the_rest_of_a_broken_transfer_fits_to_its_beginning(work: Path) -> None:
    data = sent(work)
    for offset in (0, 1, 10, 4095, 8192, len(data) // 2, len(data) - 1, len(data), len(data) + 5):
        assert sent(work, offset) == data[offset:]


def test_a_unit_that_is_gone_is_an_empty_archive(work: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(sent(work, unit="gone"))) as archive:
        assert archive.getnames() == []


def test_the_command_line_packs_and_sends_and_writes_nothing(work: Path) -> None:
    before = sorted(work.rglob("*"))

    def harness(*arguments: str) -> bytes:
        command = [sys.executable, "-m", "fleet.harness", *arguments]
        return subprocess.run(command, capture_output=True, cwd=TOP, check=True).stdout

    told = json.loads(harness("pack", str(work), "s", "one"))
    assert told == packing.pack(work, "s", "one")
    first, rest = harness("send", str(work), "s", "one", "0"), harness("send", str(work), "s", "one", "1000")
    assert hashlib.sha256(first).hexdigest() == told["sha256"]
    assert rest == first[1000:]
    assert sorted(work.rglob("*")) == before
