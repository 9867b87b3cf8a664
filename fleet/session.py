"""The session folder: one outing of the fleet, as files that can be diffed, archived and mailed.

sessions/<id>/
session.json           who made it, when, from which campaign
campaign.yml           the campaign as it was
inventory/ provision/ tune/ run/ collect/ results/ submission/ report/   one folder per stage
plays/                 ansible-runner's own files, for when something went wrong
"""

import json
import os
import platform
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import filelock
from pydantic import TypeAdapter, ValidationError

from fleet import __version__
from fleet.errors import SessionError
from fleet.harness.contract import write_json

SCHEMA = 1
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Session:
    """Paths of one session, and the only way its JSON files are read and written."""

    root: Path

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.root.name

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
            raise SessionError(
                f"{path.relative_to(self.root)}: missing in session {self.id}", hint="run the stage that writes it"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise SessionError(
                f"{path.relative_to(self.root)}: {where}: {first['msg']}", hint="run the stage that writes it again"
            ) from error

    def write(self, path: Path, value: Any) -> None:
        """Write `value` (dataclass, pydantic model, list, dict) as sorted JSON, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, TypeAdapter(Any).dump_python(value, mode="json"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the session for one controller.

        Raises SessionError naming the owner's pid, host and age when another one holds it.
        """
        lock = filelock.FileLock(self.root / "controller.lock")
        owner = self.root / "controller.json"
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise SessionError(
                f"session {self.id} is in use by {_owner_text(owner)}",
                hint="wait for it, or use --session with another",
            ) from error
        try:
            write_json(owner, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()


def _owner_text(path: Path) -> str:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        age = max(0, int(time.time() - float(data["since"])))
        return f"pid {data['pid']} on {data['host']} since {age} s"
    except (OSError, ValueError, KeyError, TypeError):
        return "another controller"


def create(base: Path, campaign_text: str, *, name: str | None = None, campaign_file: Path | None = None) -> Session:
    """Make a new session folder under `base`, named by UTC time unless `name` says otherwise."""
    if name is not None and not re.fullmatch(NAME, name):
        raise SessionError(f"{name!r} is no session name", hint="letters, digits, '.', '_' and '-', as in 2026-spring")
    now = datetime.now(UTC)
    base.mkdir(parents=True, exist_ok=True)
    for attempt in range(100):
        candidate = name or now.strftime("%Y%m%d-%H%M%S") + (f"-{attempt}" if attempt else "")
        root = base / candidate
        try:
            root.mkdir()
        except FileExistsError as error:
            if name:
                raise SessionError(f"session {name} exists already", hint=f"fleet bench --session {name}") from error
            continue
        (root / "campaign.yml").write_text(campaign_text, encoding="utf-8")
        write_json(
            root / "session.json",
            {
                "schema": SCHEMA,
                "created_at": now.isoformat(timespec="seconds"),
                "fleet": __version__,
                "python": platform.python_version(),
                "controller": socket.gethostname(),
                "campaign_file": str(campaign_file.resolve()) if campaign_file else "",
                # Names the session's folder on hosts, where sessions of other controllers may lie beside it.
                "token": f"{candidate}-{secrets.token_hex(3)}",
            },
        )
        return Session(root)
    raise SessionError(f"{base}: no free session name", hint="give one with --session")


def latest(base: Path) -> Session | None:
    """The newest session under `base`, by creation time, or None."""
    found = sorted(base.glob("*/session.json"), key=lambda path: (path.stat().st_mtime, path.parent.name))
    return Session(found[-1].parent) if found else None
