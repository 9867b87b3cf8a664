"""Stand-ins for what lies behind a Protocol: plays, connections and the person watching; and sessions to use them on."""

import copy
import hashlib
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fleet import campaign as campaigns
from fleet import session as sessions
from fleet.campaign import Campaign
from fleet.handoff import Readiness, ReadinessFile
from fleet.harness.contract import SupervisorBeat, UnitState, UnitStatus
from fleet.inventory import files, static
from fleet.inventory.hosts import Host, Reachability
from fleet.inventory.reach import Answer, Unreachable
from fleet.plays import HostOutcome, PlayEvent, PlayRequest
from fleet.session import Session
from fleet.terms import HostKind, HostState

MINIMAL = "submitter: ExampleLab\nbenchmarks: [{name: tiny-bert}]\nhosts: [{name: h01, kind: server}]\n"


@dataclass
class FakePlays:
    """Answers with canned outcomes; hosts without one are ready. Remembers every request."""

    outcomes: dict[str, HostOutcome] = field(default_factory=dict)
    events: Sequence[PlayEvent] = ()
    during: Callable[[PlayRequest], None] = lambda _: None
    requests: list[PlayRequest] = field(default_factory=list)

    def run(self, request: PlayRequest, on_event: Callable[[PlayEvent], None]) -> dict[str, HostOutcome]:
        self.requests.append(request)
        self.during(request)
        for event in self.events:
            on_event(event)
        ready = {name: HostOutcome(host=name, state=HostState.READY) for name in request.hosts}
        return {name: copy.deepcopy(self.outcomes.get(name, ready[name])) for name in request.hosts}


@dataclass
class FakeConnection:
    """Says its answers one after another, the last one for ever; an answer may be an exception."""

    answers: list[str | Unreachable]
    commands: list[str] = field(default_factory=list)
    """Questions, in order."""
    closed: int = 0
    refuses: list[str] = field(default_factory=list)
    """What `start` says on stderr as it fails, one time after another; then it takes what it is given."""
    full: dict[str, str] = field(default_factory=dict)
    """Units that `start` has no room for, and what it says of each."""
    started: list[dict[str, Any]] = field(default_factory=list)
    """Queues that `start` was given."""
    cancelled: list[str] = field(default_factory=list)
    """Units that it was told to stop."""

    def run(self, command: str, *, timeout: float, stdin: bytes = b"", stalled: float | None = None) -> Answer:
        assert timeout > 0
        assert stalled is None or stalled > 0
        if stdin:
            assert shlex.split(command)[2] == "start"
            self.started.append(json.loads(stdin))
            refused = self.refuses.pop(0) if self.refuses else ""
            return Answer(rc=bool(refused), out=json.dumps({"refused": self.full}), err=refused)
        if " cancel " in command:
            self.cancelled += shlex.split(command)[5:]
            return Answer(rc=0, out="{}", err="")
        self.commands.append(command)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Unreachable):
            raise answer
        return Answer(rc=0, out=answer, err="")

    def copy(self, command: str, sink: BinaryIO, *, limit: int, stalled: float = 15.0) -> None:
        raise AssertionError(f"nothing is copied here: {command}, {sink}, {limit}, {stalled}")

    def close(self) -> None:
        self.closed += 1


