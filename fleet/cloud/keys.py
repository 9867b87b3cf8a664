"""A session's secrets: the key to log in with and the key its instances are known by.

They lie in the user's state folder and never in the session's, which may be archived and mailed. The folder is there for
as long as something of the session may still run: `forget` is called when nothing is left.

$XDG_STATE_HOME/mlperf-fleet/<session token>/
login, login.pub       what instances let in
host_key, host_key.pub what instances prove themselves with
session.json           where the session lies
"""

import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from pydantic import BaseModel, ValidationError

from fleet.errors import CloudError
from fleet.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Both key pairs of a session, in OpenSSH's formats."""

    folder: Path
    login_key: Path
    """The private half of the login key."""
    login_public: str
    """One line: `ssh-ed25519 AAAA… fleet-<token>`."""
    host_private: str
    host_public: str
    """One line."""


class _Whose(BaseModel):
    """session.json."""

    session: Path
    """The session's folder, absolute."""


def root() -> Path:
    """The folder that holds every session's secrets."""
    given = os.environ.get("XDG_STATE_HOME", "")
    # A relative one is to be ignored, says the XDG base directory specification.
    state = Path(given) if given.startswith("/") else Path.home() / ".local" / "state"
    return state / "mlperf-fleet"


def folder(token: str) -> Path:
    """Where the secrets of a session lie, or would."""
    return root() / token


def alias(token: str) -> str:
    """The name that a session's instances have in its known_hosts."""
    return f"fleet-{token}"


def known_hosts(session: Session) -> Path:
    """The session's known_hosts file, with public keys only."""
    return session.cloud / "known_hosts"


def ensure(session: Session) -> Keys:
    """The session's keys, made when there are none; its known_hosts is written too.

    Only for who holds the session. Raises CloudError when the folder cannot be used.
    """
    token = session.token
    place = folder(token)
    try:
        if not place.is_dir():
            _make(place, token)
        whose = _Whose(session=session.root.resolve())
        if _whose(place) != whose.session:
            _put(place / "session.json", whose.model_dump_json().encode())
        if stat.S_IMODE(place.stat().st_mode) & 0o077:
            place.chmod(0o700)
        found = Keys(
            folder=place,
            login_key=place / "login",
            login_public=(place / "login.pub").read_text(encoding="ascii").strip(),
            host_private=(place / "host_key").read_text(encoding="ascii"),
            host_public=(place / "host_key.pub").read_text(encoding="ascii").strip(),
        )
    except OSError as error:
        raise CloudError(f"keys of the session: {error}", hint=f"look at {place}, or set XDG_STATE_HOME") from error
    line = f"{alias(token)} {' '.join(found.host_public.split()[:2])}\n"
    file = known_hosts(session)
    if not file.is_file() or file.read_text(encoding="utf-8") != line:
        file.parent.mkdir(parents=True, exist_ok=True)
        _put(file, line.encode(), mode=0o644)
    return found


def known() -> list[tuple[str, Path]]:
    """Token and folder of every session whose secrets lie here: something of it may still run."""
    try:
        folders = sorted(path for path in root().iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []
    return [(path.name, whose) for path in folders if (whose := _whose(path)) is not None]


def forget(session: Session) -> None:
    """Remove the session's secrets: everything that they open is gone."""
    forget_token(session.token)


def forget_token(token: str) -> None:
    """Remove the secrets of a session that may have no folder any more."""
    place = folder(token)
    gone = _beside(place)
    shutil.rmtree(gone, ignore_errors=True)
    # By another name first, so that no half of it is ever taken for the whole.
    try:
        place.rename(gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone)


def _make(place: Path, token: str) -> None:
    """Build the folder beside its place and move it there, whole."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    built = _beside(place)
    shutil.rmtree(built, ignore_errors=True)
    built.mkdir(mode=0o700)
    files = {**_pair("login", alias(token)), **_pair("host_key", alias(token))}
    for name, text in files.items():
        _put(built / name, text)
    built.rename(place)
    _flush(place.parent)


def _beside(place: Path) -> Path:
    # One name per session, which one controller holds: what a crash left is found and replaced.
    return place.with_name(f".{place.name}.partial")


def _pair(name: str, comment: str) -> dict[str, bytes]:
    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return {name: private, f"{name}.pub": public + f" {comment}\n".encode()}


def _put(path: Path, text: bytes, *, mode: int = 0o600) -> None:
    """Write a file by rename, on disk when this returns."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    _flush(path.parent)


def _flush(place: Path) -> None:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _whose(place: Path) -> Path | None:
    try:
        return _Whose.model_validate_json((place / "session.json").read_bytes()).session
    except (OSError, ValidationError):
        return None
