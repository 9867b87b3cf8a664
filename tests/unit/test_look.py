"""Hosts looked at without Ansible: what settles them, and what is left to the play."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from fleet import content, look
from fleet.inventory import reach
from fleet.inventory.hosts import Host
from fleet.inventory.reach import Answer, Unreachable
from fleet.plays import HostOutcome
from fleet.terms import HostKind, HostState
from tests.unit.fakes import FakeConnection

WANTED = look.Wanted(python_env="e1", harness="h1", assets={"tiny-bert": "h1", "tiny-gptj": "h1"})
LOOK_ONLY = look.Wanted(python_env="e1", harness=None, assets={"tiny-bert": "h1"})
GONE = Unreachable(HostState.UNREACHABLE, "no answer in 20 s", "ssh h01 true")
GIVEN = {"preflight_needs": {"tiny-bert": {"disk_gib": 0.0}}, "preflight_python_env_digest": "e1"}


def converged(**changes: Any) -> dict[str, Any]:
    stamps = {"python_env": "e1", "harness": "h1", "assets": {"tiny-bert": "h1", "tiny-gptj": "h1"}}
    return {"msg": "", "cannot": {}, "stamps": stamps, "description": "{}", "memory_bytes": 1} | changes


def stamped(**changes: Any) -> dict[str, Any]:
    return converged(stamps=converged()["stamps"] | changes)


def host(name: str = "h01", connection: str = "ssh") -> look.Looked:
    made = Host(name=name, kind=HostKind.SERVER, connection=connection, address=name)
    options = look.options(GIVEN, work_dir="/nowhere/.mlperf-fleet")
    assert options is not None
    return look.Looked(host=made, python=sys.executable, options=options)


Ask = Callable[..., dict[str, HostOutcome]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Looks at hosts behind the connections given, by name."""

    def ask(wanted: look.Wanted = WANTED, **connections: FakeConnection) -> dict[str, HostOutcome]:
        monkeypatch.setattr(reach, "connect", lambda item: connections[item.name])
        return look.look([host(name) for name in connections], wanted, "Look", lambda _: None)

    return ask


def test_a_converged_host_is_ready(ask: Ask) -> None:
    connection = FakeConnection([json.dumps(converged())])
    outcome = ask(h01=connection)["h01"]
    assert (outcome.state, outcome.changed, outcome.ok) == (HostState.READY, 0, 1)
    assert outcome.results == {"Look": converged()}
    assert connection.closed
    assert len(connection.commands) == 1


@pytest.mark.parametrize(
    "answer",
    [
        stamped(python_env="e2"),
        stamped(harness=""),
        stamped(assets={"tiny-bert": "h1"}),
        stamped(assets={"tiny-bert": "h1", "tiny-gptj": "h0"}),
        converged(description=""),
        {"msg": ""},
        converged(stamps=[]),
        [],
    ],
)
def test_what_differs_is_left_to_the_play(ask: Ask, answer: Any) -> None:
    assert ask(h01=FakeConnection([json.dumps(answer)])) == {}


def test_a_benchmark_that_cannot_run_needs_no_assets(ask: Ask) -> None:
    answer = stamped(assets={"tiny-bert": "h1"}) | {"cannot": {"tiny-gptj": "0.5 GiB memory"}}
    assert ask(h01=FakeConnection([json.dumps(answer)]))["h01"].state is HostState.READY


def test_a_host_with_a_problem_is_not_ready_whatever_is_on_it(ask: Ask) -> None:
    outcome = ask(h01=FakeConnection([json.dumps(converged(msg="on battery: plug the charger in"))]))["h01"]
    assert (outcome.state, outcome.cause) == (HostState.NOT_READY, "on battery: plug the charger in")


def test_check_wants_nothing_installed(ask: Ask) -> None:
    answer = stamped(python_env="", harness="", assets={}) | {"description": ""}
    assert ask(LOOK_ONLY, h01=FakeConnection([json.dumps(answer)]))["h01"].state is HostState.READY


