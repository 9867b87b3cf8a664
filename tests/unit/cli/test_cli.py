"""The command line as a script sees it: exit codes, stdout for data, words on stderr, never a traceback."""

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from fleet import handoff
from fleet import session as sessions
from fleet.cli.main import VERBS, cli
from fleet.handoff import Attempt, HostRecord, Plan, UnitRecord
from fleet.terms import HostState, Reason, UnitState
from tests.unit.cli.command import Done, Fleet
from tests.unit.fakes import MINIMAL, scene, status
from tests.unit.results.session_files import Unit, spec

TOP = Path(__file__).parents[3]


def by_itself(*arguments: str) -> Done:
    """The real command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "fleet", *arguments], capture_output=True, text=True, cwd=TOP, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def test_help_lists_the_verbs_in_the_order_of_use_and_fast() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = by_itself("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    listed = done.stdout.partition("Verbs, in the order of use:\n")[2]
    assert [line.split()[0] for line in listed.splitlines() if re.match("  [a-z]", line)] == list(VERBS)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # CPU time: about 0.2 s


def test_an_error_has_no_traceback_in_a_process_of_its_own() -> None:
    done = by_itself("status", "--sessions", "no-such-folder")
    assert done == Done(1, "", "fleet: no session in no-such-folder\nnext:  fleet bench\n")


def test_help_imports_no_stage() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from fleet.cli.main import cli;"
        "r = CliRunner().invoke(cli, ['--help']); assert r.exit_code == 0, r.output;"
        "bad = {'pandas', 'ansible_runner', 'paramiko', 'pydantic', 'torch'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=TOP)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    for option in ("--help", "-h"):
        done = CliRunner().invoke(cli, [verb, option])
        assert done.exit_code == 0
        assert done.output.startswith(f"Usage: cli {verb}")
        assert len(done.output.splitlines()) > 3


def test_version_and_unknown_verbs(fleet: Fleet) -> None:
    assert fleet("--version").stdout.startswith("fleet, version ")
    done = fleet("benhc")
    assert done.returncode == 2
    assert "benhc" in done.stderr
    assert fleet("status", "--no-such-option").returncode == 2


@pytest.mark.parametrize("verb", ["bench", "inventory", "check", "provision", "run"])
def test_without_a_campaign_it_is_two_with_the_next_command(fleet: Fleet, tmp_path: Path, verb: str) -> None:
    done = fleet(verb)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["fleet: fleet.yml: no such file", "next:  fleet init"]
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_campaign_is_two_and_starts_nothing(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "fleet.yml").write_text(MINIMAL + "submiter: x\n", encoding="utf-8")
    done = fleet("bench")
    assert done.returncode == 2
    assert "fleet.yml: submiter: unknown key, did you mean 'submitter'?" in done.stderr
    assert "next:  edit fleet.yml" in done.stderr
    assert not (tmp_path / "sessions").exists()


def test_a_host_listed_twice_is_two_and_leaves_no_session(fleet: Fleet, tmp_path: Path) -> None:
    twice = "hosts: [{name: 'h[01-02]', kind: server}, {name: h01, kind: server}]"
    text = MINIMAL.replace("hosts: [{name: h01, kind: server}]", twice)
    (tmp_path / "fleet.yml").write_text(text, encoding="utf-8")
    for verb in ("bench", "inventory", "check", "provision"):
        done = fleet(verb)
        assert done.returncode == 2
        assert "h01" in done.stderr
        assert not (tmp_path / "sessions").exists()


def test_run_without_a_session_that_fits_is_one_with_the_next_command(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "fleet.yml").write_text(MINIMAL, encoding="utf-8")
    said = Done(1, "", "fleet: no session of fleet.yml as it is now\nnext:  fleet provision\n")
    assert fleet("run") == said
    assert not (tmp_path / "sessions").exists()
    scene(tmp_path, MINIMAL.replace("h01", "h02"))
    assert fleet("run") == said
    assert [path.name for path in (tmp_path / "sessions").iterdir()] == ["s1"]


@pytest.mark.parametrize("verb", ["status", "collect", "results", "report", "submission"])
def test_without_a_session_it_is_one_with_the_next_command(fleet: Fleet, verb: str) -> None:
    done = fleet(verb)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["fleet: no session in sessions", "next:  fleet bench"]


def test_sessions_of_an_empty_folder(fleet: Fleet) -> None:
    done = fleet("sessions")
    assert done.returncode == 0
    assert "0 sessions in sessions" in done.stdout
    assert json.loads(fleet("sessions", "--json").stdout) == []


def test_init_writes_a_campaign_once(fleet: Fleet, tmp_path: Path) -> None:
    done = fleet("init", "--local")
    assert done.returncode == 0
    assert "next:  fleet bench --quick" in done.stderr
    written = (tmp_path / "fleet.yml").read_text(encoding="utf-8")
    assert "THIS_HOST" not in written
    again = fleet("init")
    assert again.returncode == 2
    assert "fleet.yml exists already" in again.stderr
    assert "next:  edit it, or: fleet init --force fleet.yml" in again.stderr
    assert (tmp_path / "fleet.yml").read_text(encoding="utf-8") == written
    assert fleet("init", "--force", "deep/other.yml").returncode == 0
    assert (tmp_path / "deep" / "other.yml").is_file()
    assert fleet("init", "--force").returncode == 0
    assert (tmp_path / "fleet.yml").read_text(encoding="utf-8") != written


@pytest.mark.parametrize(("uid", "line"), [(0, "    # user: me   "), (65534, '    user: "nobody"')])
def test_init_asks_no_host_for_root(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, line: str
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: uid)
    assert fleet("init").returncode == 0
    written = (tmp_path / "fleet.yml").read_text(encoding="utf-8")
    assert f"\n{line}" in written
    assert "YOUR_USER" not in written
    assert "root" not in yaml.safe_load(written)["hosts"][0].values()


def test_the_schema_on_stdout_is_a_schema(fleet: Fleet) -> None:
    done = fleet("schema")
    assert done.stderr == ""
    jsonschema.Draft202012Validator.check_schema(json.loads(done.stdout))


def planned(base: Path, state: UnitState, cause: str = "") -> None:
    session = scene(base).session
    one = spec("h01", Unit())
    session.write(session.run / "plan.json", Plan(quick=True, units=(one,)))
    session.write(
        session.run / "units" / f"{one.unit}.json", UnitRecord(unit=one.unit, host="h01", state=state, cause=cause)
    )


@pytest.mark.parametrize(
    ("state", "code"), [(UnitState.DONE, 0), (UnitState.FAILED, 3), (UnitState.RUNNING, 3), (UnitState.UNREACHABLE, 3)]
)
def test_status_says_where_units_stand(fleet: Fleet, tmp_path: Path, state: UnitState, code: int) -> None:
    planned(tmp_path, state, "[red]\x1b[31mwhy")
    done = fleet("status")
    assert done.returncode == code
    assert f"session s1: {int(code == 0)} of 1 units done" in done.stdout
    assert "\x1b" not in done.stdout
    assert "[red]?[31mwhy" in done.stdout
    as_json = fleet("status", "--json")
    assert as_json.returncode == code
    assert [row["state"] for row in json.loads(as_json.stdout)["units"]] == [str(state)]
    assert as_json.stderr == ""


def test_status_works_before_anything_is_planned(fleet: Fleet, tmp_path: Path) -> None:
    sessions.create(tmp_path / "sessions", MINIMAL, name="s0")
    assert json.loads(fleet("status", "--json").stdout) == {
        "hosts": [],
        "owner": None,
        "session": "s0",
        "units": [],
        "leases": [],
    }
    scene(tmp_path, states={"h01": HostState.UNREACHABLE})
    done = fleet("status")
    assert done.returncode == 3
    assert "nothing planned yet" in done.stdout
    assert re.search(r"h01 +│ unreachable │ +│ h01 is away", done.stdout)


def test_status_says_who_works_on_it_and_whether_he_lives(fleet: Fleet, tmp_path: Path) -> None:
    planned(tmp_path, UnitState.RUNNING)
    session = sessions.latest(tmp_path / "sessions")
    assert session is not None
    assert "no controller works on it" in fleet("status").stdout
    with session.locked("fleet bench"):
        session.enter("collect")
        assert f"controller: pid {os.getpid()} on " in fleet("status").stdout
        owner = json.loads(fleet("status", "--json").stdout)["owner"]
        kept = (session.root / "controller.json").read_bytes()
    assert (owner["pid"], owner["command"], owner["stage"], owner["alive"]) == (
        os.getpid(), "fleet bench", "collect", True,
    )  # fmt: skip
    # As a controller leaves it that was killed.
    (session.root / "controller.json").write_bytes(kept)
    assert "its controller is gone, it was pid" in fleet("status").stdout
    assert json.loads(fleet("status", "--json").stdout)["owner"]["alive"] is False


def test_status_says_what_a_host_said_last_and_how_often_a_unit_was_started(fleet: Fleet, tmp_path: Path) -> None:
    planned(tmp_path, UnitState.RUNNING)
    session = sessions.latest(tmp_path / "sessions")
    assert session is not None
    lost = HostRecord(
        host="h01", state=HostState.UNREACHABLE, cause="no answer for 25 s", since=1.0, last_answer_at=2.0
    )
    session.write(session.run / "hosts" / "h01.json", lost)
    (record,) = handoff.records(session).values()
    before = Attempt(state=UnitState.FAILED, reason=Reason.OTHER, cause="x", ended_at=1.0)
    running = replace(record, attempts=(before,), status=status(record.unit, UnitState.RUNNING, expected_s=120.0))
    session.write(session.run / "units" / f"{record.unit}.json", running)
    shown = fleet("status").stdout
    assert re.search(r"h01 +│ unreachable │ \d+ s ago +│ no answer for 25 s", shown)
    assert re.search(r"running │ 2 +│ 1 min of about 2 min", shown)


@pytest.mark.parametrize("verb", ["attach", "run", "collect", "bench"])
def test_a_second_controller_is_refused_by_every_verb_that_reaches_hosts(
    fleet: Fleet, tmp_path: Path, verb: str
) -> None:
    (tmp_path / "fleet.yml").write_text(MINIMAL, encoding="utf-8")
    planned(tmp_path, UnitState.RUNNING)
    session = sessions.latest(tmp_path / "sessions")
    assert session is not None
    with session.locked("fleet bench --quick"):
        done = fleet(verb, "--session", "s1")
    assert done.returncode == 1
    assert re.search(rf"in use by pid {os.getpid()} on \S+ since \d+ s \(fleet bench --quick\)", done.stderr)


def test_attach_needs_something_that_was_started(fleet: Fleet, tmp_path: Path) -> None:
    scene(tmp_path)
    done = fleet("attach")
    assert done == Done(1, "", "fleet: nothing was started in session s1\nnext:  fleet bench --session s1\n")


@pytest.mark.parametrize("verb", ["bench", "check", "provision", "inventory"])
def test_a_pattern_that_fits_no_host_starts_nothing(fleet: Fleet, tmp_path: Path, verb: str) -> None:
    (tmp_path / "fleet.yml").write_text(MINIMAL, encoding="utf-8")
    done = fleet(verb, "--limit", "h99")
    assert done.returncode == 2
    assert "fleet: --limit h99: no such host\nnext:  the hosts are h01\n" in done.stderr


def test_sessions_lists_broken_ones_too(fleet: Fleet, tmp_path: Path) -> None:
    planned(tmp_path, UnitState.DONE)
    (tmp_path / "sessions" / "bad").mkdir()
    (tmp_path / "sessions" / "bad" / "session.json").write_text("{", encoding="utf-8")
    done = fleet("sessions", "--json")
    rows = {row["session"]: row["units"] for row in json.loads(done.stdout)}
    assert rows["s1"] == "1 of 1 units done"
    assert rows["bad"].startswith("unreadable: ")


def test_an_unknown_session_is_an_error_with_words(fleet: Fleet, tmp_path: Path) -> None:
    planned(tmp_path, UnitState.DONE)
    done = fleet("status", "--session", "nope")
    assert done.returncode == 1
    assert "not a fleet session" in done.stderr
    assert "next:  fleet sessions" in done.stderr


def test_submission_check_of_nothing_is_a_finding(fleet: Fleet, tmp_path: Path) -> None:
    assert fleet("submission", "check").returncode == 1
    planned(tmp_path, UnitState.DONE)
    done = fleet("submission", "check")
    assert done.returncode == 5
    assert "there is no submission tree" in done.stdout
    as_json = fleet("submission", "check", "--json")
    assert as_json.returncode == 5
    assert "no submission tree" in json.loads(as_json.stdout)[0]["message"]
    assert fleet("submission", "check", "--session", "nope").returncode == 1


@pytest.mark.parametrize("option", ["--json", "--session=nope"])
def test_options_before_submission_check_are_not_dropped(fleet: Fleet, tmp_path: Path, option: str) -> None:
    planned(tmp_path, UnitState.DONE)
    # Taken for check's own, or refused as usage; not ignored.
    done = fleet("submission", option, "check")
    assert "there is no submission tree" not in done.stdout or done.stdout.startswith("[")


def test_a_session_in_use_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    planned(tmp_path, UnitState.DONE)
    session = sessions.latest(tmp_path / "sessions")
    assert session is not None
    with session.locked():
        done = fleet("results")
    assert done.returncode == 1
    assert f"in use by pid {os.getpid()}" in done.stderr


def test_check_of_this_machine_for_real(fleet: Fleet, tmp_path: Path) -> None:
    assert fleet("init", "--local").returncode == 0
    text = (tmp_path / "fleet.yml").read_text(encoding="utf-8")
    (tmp_path / "fleet.yml").write_text(f"{text}    python: {sys.executable}\nwork_dir: {tmp_path}/work\n", "utf-8")
    done = fleet("check", "--json")
    (row,) = json.loads(done.stdout)
    assert done.returncode == (0 if row["state"] == "ready" else 3)
    assert row["state"] in {"ready", "not-ready"}, row
    assert not (tmp_path / "work").exists()
    assert row["expected_s"]["tiny-bert"] > 600
    again = fleet("check")
    assert "1 hosts ready" in again.stdout
    assert re.search(r"tiny-bert │ (runs +│ about \d+ min|cannot: )", again.stdout) or row["state"] == "not-ready"
    assert len(list((tmp_path / "sessions").iterdir())) == 1


def test_an_unreachable_host_is_named_and_the_code_is_three(fleet: Fleet, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host h01\n  HostName 127.0.0.1\n  Port 1\n", encoding="utf-8")
    (tmp_path / "fleet.yml").write_text(MINIMAL, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEET_SSH_CONFIG", str(config))
        done = fleet("inventory", "--json")
    assert done.returncode == 3
    (row,) = json.loads(done.stdout)
    assert (row["state"], row["host"]) == ("unreachable", "h01")
    assert "127.0.0.1 port 1" in row["cause"]
    assert row["hint"]


@pytest.mark.parametrize(("verb", "name"), [("check", "a/b"), ("status", "a/b"), ("status", ".."), ("check", "-a")])
def test_a_session_name_that_is_no_name_is_refused(fleet: Fleet, tmp_path: Path, verb: str, name: str) -> None:
    (tmp_path / "fleet.yml").write_text(MINIMAL, encoding="utf-8")
    done = fleet(verb, f"--session={name}")
    assert done.returncode == 1
    assert f"{name!r} is no session name" in done.stderr
    assert not (tmp_path / "sessions").exists() or not list((tmp_path / "sessions").iterdir())
