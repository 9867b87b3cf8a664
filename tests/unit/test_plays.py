"""ansible-runner's events become one outcome per host; one real run over this machine."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fleet import content, plays
from fleet.errors import PlayError
from fleet.plays import AnsiblePlays, HostOutcome, PlayEvent, PlayRequest
from fleet.terms import HostState
from tests.unit.fakes import Scene, scene

REQUEST = PlayRequest(playbook="preflight", inventory=Path("hosts.yml"), hosts=["a", "b"], folder=Path("plays"))


def task(kind: str, host: str, name: str = "Do it", **data: Any) -> dict[str, Any]:
    """An event as ansible-runner hands it over."""
    result = data.pop("res", {})
    return {
        "event": kind,
        "stdout": "",
        "event_data": {"host": host, "task": name, "role": "preflight", "res": result, **data},
    }


def stats(*processed: str) -> dict[str, Any]:
    return {"event": "playbook_on_stats", "event_data": {"processed": dict.fromkeys(processed, 1)}}


def settled(
    *events: dict[str, Any], hosts: tuple[str, ...] = ("a", "b")
) -> tuple[dict[str, HostOutcome], list[PlayEvent]]:
    outcomes = {name: HostOutcome(host=name, state=HostState.FAILED) for name in hosts}
    ended: set[str] = set()
    spoken: list[str] = []
    seen: list[PlayEvent] = []
    for event in events:
        plays._digest(event, outcomes, ended, spoken, seen.append)
    plays._settle(outcomes, ended, spoken, REQUEST, 0)
    return outcomes, seen


def test_hosts_that_ended_without_trouble_are_ready() -> None:
    outcomes, seen = settled(
        task("runner_on_start", "a"),
        task("runner_on_ok", "a", res={"changed": True, "x": 1}),
        task("runner_on_ok", "b", res={"changed": False}),
        task("runner_on_skipped", "b", "Not here"),
        stats("a", "b"),
    )
    assert {name: (item.state, item.ok, item.changed) for name, item in outcomes.items()} == {
        "a": (HostState.READY, 1, 1),
        "b": (HostState.READY, 1, 0),
    }
    assert outcomes["a"].results["Do it"]["x"] == 1
    assert [(event.host, event.kind) for event in seen] == [
        ("a", "start"), ("a", "changed"), ("b", "ok"), ("b", "skipped"),
    ]  # fmt: skip


def test_a_failed_task_is_the_cause_with_its_role() -> None:
    outcomes, _ = settled(task("runner_on_failed", "a", res={"msg": "No space left\nmore"}), stats("a", "b"))
    assert outcomes["a"].state is HostState.FAILED
    assert outcomes["a"].cause == "preflight: Do it: No space left"
    assert outcomes["b"].state is HostState.READY


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"msg": "non-zero return code", "stderr": "first\nthe reason\n", "stdout": "x"}, "the reason"),
        ({"msg": "MODULE FAILURE: see stdout", "module_stderr": "Traceback\nOSError: no\n"}, "OSError: no"),
        ({"msg": "non-zero return code", "stderr": "", "stdout": "only here\n"}, "only here"),
        ({"msg": ["a list"]}, "failed without a message"),
        ({}, "failed without a message"),
    ],
)
def test_the_cause_is_the_line_that_says_why(result: dict[str, Any], said: str) -> None:
    outcomes, _ = settled(task("runner_on_failed", "a", res=result), stats("a", "b"))
    assert outcomes["a"].cause == f"preflight: Do it: {said}"


def test_a_failed_item_is_the_cause_not_the_loop() -> None:
    outcomes, _ = settled(
        task("runner_item_on_failed", "a", res={"msg": "the model is damaged"}),
        task("runner_on_failed", "a", res={"msg": "One or more items failed"}),
        stats("a", "b"),
    )
    assert outcomes["a"].cause == "preflight: Do it: the model is damaged"


def test_a_failure_that_the_role_rescued_is_none() -> None:
    outcomes, _ = settled(
        task("runner_on_failed", "a", "Fetch", res={"msg": "no such file"}),
        task("runner_on_start", "a", "Note"),
        task("runner_on_ok", "a", "Note", res={"ansible_facts": {"assets_failed": {"x": "no such file"}}}),
        stats("a", "b"),
    )
    assert (outcomes["a"].state, outcomes["a"].cause) == (HostState.READY, "")
    assert outcomes["a"].results["Note"]["ansible_facts"] == {"assets_failed": {"x": "no such file"}}


def test_a_failure_after_a_rescue_is_the_cause() -> None:
    outcomes, _ = settled(
        task("runner_on_failed", "a", "Fetch", res={"msg": "no such file"}),
        task("runner_on_start", "a", "Describe"),
        task("runner_on_failed", "a", "Describe", res={"msg": "out of memory"}),
        stats("a", "b"),
    )
    assert (outcomes["a"].state, outcomes["a"].cause) == (HostState.FAILED, "preflight: Describe: out of memory")


def test_an_ignored_failure_is_none() -> None:
    outcomes, _ = settled(task("runner_on_failed", "a", res={"msg": "no"}, ignore_errors=True), stats("a", "b"))
    assert outcomes["a"].state is HostState.READY


def test_an_ignored_failed_item_is_none() -> None:
    outcomes, _ = settled(
        task("runner_item_on_failed", "a", res={"msg": "no"}, ignore_errors=True),
        task("runner_on_failed", "a", res={"msg": "One or more items failed"}, ignore_errors=True),
        stats("a", "b"),
    )
    assert outcomes["a"].state is HostState.READY


def test_not_ready_is_said_in_the_modules_own_words() -> None:
    outcomes, _ = settled(
        task("runner_on_failed", "a", res={"msg": "on battery: plug it in", "fleet_not_ready": True}), stats("a", "b")
    )
    assert (outcomes["a"].state, outcomes["a"].cause) == (HostState.NOT_READY, "on battery: plug it in")


def test_an_unreachable_host_holds_nobody_up() -> None:
    outcomes, seen = settled(
        task("runner_on_unreachable", "a", res={"msg": "Connection timed out", "unreachable": True}),
        task("runner_on_unreachable", "b", res={}),
        stats("a", "b"),
    )
    assert (outcomes["a"].state, outcomes["a"].cause) == (HostState.UNREACHABLE, "Connection timed out")
    assert (outcomes["b"].state, outcomes["b"].cause) == (HostState.UNREACHABLE, "no answer over ssh")
    assert [event.kind for event in seen] == ["unreachable", "unreachable"]


CHANGED = """Failed to connect to the host via ssh: @@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Host key verification failed."""
LOST = 'Task failed: Data could not be sent to remote host "h". Make sure this host can be reached over ssh: '
BANNER = """Failed to connect to the host via ssh: ########################
# All activity is logged. #
########################
{}"""


@pytest.mark.parametrize(
    ("said", "state", "cause"),
    [
        (CHANGED, HostState.CHANGED_KEY, "its host key changed"),
        ("No ED25519 host key is known for h.\nHost key verification failed.", HostState.UNKNOWN_KEY, "its host key is not"),
        (BANNER.format("ssh: connect to host h port 22: Connection refused"), HostState.UNREACHABLE, "ssh: connect to host h port 22"),
        (BANNER.format("me@h: Permission denied (publickey)."), HostState.UNREACHABLE, "me@h: Permission denied"),
        (BANNER.format(""), HostState.UNREACHABLE, "# All activity is logged. #"),
        (f"{LOST}Connection timed out during banner exchange", HostState.UNREACHABLE, "no answer: Connection timed out during banner"),
        ("Data could not be sent to remote host\nmore", HostState.UNREACHABLE, "Data could not be sent to remote host"),
    ],
)  # fmt: skip
def test_what_ssh_says_is_the_cause_and_no_banner(said: str, state: HostState, cause: str) -> None:
    outcomes, _ = settled(task("runner_on_unreachable", "a", res={"msg": said}), stats("a", "b"))
    assert outcomes["a"].state is state
    assert outcomes["a"].cause.startswith(cause)
    assert "\n" not in outcomes["a"].cause
    assert bool(outcomes["a"].hint) == (state is not HostState.UNREACHABLE)


def test_a_host_that_never_ran_is_not_ready() -> None:
    outcomes, _ = settled(task("runner_on_ok", "a"), stats("a"))
    assert outcomes["b"].state is HostState.FAILED
    assert outcomes["b"].cause == "Ansible never ran playbook preflight on it"


def test_a_broken_playbook_is_an_error_with_ansibles_last_words() -> None:
    spoken = [{"event": "verbose", "stdout": f"line {number}"} for number in range(20)]
    with pytest.raises(PlayError) as caught:
        settled(*spoken, {"event": "error", "stdout": "ERROR! no action detected"})
    assert "playbook preflight did not run" in caught.value.message
    assert "ERROR! no action detected" in caught.value.message
    assert "line 0" not in caught.value.message
    assert "plays/artifacts" in caught.value.hint


def test_events_of_other_hosts_and_kinds_are_ignored() -> None:
    outcomes, seen = settled(
        task("runner_on_ok", "stranger"),
        task("runner_retry", "a"),
        {"event": "playbook_on_start", "event_data": {}},
        {"event": "runner_on_ok"},
        stats("a", "b"),
    )
    assert seen == []
    assert set(outcomes) == {"a", "b"}


def test_the_environment_keeps_other_settings_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    found = plays.environment(["-F", "/my/config"], 100)
    assert found["ANSIBLE_FORKS"] == "12"
    assert plays.environment([], 7)["ANSIBLE_FORKS"] == "7"
    assert plays.environment([], 1)["ANSIBLE_FORKS"] == "4"
    assert found["ANSIBLE_SSH_ARGS"].endswith("-F /my/config")
    assert "ServerAliveInterval=5" in found["ANSIBLE_SSH_ARGS"]
    assert Path(found["ANSIBLE_CONFIG"]).is_file()
    assert Path(found["ANSIBLE_ROLES_PATH"], "preflight").is_dir()
    assert found["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_no_hosts_is_no_play(tmp_path: Path) -> None:
    request = PlayRequest(playbook="preflight", inventory=tmp_path / "none.yml", hosts=[], folder=tmp_path / "p")
    assert AnsiblePlays().run(request, lambda _: None) == {}
    assert not (tmp_path / "p").exists()


LOCAL = """
submitter: ExampleLab
benchmarks: [{name: tiny-bert}]
hosts: [{name: here, kind: server, connection: local, python: PYTHON}]
work_dir: WORK
"""


def local(tmp_path: Path) -> Scene:
    text = LOCAL.replace("PYTHON", sys.executable).replace("WORK", str(tmp_path / "work"))
    return scene(tmp_path, text)


def test_preflight_really_runs_on_this_machine_and_changes_nothing(tmp_path: Path) -> None:
    made = local(tmp_path)
    seen: list[PlayEvent] = []
    request = PlayRequest(
        playbook="preflight",
        inventory=made.session.inventory / "hosts.yml",
        hosts=["here", "not-in-the-inventory"],
        variables={"preflight_needs": {"tiny-bert": {"memory_gib": 0.001, "disk_gib": 0.001}}},
        folder=tmp_path / "plays",
    )
    outcomes = AnsiblePlays().run(request, seen.append)
    assert (outcomes["here"].state, outcomes["here"].cause) == (HostState.READY, "")
    assert outcomes["here"].changed == 0
    result = outcomes["here"].results["Look at the host"]
    assert result["work_dir"] == str(tmp_path / "work")
    assert result["cannot"] == {}
    assert not (tmp_path / "work").exists()
    assert "Look at the host" in {event.task for event in seen if event.kind == "start"}
    assert outcomes["not-in-the-inventory"].state is HostState.FAILED
    assert "never ran" in outcomes["not-in-the-inventory"].cause


def test_preflight_answers_for_each_benchmark(tmp_path: Path) -> None:
    made = local(tmp_path)

    def looked(**needs: Any) -> Any:
        request = PlayRequest(
            playbook="preflight",
            inventory=made.session.inventory / "hosts.yml",
            hosts=["here"],
            variables={"preflight_needs": needs},
            folder=tmp_path / "plays",
        )
        return AnsiblePlays().run(request, lambda _: None)["here"]

    small = {"memory_gib": 0.001, "disk_gib": 0.001}
    mixed = looked(
        **{"tiny-bert": small, "bert-99": {**small, "disk_gib": 1e6}, "gptj-99": {**small, "memory_gib": 1e6}}
    )
    assert (mixed.state, mixed.cause) == (HostState.READY, "")
    cannot = mixed.results["Look at the host"]["cannot"]
    assert set(cannot) == {"bert-99", "gptj-99"}
    assert re.fullmatch(r"[0-9.]+ GiB free, 1e\+06 GiB needed: free some space there", cannot["bert-99"])
    assert re.fullmatch(r"[0-9.]+ GiB memory, 1e\+06 GiB needed", cannot["gptj-99"])
    none = looked(**{"bert-99": {**small, "disk_gib": 1e6}})
    assert none.state is HostState.NOT_READY
    assert none.cause.startswith("bert-99: ")


def test_a_play_that_cannot_start_is_a_play_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = local(tmp_path)
    broken = tmp_path / "broken.yml"
    broken.write_text("- hosts: all\n  roles: [{role: no_such_role}]\n", encoding="utf-8")
    monkeypatch.setattr(content, "playbook", lambda _: broken)
    request = PlayRequest(
        playbook="broken", inventory=made.session.inventory / "hosts.yml", hosts=["here"], folder=tmp_path / "plays"
    )
    with pytest.raises(PlayError, match="no_such_role"):
        AnsiblePlays().run(request, lambda _: None)


SLEEPS = """
- hosts: all
  gather_facts: false
  tasks:
    - ansible.builtin.shell: echo $$ > {pid}; exec sleep 300
