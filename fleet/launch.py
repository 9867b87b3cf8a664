"""Hand hosts their units and watch them to their ends: what run and tune have in common."""

import queue
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from fleet import handoff, poll, retries
from fleet.campaign import Campaign
from fleet.handoff import Collected, HostRecord, Readiness, UnitRecord
from fleet.harness.contract import Reason, RunSpec, UnitState
from fleet.inventory import files, reach
from fleet.polled import Polled
from fleet.session import Session
from fleet.terms import HostState
from fleet.watch import Watch

Bring = poll.Bring


@dataclass(frozen=True, slots=True)
class Batch:
    """A host whose readiness is settled, and the units it is to run."""

    readiness: Readiness
    specs: Sequence[RunSpec]


Batches = queue.SimpleQueue[Batch | None]
"""Hosts as they become ready; None after the last."""


def batches(pairs: Iterable[tuple[Readiness, Sequence[RunSpec]]]) -> Batches:
    """A finished queue, for those who have everything."""
    made: Batches = queue.SimpleQueue()
    for readiness, specs in pairs:
        made.put(Batch(readiness, specs))
    made.put(None)
    return made


def cancel_folder(session: Session) -> Path:
    """Where `fleet cancel` leaves the names of hosts and units, for the controller that runs them."""
    return session.run / "cancel"


def by_host(readiness: Iterable[Readiness], wanted: Iterable[RunSpec]) -> list[tuple[Readiness, list[RunSpec]]]:
    """`wanted` by host, in order. A host without readiness was never provisioned, and its units will say so."""
    found = {item.host: item for item in readiness}
    specs: dict[str, list[RunSpec]] = {}
    for spec in wanted:
        specs.setdefault(spec.host, []).append(spec)
    never = "never provisioned: fleet provision"
    return [
        (found.get(host) or Readiness(host=host, state=HostState.NOT_READY, cause=never), listed)
        for host, listed in specs.items()
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """Everything that stays the same for all the units that are started together."""

    session: Session
    campaign: Campaign
    watch: Watch
    folder: Path
    """Where hosts/ and units/ are written: the stage's own folder of the session."""
    token: str
    """The session's name on the hosts."""
    _unwritten: dict[Path, UnitRecord | HostRecord] = field(default_factory=dict)
    """What this machine's disk had no room for."""

    def note(self, record: UnitRecord) -> None:
        """Keep what is known of a unit."""
        self.session.write(self._path(record), record)

    def launch(self, batches: Batches, bring: Callable[[], Bring]) -> None:
        """Start the units of each batch as it comes, and watch until each has ended.

        `bring` is asked for once the first is started. What ended for a reason that may pass is started again on the
        same host, as the campaign's `run.retry` says. Raises OSError when records could not be written to the last.
        """
        hosts = {host.name: host for host in files.hosts(self.session)}
        home = cache(bring)
        known: dict[str, UnitRecord] = {}

        def bring_home(connection: reach.Connection, work_dir: str, record: UnitRecord) -> Collected | None:
            return home()(connection, work_dir, record)

        def accept(batch: Batch) -> Polled | None:
            ready = [spec for spec in batch.specs if self._may_start(batch.readiness, spec, known)]
            if not ready:
                return None
            # Made now, when there is a plan: the connection to the host is its business later.
            home()
            specs = {spec.unit: spec for spec in ready}
            host = hosts[batch.readiness.host]
            return Polled(host=host, work_dir=batch.readiness.work_dir, specs=specs, to_start=list(specs))

        poll.Poll(
            known=known,
            note=self._keep,
            note_host=self._keep,
            bring=bring_home,
            watch=self.watch,
            token=self.token,
            lost_after_s=self.campaign.run.lost_after_s,
            policy=lambda reason: retries.policy(self.campaign, reason),
            cancelled=lambda: {path.name for path in cancel_folder(self.session).glob("*")},
        ).run(batches, accept)
        self._write_rest()

    def _may_start(self, host: Readiness, spec: RunSpec, known: dict[str, UnitRecord]) -> bool:
        """Whether the unit can start at all; one that cannot ends here, with the cause."""
        record = known[spec.unit] = self._record(spec)
        if host.state is not HostState.READY:
            away = host.state is HostState.UNREACHABLE
            state, reason = (UnitState.UNREACHABLE, Reason.UNREACHABLE) if away else (UnitState.NOT_READY, Reason.OTHER)
            cause = host.cause or str(host.state)
        elif spec.benchmark in host.cannot:
            state, reason, cause = UnitState.NOT_READY, Reason.OTHER, host.cannot[spec.benchmark]
        else:
            self._keep(record)
            return True
        if host.state in poll.HOST_KEY:
            reason = Reason.HOST_KEY
        known[spec.unit] = replace(record, state=state, cause=cause, reason=reason)
        self._keep(known[spec.unit])
        return False

    def _record(self, spec: RunSpec) -> UnitRecord:
        """A unit that is about to start; its earlier attempts stay on record, and what one of them measured."""
        path = self.folder / "units" / f"{spec.unit}.json"
        if not path.is_file():
            return handoff.pending(spec)
        earlier = self.session.read(path, UnitRecord)
        return replace(handoff.pending(spec), attempts=earlier.attempts, best=earlier.best)

    def _path(self, record: UnitRecord | HostRecord) -> Path:
        if isinstance(record, UnitRecord):
            return self.folder / "units" / f"{record.unit}.json"
        return self.folder / "hosts" / f"{record.host}.json"

    def _keep(self, record: UnitRecord | HostRecord) -> None:
        """Write a record; one for which there is no room is written later, and the units run on."""
        self._unwritten[self._path(record)] = record
        try:
            self._write_rest()
        except OSError as error:
            self.watch.host(record.host, f"this machine cannot keep its records: {error.strerror or error}")

    def _write_rest(self) -> None:
        for path, record in list(self._unwritten.items()):
            self.session.write(path, record)
            del self._unwritten[path]
