"""What the verbs that need no host say of what is missing, and what Ctrl-C leaves on the screen."""

import json
from pathlib import Path
from typing import Any

import pytest

from fleet import pipeline
from fleet import session as sessions
from fleet.terms import HostState, UnitState
from tests.unit.cli.command import Fleet
from tests.unit.results.session_files import ALL_FOUR, Host, Unit, build

LOST = Host(
    name="b",
    state=HostState.UNREACHABLE,
    cause="no answer",
    units=(Unit(state=UnitState.UNREACHABLE, cause="no answer"),),
)
INVALID = Unit(log="offline-invalid")
VERBS = ["results", "submission", "report"]


def test_the_verbs_that_need_no_host_end_with_three_when_one_is_missing(fleet: Fleet, tmp_path: Path) -> None:
    build(tmp_path / "sessions", [Host(name="a", units=ALL_FOUR), LOST])
    for verb in VERBS:
        done = fleet(verb)
        assert done.returncode == 3
        assert "1 of 2 hosts, 4 of 5 units" in done.stdout + done.stderr
        as_json = fleet(verb, "--json")
        assert as_json.returncode == 3
        first = next(iter(json.loads(as_json.stdout).items()))
        assert first == ("headline", "1 of 2 hosts, 4 of 5 units")


def test_they_end_with_five_for_a_result_that_is_invalid_and_with_three_when_more_is_missing(
    fleet: Fleet, tmp_path: Path
) -> None:
    build(tmp_path / "sessions", [Host(name="a", units=(INVALID, *ALL_FOUR[1:]))])
    assert [fleet(verb).returncode for verb in VERBS] == [5, 5, 5]
    build(tmp_path / "other", [Host(name="a", units=(INVALID,)), LOST])
    # There is nothing to submit, either; a host that is missing is the more serious.
    assert [fleet(verb, "--sessions", "other").returncode for verb in VERBS] == [3, 3, 3]


def test_they_end_with_zero_when_nothing_is_missing(fleet: Fleet, tmp_path: Path) -> None:
    build(tmp_path / "sessions", [Host(name="a", units=ALL_FOUR)])
    assert [fleet(verb).returncode for verb in VERBS] == [0, 0, 0]


@pytest.mark.parametrize(("base", "named"), [("sessions", ""), ("my outings", "--sessions 'my outings' ")])
def test_ctrl_c_ends_with_the_next_command_and_where_the_session_lies(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, named: str
) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "results", interrupted)
    made = build(tmp_path / base, [Host(name="a", units=ALL_FOUR)])
    done = fleet("results", "--sessions", base)
    assert done.returncode == 130
    assert done.stderr.split("\n")[-3:] == [
        "fleet: interrupted; units that were started go on at their hosts",
        f"next:  fleet bench {named}--session {made.id}",
        "",
    ]


def test_a_hint_names_the_folder_where_it_is_not_the_usual_one(fleet: Fleet, tmp_path: Path) -> None:
    sessions.create(tmp_path / "elsewhere", "submitter: x\n", name="s1")
    done = fleet("attach", "--sessions", "elsewhere")
    assert done.stderr.endswith("next:  fleet bench --sessions elsewhere --session s1\n")