def test_a_host_that_does_not_answer_is_unreachable(ask: Ask) -> None:
    connection = FakeConnection([GONE])
    outcome = ask(h01=connection)["h01"]
    assert (outcome.state, outcome.cause, outcome.hint) == (HostState.UNREACHABLE, GONE.cause, GONE.hint)
    assert connection.commands[-1] == "true"
    assert connection.closed


def test_a_host_that_is_slow_but_alive_is_left_to_the_play(ask: Ask) -> None:
    assert ask(h01=FakeConnection([GONE, ""])) == {}


def test_a_module_that_fails_is_left_to_the_play(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = FakeConnection([""])
    monkeypatch.setattr(connection, "run", lambda *_, **__: Answer(rc=1, out=json.dumps(converged()), err="Traceback"))
    assert ask(h01=connection) == {}


def test_one_host_does_not_change_anothers_outcome(ask: Ask) -> None:
    found = ask(
        h01=FakeConnection([GONE]), h02=FakeConnection([json.dumps(converged())]), h03=FakeConnection(["what?"])
    )
    assert {name: outcome.state for name, outcome in found.items()} == {
        "h01": HostState.UNREACHABLE,
        "h02": HostState.READY,
    }


def test_a_host_that_refuses_is_named_with_its_state_and_next_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Host) -> reach.Connection:
        raise Unreachable(HostState.CHANGED_KEY, "its key changed", "ssh-keygen -R h01")

    monkeypatch.setattr(reach, "connect", refuse)
    outcome = look.look([host()], WANTED, "Look", lambda _: None)["h01"]
    assert (outcome.state, outcome.cause, outcome.hint) == (
        HostState.CHANGED_KEY, "its key changed", "ssh-keygen -R h01",
    )  # fmt: skip


def test_the_module_runs_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The real module, over the connection to this machine, with no Ansible in sight."""
    here = host("here", connection="local")
    made = look.Looked(host=here.host, python=sys.executable, options=here.options | {"work_dir": "/proc/nowhere"})
    started: list[str] = []
    outcome = look.look([made], LOOK_ONLY, "Look", started.append)["here"]
    assert outcome.state is HostState.NOT_READY
    assert "/proc/nowhere cannot be written" in outcome.cause or "GiB free for /proc/nowhere" in outcome.cause
    assert started == ["here"]
    assert outcome.results["Look"]["stamps"] == {"python_env": "", "harness": "", "assets": {}, "weights": {}}
    folder = tmp_path_factory.mktemp("home")
    made = look.Looked(host=here.host, python=sys.executable, options=here.options | {"work_dir": str(folder)})
    assert look.look([made], LOOK_ONLY, "Look", started.append)["here"].state is HostState.READY
    assert list(folder.iterdir()) == []


def test_the_options_are_those_of_the_role() -> None:
    role = content.root() / "roles" / look.ROLE
    (task,) = yaml.safe_load((role / "tasks" / "main.yml").read_text(encoding="utf-8"))
    assert task[look.MODULE] == {name: f"{{{{ {look.ROLE}_{name} }}}}" for name in task[look.MODULE]}
    found = look.options(GIVEN, work_dir="/home/me/.mlperf-fleet")
    assert found is not None
    assert found.keys() == task[look.MODULE].keys()
    assert (found["work_dir"], found["on_battery"]) == ("/home/me/.mlperf-fleet", "warn")
    assert found["needs"] == GIVEN["preflight_needs"]


def test_given_values_win_over_defaults() -> None:
    found = look.options({"preflight_on_battery": "stop", "preflight_spare_gib": 2}, work_dir="/w")
    assert found is not None
    assert (found["on_battery"], found["spare_gib"]) == ("stop", 2)


@pytest.mark.parametrize(
    "given",
    [
        {"preflight_on_battery": "perhaps"},
        {"preflight_spare_gib": "1"},
        {"preflight_work_dir": "{{ ansible_env.HOME }}/there"},
        {"preflight_needs": {"tiny-bert": {"disk_gib": "{{ mine }}"}}},
    ],
)
def test_templates_and_mistakes_are_ansibles_to_judge(given: dict[str, Any]) -> None:
    assert look.options(given, work_dir="/w") is None