@dataclass
class PackingConnection(FakeConnection):
    """A host whose `pack` has the archives in `archives`, by unit; without one it fails as the harness would."""

    answers: list[str | Unreachable] = field(default_factory=list)
    archives: dict[str, bytes] = field(default_factory=dict)
    announced: dict[str, Any] = field(default_factory=dict)
    """What `pack` says, over the truth."""
    breaks_after: int | None = None
    """Bytes after which the next transfer breaks off, once."""
    copied: list[str] = field(default_factory=list)
    homed: list[str] = field(default_factory=list)
    """Units that it was told are home."""

    def run(self, command: str, *, timeout: float, stdin: bytes = b"", stalled: float | None = None) -> Answer:
        if command.startswith("read up"):
            return super().run(command, timeout=timeout, stdin=stdin, stalled=stalled)
        assert timeout > 0
        words = shlex.split(command)
        if words[0] == "nice":
            assert words[5] == "home"
            self.homed.append(words[-1])
            return Answer(rc=0, out="{}", err="")
        self.commands.append(command)
        if words[0] == "true":
            return Answer(rc=0, out="", err="")
        # What takes long gives signs of life.
        assert stalled
        assert words[:3] == ["while", "sleep", "2"]
        unit = words[words.index("pack") + 3].rstrip(";")
        if unit not in self.archives:
            return Answer(rc=1, out="", err="Traceback\nOSError: no room for the archive\n")
        data = self.archives[unit]
        told = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return Answer(rc=0, out="\n\n" + json.dumps({**told, **self.announced}) + "\n", err="")

    def copy(self, command: str, sink: BinaryIO, *, limit: int, stalled: float = 15.0) -> None:
        assert stalled >= 15
        self.copied.append(command)
        words = shlex.split(command)
        assert words[2] == "send"
        data = self.archives[words[5]][int(words[6]) :]
        if self.breaks_after is not None:
            sink.write(data[: self.breaks_after])
            self.breaks_after = None
            raise Unreachable(HostState.UNREACHABLE, "nothing came for 30 s")
        if len(data) > limit:
            raise ValueError("it sends more than it announced")
        sink.write(data)


def status(unit: str, state: UnitState = UnitState.DONE, **more: Any) -> UnitStatus:
    """A unit as its host sees it."""
    return UnitStatus(unit=unit, state=state, **more)


def answer(
    *statuses: UnitStatus | str,
    uptime: float = 1000.0,
    boot: str = "boot-1",
    beat: SupervisorBeat | None = None,
    gone: int = 0,
) -> str:
    """What the poll's shell command prints; a text stands for a status.json that cannot be read."""
    documents = [] if beat is None else [json.dumps(asdict(beat), indent=1) + "\n"]
    documents += [item if isinstance(item, str) else json.dumps(asdict(item), indent=1) + "\n" for item in statuses]
    return f"{uptime:.2f} {boot}\n{f'gone {gone}{chr(10)}' if gone else ''}" + "".join(
        "\x1e" + document for document in documents
    )


@dataclass
class RecordingWatch:
    """Keeps what it was told."""

    stages: list[str] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def stage(self, name: str, text: str) -> None:
        assert text
        self.stages.append(name)

    def host(self, host: str, text: str, *, fraction: float | None = None, ended: bool = False) -> None:
        assert fraction is None or 0 <= fraction <= 1
        self.lines.append((host, text))
        if ended:
            self.ended.append(host)

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass(frozen=True)
class Scene:
    """A session whose inventory and provision stages have been."""

    session: Session
    campaign: Campaign
    base: Path


def scene(
    base: Path,
    text: str = MINIMAL,
    *,
    states: dict[str, HostState] | None = None,
    instances: Sequence[Host] = (),
    **readiness: Any,
) -> Scene:
    """A session of `text`, with `instances` after its hosts; every host is ready unless `states` says otherwise."""
    campaign = campaigns.load_text(text, "fleet.yml")
    session = sessions.create(base / "sessions", text, name="s1")
    listed = (*static.hosts(campaign, base=base, source="fleet.yml"), *instances)
    given = states or {}
    reachable = [
        Reachability(
            host=host.name,
            kind=HostKind.SERVER,
            state=given.get(host.name, HostState.READY),
            cause="" if given.get(host.name, HostState.READY) is HostState.READY else f"{host.name} is away",
            home="/home/me",
            python="/usr/bin/python3",
        )
        for host in listed
    ]
    files.write(session, listed, reachable, campaign)
    rows = tuple(
        Readiness(host=item.host, state=item.state, cause=item.cause, work_dir="/home/me/.mlperf-fleet", **readiness)
        for item in reachable
    )
    session.write(session.provision / "readiness.json", ReadinessFile(hosts=rows))
    return Scene(session=session, campaign=campaign, base=base)
