"""Last words on a full disk: over the blocks that are there, else from the reserve."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from fleet.harness import space
from fleet.harness.contract import UnitState, UnitStatus, write_json


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A session on a disk without a free block, but for its reserve."""
    space.reserve(tmp_path)

    def refuse(path: Path, value: Any) -> None:
        if (tmp_path / "reserve").exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_json(path, value)

    monkeypatch.setattr(space, "write_json", refuse)
    return tmp_path


def test_a_status_is_written_over_the_one_before(full: Path) -> None:
    path = full / "status.json"
    long = UnitStatus(unit="u", state=UnitState.RUNNING, cause="x" * 300)
    write_json(path, long)
    for value in (UnitStatus(unit="u", state=UnitState.DONE), long):
        space.write(path, value, full)
        told = json.loads(path.read_text(encoding="utf-8"))
        assert (told["state"], told["cause"]) == (value.state, value.cause)
    assert (full / "reserve").stat().st_size == space.RESERVE_BYTES


def test_what_is_new_takes_the_reserve_which_comes_back(full: Path) -> None:
    space.write(full / "error.json", {"cause": "full"}, full)
    assert json.loads((full / "error.json").read_text(encoding="utf-8")) == {"cause": "full"}
    assert not (full / "reserve").exists()
    space.reserve(full)
    assert (full / "reserve").exists()


def test_heartbeats_do_not_take_it(full: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        space.write_over_or_new(full / "status.json", UnitStatus(unit="u", state=UnitState.RUNNING))
    assert (full / "reserve").exists()


def test_any_other_error_is_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        space.write(tmp_path / "gone" / "status.json", {}, tmp_path)


def test_a_write_that_fails_leaves_no_part_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_json(tmp_path / "a.json", {"a": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "a.json", {"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": 1}
