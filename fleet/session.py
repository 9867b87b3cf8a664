"""The session folder: one outing of the fleet, as files that can be diffed, archived and mailed.

sessions/<id>/
session.json           who made it, when, from which campaign
campaign.yml           the campaign as it was
controller.json        who works on it right now
cloud/ inventory/ provision/ tune/ run/ collect/ results/ submission/ report/   one folder per stage
plays/                 ansible-runner's own files, for when something went wrong
"""

import errno
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import filelock
from pydantic import TypeAdapter, ValidationError

from fleet import __version__
from fleet.errors import SessionError
from fleet.harness.contract import write_json

SCHEMA = 1
SESSIONS = "sessions"
"""The folder that holds sessions, unless somebody names another."""
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
ASKED_S = 0.5
"""So long a session may look held because somebody asks."""
T = TypeVar("T")
_WRITING = threading.Lock()
_CLOSED: set[Path] = set()


@dataclass(frozen=True, slots=True)
class Session:
    """Paths of one session, and the only way its JSON files are read and written."""

    root: Path

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.root.name

    @property
    def option(self) -> str:
        """How a command is told of this session: `--session ID`, and the folder where that is not the usual one."""
        base = self.root.parent
        usual = base.resolve() == Path(SESSIONS).resolve()
        return f"--session {self.id}" if usual else f"--sessions {shlex.quote(str(base))} --session {self.id}"

    @property
    def campaign_file(self) -> Path:
        """The campaign this session was started with."""
        return self.root / "campaign.yml"

    @property
    def inventory(self) -> Path:
        """hosts.yml (plain Ansible) and reachability.json."""
        return self.root / "inventory"

    @property
    def provision(self) -> Path:
        """readiness.json and facts/<host>.json."""
        return self.root / "provision"

    @property
    def run(self) -> Path:
        """plan.json and units/<unit>.json."""
        return self.root / "run"

    @property
    def tune(self) -> Path:
        """<host>.json: what LoadGen must be told about each host, as probes found it."""
        return self.root / "tune"

    @property
    def collect(self) -> Path:
        """<host>/<unit>/…, raw and verified, and collected.json."""
        return self.root / "collect"

    @property
    def results(self) -> Path:
        """results.json, results.csv, results.parquet."""
        return self.root / "results"

    @property
    def submission(self) -> Path:
        """The submission tree: <division>/<submitter>/…"""
        return self.root / "submission"

    @property
    def report(self) -> Path:
        """index.html."""
        return self.root / "report"

    @property
    def cloud(self) -> Path:
        """leases/<lease>.json, plan.json: instances that were launched for the session, and what they cost."""
        return self.root / "cloud"

    @property
    def plays(self) -> Path:
        """ansible-runner's private data, one folder per play."""
        return self.root / "plays"

    def about(self) -> dict[str, Any]:
        """session.json.

        Raises SessionError when the folder is no session or was made by a newer fleet.
        """
        path = self.root / "session.json"
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SessionError(f"{self.root}: not a fleet session ({error})", hint="fleet sessions") from error
        if not isinstance(data, dict):
            raise SessionError(f"{path}: not a fleet session (no mapping)", hint="fleet sessions")
        if data.get("schema") != SCHEMA:
            raise SessionError(
                f"{path}: schema {data.get('schema')}, this fleet reads {SCHEMA}",
                hint="use the fleet version named in that file",
            )
        return data

    @property
    def token(self) -> str:
        """The session's name on hosts."""
        return str(self.about()["token"])

    def read(self, path: Path, kind: type[T]) -> T:
        """The file as `kind` (a dataclass, pydantic model or builtin container), validated.

        Raises SessionError when it is missing or does not fit.
        """
        try:
            return TypeAdapter(kind).validate_json(path.read_bytes())
        except FileNotFoundError as error:
            stage = path.relative_to(self.root).parts[0]
            raise SessionError(
                f"{path.relative_to(self.root)}: missing in session {self.id}",
                hint=f"fleet {stage}, which writes it, or fleet bench {self.option}",
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise SessionError(
                f"{path.relative_to(self.root)}: {where}: {first['msg']}", hint="run the stage that writes it again"
            ) from error

    def write(self, path: Path, value: Any) -> None:
        """Write `value` (dataclass, pydantic model, list, dict) as sorted JSON, atomically.

        Raises OSError, and SessionError once the session is closed.
        """
        data = TypeAdapter(Any).dump_python(value, mode="json")
        with _WRITING:
            if self.root in _CLOSED:
                raise SessionError(f"session {self.id}: the command was interrupted")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, data)

    def close(self) -> None:
        """Let nobody begin another file: this process is about to end, and its threads with it, wherever they are."""
        with _WRITING:
            _CLOSED.add(self.root)

    @contextmanager
    def locked(self, command: str = "") -> Iterator[None]:
        """Hold the session for one controller, which says in controller.json who it is and what it was asked.

        Raises SessionError naming the owner's pid, host and age when another one holds it.
        """
        lock = filelock.FileLock(self.root / "controller.lock")
        try:
            # Who only asks whether it is held holds it for a moment too.
            lock.acquire(timeout=ASKED_S, poll_interval=ASKED_S / 5)
        except filelock.Timeout as error:
            raise SessionError(
                f"session {self.id} is in use by {self.owner() or 'another controller'}",
                hint="wait for it, or use --session with another",
            ) from error
        _CLOSED.discard(self.root)
        try:
            write_json(
                self._controller,
                Owner(pid=os.getpid(), host=socket.gethostname(), since=time.time(), command=command),
            )
            yield
        finally:
            self._controller.unlink(missing_ok=True)
            lock.release()

    def enter(self, stage: str) -> None:
        """Let controller.json say which stage its owner is in; only for who holds the session."""
        if (owner := self.owner()) is not None:
            write_json(self._controller, replace(owner, stage=stage))

    def owner(self) -> "Owner | None":
        """Who holds the session, or held it when it was killed: `is_held` tells. None when nobody does."""
        try:
            return TypeAdapter(Owner).validate_json(self._controller.read_bytes())
        except (OSError, ValidationError):
            return None

    def is_held(self) -> bool:
        """Whether a controller works on the session right now."""
        lock = filelock.FileLock(self.root / "controller.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return True
        except OSError:
            # Somebody else's session, to be read only.
            return False
        lock.release()
        return False

    @property
    def _controller(self) -> Path:
        return self.root / "controller.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """controller.json: who works on the session."""

    pid: int
    host: str
    since: float
    """Unix seconds."""
    command: str = ""
    """What was typed."""
    stage: str = ""

    @property
    def age_s(self) -> int:
        """Seconds since it took the session."""
        return max(0, int(time.time() - self.since))

    def __str__(self) -> str:
        doing = " ".join(filter(None, [self.command, f"in {self.stage}" if self.stage else ""]))
        return f"pid {self.pid} on {self.host} since {self.age_s} s" + (f" ({doing})" if doing else "")


def create(base: Path, campaign_text: str, *, name: str | None = None, campaign_file: Path | None = None) -> Session:
    """Make a new session folder under `base`, named by UTC time unless `name` says otherwise.

    It appears whole or not at all.
    """
    if name is not None and not re.fullmatch(NAME, name):
        raise SessionError(f"{name!r} is no session name", hint="letters, digits, '.', '_' and '-', as in 2026-spring")
    now = datetime.now(UTC)
    base.mkdir(parents=True, exist_ok=True)
    for attempt in range(100):
        candidate = name or now.strftime("%Y%m%d-%H%M%S") + (f"-{attempt}" if attempt else "")
        about = {
            "schema": SCHEMA,
            "created_at": now.isoformat(timespec="seconds"),
            "fleet": __version__,
            "python": platform.python_version(),
            "controller": socket.gethostname(),
            "campaign_file": str(campaign_file.resolve()) if campaign_file else "",
            # Names the session's folder on hosts, where sessions of other controllers may lie beside it.
            "token": f"{candidate}-{secrets.token_hex(3)}",
        }
        if _make(base / candidate, campaign_text, about):
            return Session(base / candidate)
        if name:
            raise SessionError(f"session {name} exists already", hint=f"fleet bench --session {name}")
    raise SessionError(f"{base}: no free session name", hint="give one with --session")


def _make(root: Path, campaign_text: str, about: dict[str, Any]) -> bool:
    """Build a session beside its place and move it there; False when the place is taken."""
    if root.exists():
        return False
    # A name that no session can have: one that was left by a crash is never taken for a session.
    built = root.with_name(f".{root.name}.{secrets.token_hex(3)}")
    built.mkdir()
    try:
        (built / "campaign.yml").write_text(campaign_text, encoding="utf-8")
        write_json(built / "session.json", about)
        try:
            built.rename(root)
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                return False
            raise
    finally:
        shutil.rmtree(built, ignore_errors=True)
    return True


def listed(base: Path) -> list[Session]:
    """The sessions under `base`, the newest by creation first."""
    found = [path for path in base.glob("*/session.json") if not path.parent.name.startswith(".")]
    found.sort(key=lambda path: (path.stat().st_mtime, path.parent.name), reverse=True)
    return [Session(path.parent) for path in found]


def latest(base: Path) -> Session | None:
    """The newest session under `base`, by creation time, or None."""
    return next(iter(listed(base)), None)
