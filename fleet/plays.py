"""The only door to ansible-runner: a request in, typed per-host events on the way, one outcome per host out.

Every host of the request is in the result, whatever Ansible's own statistics say: a broken playbook, an
unreachable host and a batch that never ran look alike in ansible-runner's status and return code.
"""

import atexit
import functools
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fleet import content
from fleet.errors import PlayError
from fleet.terms import HostState


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayRequest:
    """One playbook over some hosts of an inventory."""

    playbook: str
    """Name of a playbook in playbooks/, without .yml."""
    inventory: Path
    hosts: Sequence[str]
    variables: dict[str, Any] = field(default_factory=dict)
    """Extra variables; never secrets, ansible-runner keeps them."""
    folder: Path
    """ansible-runner's private data for this play."""
    ssh_arguments: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayEvent:
    """Something that happened on a host just now."""

    host: str
    task: str
    kind: str
    """`start`, `ok`, `changed`, `skipped`, `failed` or `unreachable`."""
    result: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class HostOutcome:
    """How a play ended for one host."""

    host: str
    state: HostState
    changed: int = 0
    ok: int = 0
    cause: str = ""
    hint: str = ""
    """The next command, where one is known."""
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Task name to its result."""


GRACE_S = 5.0
"""Seconds that ansible-playbook gets to end its workers before it is killed."""
REFUSED = "Failed to connect to the host via ssh: "
BROKE_OFF = re.compile("^(Task failed: )?Data could not be sent to remote host .*can be reached over ssh: ")
"""What Ansible puts before what ssh said: at a task's beginning, and in its middle."""
SSH_SAID = re.compile(r"ssh: .|kex_exchange|Connection (closed|reset|refused|timed out)|.*: Permission denied")
"""What ssh itself says, among the lines of banners."""


class Plays(Protocol):
    """What the stages need; the tests' fake implements it too."""

    def run(self, request: PlayRequest, on_event: Callable[[PlayEvent], None]) -> dict[str, HostOutcome]:
        """Run a playbook; one outcome per requested host, never fewer.

        Raises PlayError when the playbook itself is broken, KeyboardInterrupt when cancelled.
        """


class AnsiblePlays:
    """ansible-runner with pipelining, keepalives and task timeouts; forks follow the controller's cores."""

    def __init__(self, cancelled: Callable[[], bool] = lambda: False) -> None:
        self._cancelled = cancelled

    def run(self, request: PlayRequest, on_event: Callable[[PlayEvent], None]) -> dict[str, HostOutcome]:
        """Run a playbook over the request's hosts."""
        outcomes = {name: HostOutcome(host=name, state=HostState.FAILED, cause="") for name in request.hosts}
        if not outcomes:
            return outcomes
        from ansible_runner import interface

        spoken: list[str] = []
        ended: set[str] = set()

        def handle(event: dict[str, Any]) -> bool:
            _digest(event, outcomes, ended, spoken, on_event)
            return True

        request.folder.mkdir(parents=True, exist_ok=True)
        pid_file = request.folder / "ansible-playbook.pid"
        pid_file.unlink(missing_ok=True)

        def cancelled() -> bool:
            if told := self._cancelled():
                _end(pid_file)
            return told

        runner = interface.init_runner(
            private_data_dir=str(request.folder.resolve()),
            playbook=str(content.playbook(request.playbook)),
            inventory=str(request.inventory.resolve()),
            limit=",".join(outcomes),
            extravars=request.variables,
            envvars=environment(request.ssh_arguments, len(outcomes)),
            event_handler=handle,
            cancel_callback=cancelled,
            quiet=True,
            suppress_env_files=True,
            settings={"pexpect_timeout": 2, "idle_timeout": 0},
        )
        runner.config.command = _on_leash(runner.config.command, pid_file)
        try:
            runner.run()
        except BaseException:
            # Ctrl-C among them: what is left to garbage collection goes on changing hosts.
            _end(pid_file)
            raise
        if self._cancelled() or runner.status == "canceled":
            raise KeyboardInterrupt
        _settle(outcomes, ended, spoken, request, runner.rc)
        return outcomes


KEEPALIVE = "-o ControlMaster=auto -o ControlPersist=60s -o ServerAliveInterval=5 -o ServerAliveCountMax=2"
"""As in playbooks/ansible.cfg, which plays without fleet go by."""


def _on_leash(command: Sequence[str], pid_file: Path) -> list[str]:
    """`command`, its pid in `pid_file`, ended with this process however that ends.

    SIGTERM, since Ansible passes that on to its workers, which are in sessions of their own.
    """
    leash = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
    return ["/bin/sh", "-c", 'echo $$ > "$0"; exec "$@"', str(pid_file.resolve()), *leash, *command]


def _end(pid_file: Path) -> None:
    """End the ansible-playbook of a play that is given up, and its workers with it."""
    try:
        pid = int(pid_file.read_text(encoding="ascii"))
        os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + GRACE_S
        while _lives(pid) and time.monotonic() < end:
            time.sleep(0.05)
        if _lives(pid):
            os.killpg(pid, signal.SIGKILL)
    except (OSError, ValueError):
        # It was never started, or has ended by itself.
        return


