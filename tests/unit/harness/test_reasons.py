"""From exceptions and the kernel's counters to reasons."""

import errno
from pathlib import Path

import pytest

from fleet.harness import reasons
from fleet.harness.contract import Reason


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def caused(error: Exception, by: Exception) -> Exception:
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), Reason.OUT_OF_MEMORY),
        (OutOfMemoryError("CUDA error"), Reason.OUT_OF_MEMORY),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), Reason.OUT_OF_MEMORY),
        (RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer"), Reason.OUT_OF_MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Reason.OUT_OF_MEMORY),
        (OSError(errno.ENOSPC, "No space left on device"), Reason.NO_SPACE),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), Reason.NO_SPACE),
        (RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"), Reason.NO_SPACE),
        (FileNotFoundError(errno.ENOENT, "No such file", "/w/assets/bert-99/model"), Reason.MISSING_ASSET),
        (ValueError("/w/assets/tiny-bert: dataset is missing or broken, run `fleet provision`"), Reason.MISSING_ASSET),
        (reasons.UnitError("driver is 1 here", Reason.LOCK_CHANGED), Reason.LOCK_CHANGED),
        (caused(ValueError("it does not fit"), MemoryError()), Reason.OUT_OF_MEMORY),
        (FileNotFoundError(errno.ENOENT, "No such file", "/usr/lib/libfoo.so"), Reason.OTHER),
        (OSError(errno.EACCES, "Permission denied"), Reason.OTHER),
        (ValueError("the pytorch backend has no option 'x'"), Reason.OTHER),
    ],
)
def test_an_exception_has_the_reason_of_what_it_came_from(error: Exception, reason: Reason) -> None:
    assert reasons.of(error, Path("/w/assets")) is reason


@pytest.mark.parametrize(
    ("group", "file"),
    [
        ("0::/user.slice/x.scope\n", "user.slice/x.scope/memory.events"),
        ("0::/\n", "memory.events"),
        ("4:memory:/lab/h01\n0::/\n", "memory/lab/h01/memory.oom_control"),
    ],
)
def test_the_own_control_group_counts_kills_not_the_machine(tmp_path: Path, group: str, file: str) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "vmstat").write_text("pgfault 1\noom_kill 99\n")
    assert reasons.oom_kills(tmp_path) == 99
    (tmp_path / "proc" / "self" / "cgroup").write_text(group)
    counter = tmp_path / "sys" / "fs" / "cgroup" / file
    counter.parent.mkdir(parents=True)
    counter.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert reasons.oom_kills(tmp_path) == 2


def test_a_machine_that_counts_nothing_has_killed_nothing(tmp_path: Path) -> None:
    assert reasons.oom_kills(tmp_path) == 0
