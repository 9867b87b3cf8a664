"""The session folder: one controller at a time, whole files or none, and no newer schema."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fleet import session as sessions
from fleet.errors import ExitCode, SessionError
from fleet.handoff import Readiness, ReadinessFile
from fleet.session import Session
from fleet.terms import HostState


def test_create_keeps_the_campaign_and_says_who_made_it(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yml"
    made = sessions.create(tmp_path / "sessions", "text: 1\n", campaign_file=file)
    assert re.fullmatch(r"\d{8}-\d{6}", made.id)
    assert made.campaign_file.read_text(encoding="utf-8") == "text: 1\n"
    about = made.about()
    assert about["campaign_file"] == str(file.resolve())
    assert about["controller"] == socket.gethostname()
    assert made.token.startswith(made.id + "-")


def test_two_sessions_of_one_second_are_two(tmp_path: Path) -> None:
    made = [sessions.create(tmp_path, "x") for _ in range(3)]
    assert len({session.root for session in made}) == 3
    assert len({session.token for session in made}) == 3


def test_a_given_name_is_used_once(tmp_path: Path) -> None:
    assert sessions.create(tmp_path, "x", name="mine").id == "mine"
    with pytest.raises(SessionError, match="session mine exists already") as caught:
        sessions.create(tmp_path, "x", name="mine")
    assert "--session mine" in caught.value.hint


def test_latest_is_the_newest_by_time_not_by_name(tmp_path: Path) -> None:
    assert sessions.latest(tmp_path) is None
    newer, older = sessions.create(tmp_path, "x", name="a"), sessions.create(tmp_path, "x", name="b")
    os.utime(older.root / "session.json", (1, 1))
    (tmp_path / "zzz").mkdir()
    found = sessions.latest(tmp_path)
    assert found is not None
    assert found.root == newer.root


@pytest.mark.parametrize("text", ["", "{", "nonsense", "[1]", "null", "3"])
def test_a_broken_session_file_is_said(tmp_path: Path, text: str) -> None:
    made = sessions.create(tmp_path, "x", name="s")
    (made.root / "session.json").write_text(text, encoding="utf-8")
    with pytest.raises(SessionError, match="not a fleet session"):
        made.about()


@pytest.mark.parametrize("name", ["a/b", "../a", ".a", "-a", "", "a b", "a\n", "a" * 101, "ä"])
def test_a_name_that_would_be_no_plain_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SessionError, match="is no session name") as caught:
        sessions.create(tmp_path, "x", name=name)
    assert "2026-spring" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "2026-spring", "v6.1_b", "a" * 100])
def test_plain_names_are_taken(tmp_path: Path, name: str) -> None:
    assert sessions.create(tmp_path, "x", name=name).root == tmp_path / name


def test_a_newer_session_is_refused(tmp_path: Path) -> None:
    made = sessions.create(tmp_path, "x", name="s")
    data = json.loads((made.root / "session.json").read_text(encoding="utf-8"))
    (made.root / "session.json").write_text(json.dumps({**data, "schema": 2}), encoding="utf-8")
    with pytest.raises(SessionError, match="schema 2, this fleet reads 1"):
        made.about()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    made = sessions.create(tmp_path, "x", name="s")
    path = made.provision / "readiness.json"
    value = ReadinessFile(hosts=(Readiness(host="a", state=HostState.FAILED, cause="ü", cannot={"b": "c"}),))
    made.write(path, value)
    assert made.read(path, ReadinessFile) == value
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sessions.create(tmp_path, "x", name="s")
    path = made.provision / "readiness.json"
    made.write(path, {"old": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        made.write(path, {"new": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"old": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "readiness.json: : Invalid JSON"),
        ('{"hosts": [{"host": "a"}]}', "readiness.json: hosts.0.state: Field required"),
        ('{"hosts": [{"host": "a", "state": "well"}]}', "readiness.json: hosts.0.state"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path: Path, text: str, said: str) -> None:
    made = sessions.create(tmp_path, "x", name="s")
    path = made.provision / "readiness.json"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SessionError) as caught:
        made.read(path, ReadinessFile)
    assert said in caught.value.message
    assert caught.value.exit_code is ExitCode.ERROR


def test_a_missing_file_says_which_and_what_to_do(tmp_path: Path) -> None:
    made = sessions.create(tmp_path, "x", name="s")
    with pytest.raises(SessionError, match=r"run/plan\.json: missing in session s") as caught:
        made.read(made.run / "plan.json", ReadinessFile)
    assert caught.value.hint


HOLD = """
import sys
from pathlib import Path
from fleet.session import Session
with Session(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_controller_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    made = sessions.create(tmp_path, "x", name="s")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(made.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SessionError) as caught, made.locked():
            pytest.fail("locked twice")
        said = caught.value.message
        assert re.search(rf"session s is in use by pid {holder.pid} on {socket.gethostname()} since \d+ s", said)
        assert "--session" in caught.value.hint
    finally:
        holder.communicate("\n", timeout=30)
    with made.locked():
        owner = json.loads((made.root / "controller.json").read_text(encoding="utf-8"))
        assert owner["pid"] == os.getpid()
    assert not (made.root / "controller.json").exists()


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    made = sessions.create(tmp_path, "x", name="s")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(made.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate(timeout=30)
    assert (made.root / "controller.json").exists()
    with made.locked():
        assert json.loads((made.root / "controller.json").read_text(encoding="utf-8"))["pid"] == os.getpid()


def test_paths_are_one_folder_per_stage(tmp_path: Path) -> None:
    made = Session(tmp_path / "s")
    stages = ["inventory", "provision", "run", "collect", "results", "submission", "report", "plays"]
    assert [getattr(made, stage) for stage in stages] == [made.root / stage for stage in stages]


def test_a_closed_session_is_written_no_more_until_somebody_takes_it(tmp_path: Path) -> None:
    session = sessions.create(tmp_path, "x", name="s1")
    path = session.run / "plan.json"
    session.write(path, {"a": 1})
    session.close()
    with pytest.raises(SessionError, match="s1: the command was interrupted"):
        session.write(path, {"a": 2})
    assert session.read(path, dict[str, int]) == {"a": 1}
    with session.locked():
        session.write(path, {"a": 3})
    assert session.read(path, dict[str, int]) == {"a": 3}