def _lives(pid: int) -> bool:
    """Whether a child of this process still runs; ended ones stay listed until ansible-runner has asked for them."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0] != "Z"
        )
    except (OSError, IndexError):
        return False


CONTROL_DIR_LIMIT = 79
"""Characters of the folder of ssh's sockets: Linux allows a socket 107, and Ansible and ssh put 28 behind it."""


@functools.cache
def control_dir() -> str:
    """Where the sockets of ssh's shared connections go: Ansible's own place, or a short one under a long HOME."""
    own = os.path.expanduser("~/.ansible/cp")  # noqa: PTH111 - Path raises where there is no home at all
    if len(os.fsencode(own)) <= CONTROL_DIR_LIMIT:
        return own
    made = tempfile.mkdtemp(prefix="fleet-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def environment(ssh_arguments: Sequence[str], hosts: int) -> dict[str, str]:
    """What of Ansible's settings depends on the moment; the rest is in playbooks/ansible.cfg."""
    cores = len(os.sched_getaffinity(0))
    return {
        "ANSIBLE_CONFIG": str(content.root() / "playbooks" / "ansible.cfg"),
        "ANSIBLE_ROLES_PATH": str(content.root() / "roles"),
        "ANSIBLE_FORKS": str(max(4, min(hosts, 4 * cores))),
        "ANSIBLE_SSH_CONTROL_PATH_DIR": control_dir(),
        "ANSIBLE_SSH_ARGS": f"{KEEPALIVE} {shlex.join(ssh_arguments)}",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


_KINDS = {
    "runner_on_start": "start",
    "runner_on_ok": "ok",
    "runner_on_skipped": "skipped",
    "runner_on_failed": "failed",
    "runner_on_unreachable": "unreachable",
}


def _digest(
    event: dict[str, Any],
    outcomes: dict[str, HostOutcome],
    ended: set[str],
    spoken: list[str],
    on_event: Callable[[PlayEvent], None],
) -> None:
    name, data = event.get("event", ""), event.get("event_data", {})
    if name in {"verbose", "error", "warning"} and event.get("stdout"):
        spoken.append(event["stdout"])
    if name == "playbook_on_stats":
        ended.update(data.get("processed", {}))
        return
    kind = _KINDS.get(name)
    outcome = outcomes.get(data.get("host", ""))
    if name == "runner_item_on_failed" and outcome is not None and not data.get("ignore_errors"):
        # The task itself will only say that an item failed.
        outcome.cause = _cause(data, data.get("res") or {})
    if kind is None or outcome is None:
        return
    result = data.get("res") or {}
    if kind == "start":
        # A host goes on after a failure only where the role came to its rescue.
        outcome.cause = ""
    elif kind == "ok":
        outcome.ok += 1
        outcome.results[data.get("task", "")] = result
        if result.get("changed"):
            outcome.changed += 1
            kind = "changed"
    elif kind == "failed" and not data.get("ignore_errors"):
        outcome.state = HostState.NOT_READY if result.get("fleet_not_ready") else HostState.FAILED
        outcome.cause = outcome.cause or _cause(data, result)
    elif kind == "unreachable":
        outcome.state, outcome.cause, outcome.hint = _unreachable(_text(result.get("msg")))
    on_event(PlayEvent(host=outcome.host, task=data.get("task", ""), kind=kind, result=result))


def _unreachable(said: str) -> tuple[HostState, str, str]:
    """State, cause and next command from what ssh said; banners, warnings in frames of @ and all."""
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in said:
        return HostState.CHANGED_KEY, "its host key changed", "fleet check names both keys, and the command if it may"
    if "Host key verification failed" in said:
        return HostState.UNKNOWN_KEY, "its host key is not in your known_hosts", "fleet check names it"
    lines = [BROKE_OFF.sub("no answer: ", line).removeprefix(REFUSED).strip() for line in said.splitlines()]
    spoken = [line for line in lines if re.search("[A-Za-z]", line)]
    of_ssh = [line for line in spoken if SSH_SAID.match(line)]
    return HostState.UNREACHABLE, ([*of_ssh[-1:], *spoken, "no answer over ssh"])[0][:500], ""


def _settle(
    outcomes: dict[str, HostOutcome], ended: set[str], spoken: list[str], request: PlayRequest, rc: int | None
) -> None:
    """Hosts that Ansible's statistics do not mention never ran: that is said, not assumed away."""
    if not ended and not any(outcome.cause for outcome in outcomes.values()):
        tail = "\n".join("\n".join(spoken).strip().splitlines()[-12:])
        raise PlayError(
            f"playbook {request.playbook} did not run (ansible-playbook exit {rc})\n{tail}",
            hint=f"the whole output is in {request.folder}/artifacts",
        )
    for outcome in outcomes.values():
        if outcome.cause:
            continue
        if outcome.host in ended:
            outcome.state = HostState.READY
        else:
            outcome.cause = f"Ansible never ran playbook {request.playbook} on it"


def _cause(data: dict[str, Any], result: dict[str, Any]) -> str:
    text = _text(result.get("msg"))
    if not text or text.startswith(("MODULE FAILURE", "non-zero return code")):
        tail = _text(result.get("module_stderr")) or _text(result.get("stderr")) or _text(result.get("stdout"))
        text = tail.splitlines()[-1] if tail else text
    role, task = data.get("role", ""), data.get("task", "")
    return f"{f'{role}: ' if role else ''}{task}: {_first_line(text)}" if not result.get("fleet_not_ready") else text


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _first_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0][:500] if lines else "failed without a message"