"""
CONTROLLER = """
import sys
from pathlib import Path
from fleet import content
from fleet.plays import AnsiblePlays, PlayRequest
inventory, folder, playbook = map(Path, sys.argv[1:])
content.playbook = lambda _: playbook
AnsiblePlays().run(PlayRequest(playbook="x", inventory=inventory, hosts=["here"], folder=folder), lambda _: None)
"""


def gone(pid: int) -> bool:
    """Whether a process is no more; one that nobody has asked for counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ansible_ends_with_its_controller_however_that_ends(tmp_path: Path, number: signal.Signals) -> None:
    made, slept = local(tmp_path), tmp_path / "slept"
    playbook = tmp_path / "sleeps.yml"
    playbook.write_text(SLEEPS.format(pid=slept), encoding="utf-8")
    arguments = [str(made.session.inventory / "hosts.yml"), str(tmp_path / "plays"), str(playbook)]
    with subprocess.Popen([sys.executable, "-c", CONTROLLER, *arguments], stderr=subprocess.DEVNULL) as controller:
        wait_for(lambda: slept.is_file() and slept.read_text(encoding="ascii").strip().isdigit())
        ansible = int((tmp_path / "plays" / "ansible-playbook.pid").read_text(encoding="ascii"))
        task_pid = int(slept.read_text(encoding="ascii"))
        assert not gone(ansible)
        assert not gone(task_pid)
        controller.send_signal(number)
        controller.wait(30)
    wait_for(lambda: gone(ansible) and gone(task_pid), 20)


@pytest.mark.parametrize(("home", "own"), [("/home/" + "u" * 20, True), ("/home/" + "u" * 120, False)])
def test_sockets_of_ssh_fit_into_their_folder_whatever_the_home(
    monkeypatch: pytest.MonkeyPatch, home: str, *, own: bool
) -> None:
    monkeypatch.setenv("HOME", home)
    plays.control_dir.cache_clear()
    try:
        found = plays.environment([], 1)["ANSIBLE_SSH_CONTROL_PATH_DIR"]
        assert (found == f"{home}/.ansible/cp") is own
        assert len(f"{found}/{'h' * 10}.{'r' * 16}") < 108
        assert own or Path(found).stat().st_mode & 0o777 == 0o700
    finally:
        plays.control_dir.cache_clear()
