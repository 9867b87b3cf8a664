"""Hand hosts their units and watch them to their ends: what run and tune have in common."""

import queue
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fleet import handoff, poll
from fleet.campaign import Campaign
from fleet.handoff import Readiness, UnitRecord
from fleet.harness.contract import RunSpec, UnitState
from fleet.inventory import files, reach, ssh_config
from fleet.plays import PlayRequest, Plays
from fleet.session import Session
from fleet.terms import HostState
from fleet.watch import Watch, duration

Bring = Callable[[reach.Connection, str, UnitRecord], object]
"""What is done about an ended unit while the connection to its host is open: connection, work folder, record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A host as provision left it, and the units to start there."""

    readiness: Readiness
    specs: list[RunSpec]


def batches(pairs: Iterable[tuple[Readiness, list[RunSpec]]]) -> "queue.SimpleQueue[Batch | None]":
    """A finished queue, for who has everything."""
    found: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
    for readiness, specs in pairs:
        found.put(Batch(readiness=readiness, specs=specs))
    found.put(None)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """Everything that stays the same for all the units that are started together."""

    session: Session
    campaign: Campaign
    plays: Plays
    watch: Watch
    folder: Path
    """Where queues/ and units/ are written: the stage's own folder of the session."""
    token: str
    """The session's name on the hosts."""

    def note(self, record: UnitRecord) -> None:
        """Keep what is known of a unit."""
        self.session.write(self.folder / "units" / f"{record.unit}.json", record)

    def launch(self, waiting: "queue.SimpleQueue[Batch | None]", bring: Callable[[], Bring]) -> None:
        """Start what comes out of `waiting` and watch until each has ended; `bring` is asked for once something has."""
        wanted = [spec for batch in iter(waiting.get, None) for spec in batch.specs]
        if started := self._start(wanted):
            poll.poll(
                started,
                handoff.records(self.session, self.folder),
                self.note,
                bring(),
                self.watch,
                token=self.token,
                lost_after_s=self.campaign.run.lost_after_s,
            )

    def _start(self, wanted: Sequence[RunSpec]) -> list[poll.Polled]:
        """Hand every ready host its units; units that cannot start end here, with the cause."""
        found = {item.host: item for item in handoff.readiness(self.session)}
        queues: dict[str, list[RunSpec]] = {}
        for spec in wanted:
            host = found.get(spec.host)
            record = handoff.pending(spec)
            if host is None:
                record = replace(record, state=UnitState.NOT_READY, cause="never provisioned: fleet provision")
            elif host.state is not HostState.READY:
                state = UnitState.UNREACHABLE if host.state is HostState.UNREACHABLE else UnitState.NOT_READY
                record = replace(record, state=state, cause=host.cause or str(host.state))
            elif spec.benchmark in host.cannot:
                record = replace(record, state=UnitState.NOT_READY, cause=host.cannot[spec.benchmark])
            else:
                queues.setdefault(spec.host, []).append(spec)
            self.note(record)
        if not queues:
            return []
        folder = self.folder / "queues"
        for name, specs in queues.items():
            self.session.write(folder / f"{name}.json", {"session": self.token, "specs": specs})
            minutes = sum(spec.expected_s for spec in specs) / 60
            self.watch.host(name, f"starting {len(specs)} units, about {duration(minutes)}")
        request = PlayRequest(
            playbook="run",
            inventory=self.session.inventory / "hosts.yml",
            hosts=list(queues),
            variables={"benchmark_run_queues": str(folder.resolve())},
            folder=self.session.plays / self.folder.name,
            ssh_arguments=ssh_config.ssh_arguments(),
        )
        outcomes = self.plays.run(request, lambda _: None)
        by_name = {host.name: host for host in files.hosts(self.session)}
        started = []
        for name, specs in queues.items():
            outcome = outcomes[name]
            if outcome.state is HostState.READY:
                units = [spec.unit for spec in specs]
                started.append(poll.Polled(host=by_name[name], work_dir=found[name].work_dir, units=units))
                continue
            state = UnitState.UNREACHABLE if outcome.state is HostState.UNREACHABLE else UnitState.FAILED
            for spec in specs:
                self.note(replace(handoff.pending(spec), state=state, cause=outcome.cause))
            self.watch.host(name, outcome.cause, ended=True)
        return started
