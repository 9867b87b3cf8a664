"""A session's secrets: made once, whole, for nobody else's eyes, and outside the session."""

import stat
import subprocess
from pathlib import Path

import pytest

from fleet import session as sessions
from fleet.cloud import keys
from fleet.errors import CloudError
from fleet.session import Session


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "mlperf-fleet"


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return sessions.create(tmp_path / "sessions", "schema: 1\n", name="mine")


def test_keys_are_made_once_and_are_what_ssh_takes(session: Session, state: Path) -> None:
    made = keys.ensure(session)
    assert made == keys.ensure(session)
    assert made.folder == state / session.token
    for private, public in (("login", made.login_public), ("host_key", made.host_public)):
        said = subprocess.run(
            ["ssh-keygen", "-y", "-f", str(made.folder / private)], capture_output=True, text=True, check=True
        )
        assert said.stdout.split()[:2] == public.split()[:2]
        assert public.startswith("ssh-ed25519 ")
    assert made.login_public.split()[1] != made.host_public.split()[1]


def test_nobody_else_may_read_them(session: Session, state: Path) -> None:
    made = keys.ensure(session)
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in made.folder.iterdir()} == {0o600}
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    made.folder.chmod(0o755)
    keys.ensure(session)
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700


def test_the_session_knows_public_halves_only(session: Session) -> None:
    made = keys.ensure(session)
    assert keys.known_hosts(session).read_text(encoding="utf-8").split() == [
        f"fleet-{session.token}",
        *made.host_public.split()[:2],
    ]
    inside = b"".join(path.read_bytes() for path in session.root.rglob("*") if path.is_file())
    assert b"PRIVATE" not in inside


def test_what_a_crash_left_is_replaced(session: Session, state: Path) -> None:
    half = state / f".{session.token}.partial"
    half.mkdir(parents=True)
    (half / "login").write_text("half", encoding="utf-8")
    made = keys.ensure(session)
    assert made.login_key.read_text(encoding="ascii").startswith("-----BEGIN OPENSSH PRIVATE KEY-----")
    assert [path.name for path in state.iterdir()] == [session.token]


def test_sessions_with_secrets_are_found_until_they_are_forgotten(session: Session, tmp_path: Path) -> None:
    assert keys.known() == []
    other = sessions.create(tmp_path / "elsewhere", "schema: 1\n", name="other")
    keys.ensure(session)
    keys.ensure(other)
    assert keys.known() == sorted([(session.token, session.root), (other.token, other.root)])
    keys.forget(session)
    keys.forget(session)
    assert keys.known() == [(other.token, other.root)]


def test_a_session_that_was_moved_is_found_where_it_is(session: Session) -> None:
    keys.ensure(session)
    moved = Session(session.root.rename(session.root.with_name("moved")))
    keys.ensure(moved)
    assert keys.known() == [(moved.token, moved.root)]


def test_a_folder_that_cannot_be_made_is_named(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(CloudError, match="keys of the session") as caught:
        keys.ensure(session)
    assert "XDG_STATE_HOME" in caught.value.hint
