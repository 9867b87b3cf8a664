"""What a lab has put on this machine, on disk before it is made, so that a crash leaves nothing that cannot be found."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.lab import cgroups, rootfs
from tests.lab.cgroups import Cgroup

NETNS = Path("/run/netns")


@dataclasses.dataclass
class Record:
    """Names only. Processes need no list of their own: those in our control groups are ours, and no others."""

    name: str
    directory: str
    pid: int = dataclasses.field(default_factory=os.getpid)
    started: str = dataclasses.field(default_factory=lambda: _start_time(os.getpid()))
    namespaces: list[str] = dataclasses.field(default_factory=list)
    cgroups: list[str] = dataclasses.field(default_factory=list)
    mounts: list[str] = dataclasses.field(default_factory=list)

    @property
    def path(self) -> Path:
        """The file that holds it."""
        return _records() / f"{self.name}.json"

    def save(self) -> None:
        """Write it, whole or not at all."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        partial.replace(self.path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record that another process has saved."""
        return cls(**json.loads(path.read_text()))

    def clean(self) -> None:
        """Take everything down that is recorded; may be called again after a failure."""
        groups = [Cgroup(name) for name in self.cgroups]
        for group in groups:
            group.kill()
        for mount in reversed(self.mounts):
            while os.path.ismount(mount):
                subprocess.run(["umount", mount], check=True, timeout=30)
        doomed = [name for name in self.namespaces if (NETNS / name).exists()]
        if doomed:
            batch = "".join(f"netns del {name}\n" for name in doomed)
            subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True, timeout=60)
        for group in groups:
            group.remove()
        for parent in {path.parent for group in groups for path in group.directories}:
            cgroups.remove_directory(parent)
        if Path(self.directory).exists():
            shutil.rmtree(self.directory)
        self.path.unlink(missing_ok=True)

    def leftovers(self) -> list[str]:
        """What of it is still on the machine: empty after a clean."""
        groups = [Cgroup(name) for name in self.cgroups]
        found = [f"process {pid}" for group in groups for pid in group.pids()]
        found += [f"cgroup {path}" for group in groups for path in group.directories if path.exists()]
        found += [f"namespace {name}" for name in self.namespaces if (NETNS / name).exists()]
        mounted = Path("/proc/self/mounts").read_text()
        found += [f"mount below {self.directory}"] * (f" {self.directory}/" in mounted)
        found += [f"file {path}" for path in (Path(self.directory), self.path) if path.exists()]
        return found


def clean_stale() -> None:
    """Take down what labs of processes that are gone have left behind."""
    with rootfs.locked("labs"):
        for path in _records().glob("*.json"):
            record = Record.read(path)
            if _start_time(record.pid) != record.started:
                record.clean()


def _records() -> Path:
    path = rootfs.cache_dir() / "labs"
    path.mkdir(exist_ok=True)
    return path


def _start_time(pid: int) -> str:
    """When the process began, in ticks: tells it from a later one with the same id; empty if there is none."""
    with suppress(OSError):
        # The command name, in parentheses, may itself hold spaces: count from behind it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""
