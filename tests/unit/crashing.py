"""A controller that dies at a write, and a host in this process that runs the harness's own queue and packing."""

import hashlib
import io
import json
import shlex
import shutil
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from fleet.harness import detach, packing, processes, unit_queue
from fleet.harness.contract import FileEntry, RunManifest, UnitState, read_spec, write_json
from fleet.inventory.reach import Answer, Unreachable
from fleet.terms import HostState
from tests.unit.results.session_files import LOGS

BEFORE, TORN, AFTER = "before", "torn", "after"
"""A rename that was not done, one of half a file that was not done, and one that was the last thing done."""


class Crash(BaseException):
    """kill -9, as far as Python can have it: nothing catches it."""


@dataclass
class Life:
    """One controller, from its start to its death at rename number `at`; it never dies when `at` is None."""

    root: Path
    at: int | None = None
    how: str = BEFORE
    renames: int = 0
    dead: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self) -> None:
        """Whoever is dead does nothing more."""
        if self.dead:
            raise Crash

    def rename(self, source: Path, target: Path, really: Any) -> Any:
        """A rename in the session, which may be the last thing that happens."""
        with self.lock:
            self.check()
            number, self.renames = self.renames, self.renames + 1
            if number != self.at:
                return really(source, target)
            self.dead = True
            if self.how == TORN and source.is_file():
                source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
            elif self.how == AFTER:
                really(source, target)
            raise Crash

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Every rename in the session's folder is this life's."""
        really = Path.replace

        def watched(source: Path, target: Any) -> Any:
            inside = source.is_relative_to(self.root)
            return self.rename(source, Path(target), really) if inside else really(source, target)

        patch.setattr(Path, "replace", watched)


@dataclass
class HostInProcess:
    """A host whose units are done as soon as it has taken them."""

    work: Path
    ran: list[str] = field(default_factory=list)
    """Units, each time one ran."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @staticmethod
    def install(patch: pytest.MonkeyPatch, hosts: "dict[Path, HostInProcess]") -> None:
        """Their supervisors, by work folder, are functions, and no process of this machine is theirs."""
        patch.setattr(detach, "supervisor", lambda work, session: hosts[work].supervise(session))
        patch.setattr(processes, "end_orphans", lambda *_: None)
        patch.setattr(processes, "supervised", lambda *_: False)

    def supervise(self, session: Path) -> None:
        """Run what is queued."""
        for name in unit_queue.read_order(session):
            status = unit_queue.read_status(session / name)
            if status is not None and status.state is UnitState.QUEUED:
                self.ran.append(name)
                measure(session / name)
                unit_queue.end(session / name, replace(status, started_at=1.0), UnitState.DONE)


@dataclass
class Line:
    """A connection of one life to a host: it breaks when the controller dies."""

    host: HostInProcess
    life: Life

    def run(self, command: str, *, timeout: float, stdin: bytes = b"", stalled: float | None = None) -> Answer:
        assert timeout > 0
        assert stalled is None or stalled > 0
        with self.host.lock:
            self._alive()
            words = shlex.split(command)
            if command.startswith("read up"):
                return Answer(rc=0, out=self._standing(words), err="")
            verb = next(word for word in words if word in {"start", "pack", "home", "cancel"})
            # The loop that gives signs of life stands around some of them.
            rest = [word.rstrip(";") for word in words[words.index(verb) + 2 :]]
            return Answer(rc=0, out=json.dumps(self._do(verb, rest, stdin)) + "\n", err="")

    def _do(self, verb: str, rest: list[str], stdin: bytes) -> Any:
        work = self.host.work
        if verb == "start":
            return unit_queue.start(work, json.loads(stdin))
        if verb == "pack":
            return packing.pack(work, rest[0], rest[1])
        if verb == "home":
            return unit_queue.home(work, rest[0], rest[1:])
        return unit_queue.cancel(work, rest[0], rest[1:])

    def copy(self, command: str, sink: BinaryIO, *, limit: int, stalled: float = 15.0) -> None:
        assert stalled >= 15
        words = shlex.split(command)
        session, unit, offset = words[words.index("send") + 2 :]
        with self.host.lock:
            self._alive()
            data = io.BytesIO()
            packing.send(self.host.work, session, unit, int(offset), data)
        assert len(data.getvalue()) <= limit
        # In two parts, so that a death in between leaves one.
        half = len(data.getvalue()) // 2
        sink.write(data.getvalue()[:half])
        self._alive()
        sink.write(data.getvalue()[half:])

    def close(self) -> None:
        """Nothing is open."""

    def _alive(self) -> None:
        if self.life.dead:
            raise Unreachable(HostState.UNREACHABLE, "its controller is dead")

    def _standing(self, words: list[str]) -> str:
        runs = self.host.work / "runs"
        found = [path.read_text(encoding="utf-8") for path in sorted(runs.glob("*/*/status.json"))]
        assert "cat" in words
        return f"{processes.uptime():.2f} {processes.boot_id()}\n" + "".join("\x1e" + text for text in found)


def measure(folder: Path) -> None:
    """What a unit leaves, the same bytes each time."""
    spec = read_spec(folder / "run_spec.json")
    for path in sorted((LOGS / "offline-valid").iterdir()):
        shutil.copy(path, folder / path.name)
    files = {
        path.name: FileEntry(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size=path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.name != "status.json"
    }
    manifest = RunManifest(
        unit=spec.unit, spec_sha256=files["run_spec.json"].sha256, started_at=1.0, finished_at=2.0, loadgen_s=1.0,
        versions={}, accuracy={}, model={}, labels=(), files=files,
    )  # fmt: skip
    write_json(folder / "manifest.json", manifest)


def settle() -> None:
    """Threads of a dead controller have come to their ends, as its process would have taken them along."""
    time.sleep(0.02)
