"""What hosts did while nobody watched: one round of questions, before a session goes on. Changes nothing anywhere."""

from collections import Counter
from dataclasses import dataclass, replace

from fleet import answers, handoff, threads
from fleet.handoff import UnitRecord
from fleet.harness.contract import UnitState
from fleet.inventory import files, reach
from fleet.inventory.hosts import Host
from fleet.session import Session
from fleet.subset import Subset
from fleet.terms import HostState

ASK_S = 10.0
"""Seconds that a host has for its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meanwhile:
    """One host whose units were not finished when a controller last looked."""

    host: str
    cause: str = ""
    """Why there is no answer; empty when there is one."""
    units: tuple[UnitRecord, ...] = ()
    """Its unfinished units as they stand now; where there is no answer, as they were last seen."""
    ended: int = 0
    """Units that ended since."""

    @property
    def busy(self) -> bool:
        """Whether units run there, or wait for their turn; where there is no answer, whether they may."""
        if self.cause:
            return any(_may_run(unit) for unit in self.units)
        return any(unit.state in {UnitState.RUNNING, UnitState.QUEUED} for unit in self.units)

    def __str__(self) -> str:
        if self.cause:
            return f"no answer: {self.cause}"
        states = Counter(unit.state for unit in self.units)
        counts = {
            "ended meanwhile": self.ended,
            "running": states[UnitState.RUNNING],
            "waiting there": states[UnitState.QUEUED],
        }
        said = [f"{count} {_units(count)} {what}" for what, count in counts.items() if count]
        return ", ".join(said) or f"nothing happened meanwhile; {len(self.units)} {_units(len(self.units))} missing"


def _units(count: int) -> str:
    return "unit" if count == 1 else "units"


def _may_run(record: UnitRecord) -> bool:
    last_seen = record.status is not None and not record.status.state.ended
    return last_seen or record.state in {UnitState.RUNNING, UnitState.QUEUED, UnitState.UNREACHABLE}


def ask(session: Session, subset: Subset) -> list[Meanwhile]:
    """Ask every host that has unfinished units how they stand; one answer per such host, in the plan's order."""
    if not handoff.planned(session) or not (session.provision / "readiness.json").is_file():
        return []
    planned, known = handoff.plan(session).units, handoff.records(session)
    missing = set(handoff.missing(planned, known, handoff.collected(session)))
    units: dict[str, list[UnitRecord]] = {}
    for spec in planned:
        if spec.unit in missing and not subset.left_out(spec.host):
            units.setdefault(spec.host, []).append(known.get(spec.unit) or handoff.pending(spec))
    work_dirs = {item.host: item.work_dir for item in handoff.readiness(session)}
    token = session.token
    hosts = {host.name: host for host in files.hosts(session) if host.name in units and work_dirs.get(host.name)}
    found = dict(
        threads.each(lambda name: _ask(hosts[name], f"{work_dirs[name]}/runs/{token}", units[name]), list(hosts))
    )
    return [found[name] for name in hosts]


def busy(session: Session, subset: Subset) -> set[str]:
    """Hosts where units of this session run, or wait for their turn: nothing is to be changed under them.

    Among them those that answered the probe, and then not how their units stand: no answer is not "nothing runs".
    """
    there = {item.host for item in files.reachability(session) if item.state is HostState.READY}
    return {item.host for item in ask(session, subset) if item.busy and (item.host in there or not item.cause)}


def _ask(host: Host, folder: str, records: list[UnitRecord]) -> Meanwhile:
    try:
        connection = reach.connect(host)
        try:
            text = connection.run(answers.question(folder, [item.unit for item in records]), timeout=ASK_S).out
        finally:
            connection.close()
    except reach.Unreachable as error:
        return Meanwhile(host=host.name, cause=error.cause, units=tuple(records))
    word = answers.parse(text)
    if not word.uptime:
        return Meanwhile(host=host.name, cause="its answer cannot be read", units=tuple(records))
    # A unit whose folder is not there was never started.
    now = [
        answers.update(item, word) if item.unit in word.statuses else replace(item, state=UnitState.PENDING)
        for item in records
    ]
    ended = sum(
        after.state.ended and after.state is not before.state for before, after in zip(records, now, strict=True)
    )
    return Meanwhile(host=host.name, units=tuple(now), ended=ended)
