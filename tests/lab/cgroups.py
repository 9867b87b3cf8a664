"""Control groups of the lab: they freeze a host, limit its memory, and are the record of which processes are ours."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_MB = 1024 * 1024
_PATIENCE = 5.0


def _unified() -> bool:
    return (_MOUNT / "cgroup.controllers").exists()


def missing() -> str:
    """Why control groups cannot be used here, or an empty text."""
    roots = [_MOUNT] if _unified() else [_MOUNT / "freezer", _MOUNT / "memory"]
    if all(os.access(root / "cgroup.procs", os.W_OK) for root in roots):
        return ""
    return f"the lab needs control groups with freezer and memory, writable below {_MOUNT}"


class Cgroup:
    """One control group per host, the same name in each hierarchy that is needed (one in v2, two in v1)."""

    def __init__(self, name: str) -> None:
        self.name = name  # "<lab>/<host>"
        self._v2 = _unified()
        self._freezer = (_MOUNT if self._v2 else _MOUNT / "freezer") / name
        self._memory = (_MOUNT if self._v2 else _MOUNT / "memory") / name

    @property
    def directories(self) -> list[Path]:
        """What it is made of, without the lab's own level above."""
        return [self._freezer] if self._v2 else [self._freezer, self._memory]

    def create(self, memory_mb: int | None = None) -> None:
        """Make it, with a limit if one is asked for."""
        for directory in self.directories:
            directory.mkdir(parents=True, exist_ok=True)
        if memory_mb is None:
            return
        if self._v2:
            for level in (_MOUNT, self._memory.parent):
                (level / "cgroup.subtree_control").write_text("+memory")
            (self._memory / "memory.max").write_text(str(memory_mb * _MB))
            # Without this a machine with swap would swap instead of running out.
            with suppress(OSError):
                (self._memory / "memory.swap.max").write_text("0")
        else:
            (self._memory / "memory.limit_in_bytes").write_text(str(memory_mb * _MB))

    def joined(self, command: list[str]) -> list[str]:
        """The command, run inside this group; the process id stays the command's own."""
        script = 'for group in $1; do echo 0 >"$group/cgroup.procs"; done; shift; exec "$@"'
        return ["sh", "-c", script, "join", " ".join(map(str, self.directories)), *command]

    def pids(self) -> list[int]:
        """Processes in it, as the machine counts them."""
        try:
            return [int(pid) for pid in (self._freezer / "cgroup.procs").read_text().split()]
        except OSError:
            return []

    def memory(self) -> int:
        """Bytes that its processes and their files take."""
        return int((self._memory / ("memory.current" if self._v2 else "memory.usage_in_bytes")).read_text())

    def freeze(self, frozen: bool) -> None:
        """Stop or continue every process at once; returns when the kernel says that it is so."""
        if not self._freezer.exists():
            return
        deadline = time.monotonic() + _PATIENCE
        wanted = ("1" if frozen else "0") if self._v2 else ("FROZEN" if frozen else "THAWED")
        (self._freezer / ("cgroup.freeze" if self._v2 else "freezer.state")).write_text(wanted)
        while self._state() != wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"control group {self.name} is not {wanted} after {_PATIENCE} s")
            time.sleep(0.005)

    def _state(self) -> str:
        if self._v2:
            events = dict(line.split() for line in (self._freezer / "cgroup.events").read_text().splitlines())
            return events["frozen"]
        return (self._freezer / "freezer.state").read_text().strip()

    def kill(self) -> None:
        """SIGKILL to every member until none is left, frozen ones included."""
        deadline = time.monotonic() + _PATIENCE
        with suppress(OSError):
            self.freeze(frozen=False)
        while pids := self.pids():
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {pids} of control group {self.name} do not die")
            # The deepest first: a host's processes die before the launcher outside, which then reaps their PID 1.
            # The other way round the machine's own init would have to, and in a container not every one does.
            depths = {pid: _depth(pid) for pid in pids}
            for pid in pids:
                if depths[pid] == max(depths.values()):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)

    def remove(self) -> None:
        """Take the (empty) groups away; the kernel may need a moment after the last process."""
        for directory in self.directories:
            remove_directory(directory)


def _depth(pid: int) -> int:
    """How many process id namespaces the process is in; 0 if it has gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return len(line.split()) - 1
    return 0


def remove_directory(directory: Path) -> None:
    """Remove an empty group."""
    deadline = time.monotonic() + _PATIENCE
    while directory.exists():
        try:
            directory.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
