"""Look at hosts over the control channel: the preflight role's own module, run as a plain script, without Ansible.

Nine tenths of what a converged host costs is Ansible's start and a process per host and task, so only hosts that need
changes get there. Whatever this cannot settle is left to the playbook, which says more and has time.
"""

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fleet import content, threads
from fleet.inventory import reach
from fleet.inventory.hosts import Host
from fleet.plays import HostOutcome
from fleet.terms import HostState

ROLE, MODULE = "preflight", "fleet_preflight"
FILES = "defaults/main.yml", "meta/argument_specs.yml"
KINDS: dict[str, type | tuple[type, ...]] = {"str": str, "dict": dict, "float": (int, float)}
ANSWER_S = 20.0
"""A host that has not answered for so long is asked for a sign of life, and left to Ansible if it gives one."""
ALIVE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """A host to look at, and how."""

    host: Host
    python: str
    """Path of its interpreter."""
    options: dict[str, Any]
    """The module's options for this host."""


class _Stamps(BaseModel):
    python_env: str
    harness: str
    assets: dict[str, str]


class _Answer(BaseModel):
    """What is read of the module's answer here; the rest goes on as it is."""

    msg: str
    cannot: dict[str, str]
    stamps: _Stamps
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What must be on a host for it to be converged; None of `harness` asks for no description either."""

    python_env: str
    harness: str | None
    assets: Mapping[str, str]
    """Benchmark to the fingerprint of what prepares it."""

    def met(self, answer: _Answer) -> bool:
        """Whether a host that answers so needs no change."""
        if self.harness is None:
            return True
        there = (answer.stamps.python_env, answer.stamps.harness) == (self.python_env, self.harness)
        needed = self.assets.keys() - answer.cannot.keys()
        complete = all(answer.stamps.assets.get(name) == self.assets[name] for name in needed)
        return there and complete and bool(answer.description)


@cache
def _role() -> dict[str, tuple[Any, dict[str, Any]]]:
    """The role's variables: default and specification of each."""
    folder = content.root() / "roles" / ROLE
    defaults, specs = (yaml.safe_load((folder / name).read_text(encoding="utf-8")) for name in FILES)
    return {name: (defaults[name], spec) for name, spec in specs["argument_specs"]["main"]["options"].items()}


def options(given: Mapping[str, Any], *, work_dir: str) -> dict[str, Any] | None:
    """The module's options: the role's defaults under `given` variables, with `work_dir` for fleet's folder.

    None where Ansible must decide: a value is a template, or is not what the role's argument_specs ask for.
    """
    found: dict[str, Any] = {}
    for name, (default, spec) in _role().items():
        value = given.get(name, default)
        value = work_dir if value == "{{ fleet_work_dir }}" else value
        template = re.search(r"{[{%#]", json.dumps(value, default=str))
        if template or not isinstance(value, KINDS[spec["type"]]) or value not in spec.get("choices", [value]):
            return None
        found[name.removeprefix(f"{ROLE}_")] = value
    return found


def look(
    hosts: Sequence[Looked],
    wanted: Wanted,
    task: str,
    on_start: Callable[[str], None],
    on_outcome: Callable[[HostOutcome], None] = lambda _: None,
) -> dict[str, HostOutcome]:
    """Look at all hosts side by side; an outcome, as of a play with `task` in it, for each that needs no play.

    `on_outcome` has each as soon as it is there, from several threads.
    Left out are hosts that need changes, and those whose answer settles nothing. Changes nothing on any host.
    """
    source = (content.root() / "roles" / ROLE / "library" / f"{MODULE}.py").read_text(encoding="utf-8")
    opened: list[reach.Connection] = []

    def one(item: Looked) -> HostOutcome | None:
        outcome = asked(item)
        if outcome is not None:
            on_outcome(outcome)
        return outcome

    def asked(item: Looked) -> HostOutcome | None:
        on_start(item.host.name)
        command = shlex.join([item.python, "-c", source, json.dumps(item.options)])
        try:
            connection = reach.connect(item.host)
            opened.append(connection)
            try:
                said = _ask(connection, command)
            finally:
                connection.close()
        except reach.Unreachable as error:
            return HostOutcome(host=item.host.name, state=error.state, cause=error.cause, hint=error.hint)
        return None if said is None else _judge(item.host.name, said, wanted, task)

    named = {item.host.name: item for item in hosts}
    try:
        found = dict(threads.each(lambda name: one(named[name]), list(named)))
        return {name: outcome for name in named if (outcome := found[name]) is not None}
    finally:
        for connection in opened:
            # Ctrl-C waits for no host.
            connection.close()


def _ask(connection: reach.Connection, command: str) -> str | None:
    """What the module printed; None when it failed, or takes longer on a host that is alive."""
    try:
        answer = connection.run(command, timeout=ANSWER_S)
    except reach.Unreachable as error:
        try:
            connection.run("true", timeout=ALIVE_S)
        except reach.Unreachable:
            raise error from None
        return None
    return answer.out if answer.rc == 0 else None


def _judge(host: str, said: str, wanted: Wanted, task: str) -> HostOutcome | None:
    try:
        answer = _Answer.model_validate_json(said)
    except ValidationError:
        return None
    results: dict[str, dict[str, Any]] = {task: json.loads(said)}
    if answer.msg:
        return HostOutcome(host=host, state=HostState.NOT_READY, cause=answer.msg, results=results)
    return HostOutcome(host=host, state=HostState.READY, ok=1, results=results) if wanted.met(answer) else None
