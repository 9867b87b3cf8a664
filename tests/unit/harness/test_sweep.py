"""What a host's work folder is cleared of, and what never."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fleet.harness import processes, sweep
from fleet.harness.contract import write_json
from tests.unit.harness import hosting

LONG_AGO = time.time() - 20 * sweep.DAY


def aged(path: Path) -> Path:
    os.utime(path, (LONG_AGO, LONG_AGO), follow_symlinks=False)
    return path


def session(work: Path, name: str, units: str) -> Path:
    """A session with a unit for each letter: h for one that is home. Last changed long ago."""
    folder = work / "runs" / name
    for number, letter in enumerate(units):
        unit = folder / f"u{number}"
        unit.mkdir(parents=True)
        write_json(unit / "manifest.json", {})
        if letter == "h":
            (unit / "home").touch()
    write_json(folder / "queue.json", [f"u{number}" for number in range(len(units))])
    return aged(folder)


def test_only_old_sessions_that_are_all_home_are_removed(tmp_path: Path) -> None:
    gone = session(tmp_path, "gone", "hh")
    one_is_not = session(tmp_path, "one-is-not", "h-")
    fresh = session(tmp_path, "fresh", "h")
    os.utime(fresh)
    earlier = session(tmp_path, "earlier", "h")
    (earlier / ".earlier" / "u0.1").mkdir(parents=True)
    aged(earlier)
    strange = tmp_path / "runs" / "strange"
    strange.mkdir()
    aged(strange)
    sweep.sweep(tmp_path)
    assert not gone.exists()
    assert all(path.exists() for path in (one_is_not / "u0", one_is_not / "u1", fresh, earlier, strange))


def test_temporary_and_half_written_files_are_removed_once_they_are_old(tmp_path: Path) -> None:
    unit = session(tmp_path, "s", "-") / "u0"
    (tmp_path / "tmp" / "pip-unpack-1").mkdir(parents=True)
    for path in (
        tmp_path / "tmp" / "s.u.tar.gz",
        tmp_path / "tmp" / "busy",
        unit / "status.json.partial",
        unit / "log",
    ):
        path.touch()
    old = [
        aged(path)
        for path in (tmp_path / "tmp" / "s.u.tar.gz", tmp_path / "tmp" / "pip-unpack-1", unit / "status.json.partial")
    ]
    aged(unit / "log")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    (tmp_path / "tmp" / "link").symlink_to(outside)
    aged(tmp_path / "tmp" / "link")
    sweep.sweep(tmp_path)
    assert not [path for path in old if path.exists()]
    assert not (tmp_path / "tmp" / "link").is_symlink()
    assert (tmp_path / "tmp" / "busy").exists()
    assert (unit / "log").exists()
    assert (outside / "file").exists()


def test_harnesses_go_unless_they_are_current_or_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("old", "now", "used"):
        (tmp_path / "harness" / name).mkdir(parents=True)
    (tmp_path / "harness" / "current").symlink_to(tmp_path / "harness" / "now")
    sleeper = subprocess.Popen(
        [sys.executable, "-c", "input()", str(tmp_path / "harness" / "used")], stdin=subprocess.PIPE
    )
    try:
        # A process that has just become another program has no arguments for a moment.
        hosting.wait(lambda: processes.uses(tmp_path / "harness" / "used"))
        sweep.sweep(tmp_path)
        assert (tmp_path / "harness" / "old").exists()  # Unpacked just now: somebody may be about to use it.
        later = time.time() + 2 * sweep.DAY
        monkeypatch.setattr(time, "time", lambda: later)
        sweep.sweep(tmp_path)
        assert sorted(path.name for path in (tmp_path / "harness").iterdir()) == ["current", "now", "used"]
    finally:
        sleeper.kill()
        sleeper.communicate()


def test_ten_thousand_stale_files_are_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    for number in range(10_000):
        os.close(os.open(folder / f"stale{number}", os.O_CREAT | os.O_WRONLY))
        os.utime(folder / f"stale{number}", (LONG_AGO, LONG_AGO))
    sweep.sweep(tmp_path)
    assert list(folder.iterdir()) == []


def test_a_work_folder_with_nothing_in_it_is_fine(tmp_path: Path) -> None:
    sweep.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
