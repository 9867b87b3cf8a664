"""fleet status."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from fleet import handoff
from fleet.cli import options, output, tables
from fleet.cloud import leases
from fleet.errors import ExitCode
from fleet.handoff import UnitRecord
from fleet.inventory import files
from fleet.session import Session
from fleet.terms import UnitState
from fleet.watch import duration


@click.command()
@options.session_options
@options.json_option
def command(session_id: str | None, base: Path, as_json: bool) -> ExitCode:
    """Who works on a session, how its hosts answer, and where its units stand: from its folder alone, asking no host.

    Works at any stage and beside a controller that is at work.
    """
    session = options.existing(base, session_id)
    owner, alive = session.owner(), session.is_held()
    hosts = _hosts(session)
    units = _units(session)
    instances = leases.read(session)
    if as_json:
        told = {**asdict(owner), "alive": alive, "age_s": owner.age_s} if owner else None
        output.print_json({"session": session.id, "owner": told, "hosts": hosts, "units": units, "leases": instances})
    else:
        if owner is None:
            output.show("no controller works on it" if not alive else "another controller works on it")
        else:
            output.show(f"controller: {owner}" if alive else f"its controller is gone, it was {owner}: fleet attach")
        if instances:
            output.print_table(f"session {session.id}: instances", *tables.leased(instances, time.time()))
        columns = ["host", "state", "last answer", "cause"]
        rows = [[item.host, item.state, _ago(item.last_answer_at), item.cause] for item in hosts]
        output.print_table(f"session {session.id}: {len(hosts)} hosts", columns, rows)
        rows = [
            [
                item.unit + item.remark,
                str(item.state),
                str(1 + len(item.attempts) + len(item.later)),
                _progress(session, item),
                item.cause,
            ]
            for item in units
        ]
        title = tables.units_title(units) if units else "nothing planned yet"
        output.print_table(f"session {session.id}: {title}", ["unit", "state", "attempt", "progress", "cause"], rows)
    return tables.units_code(units) if units else ExitCode.MISSING


@dataclass(frozen=True, slots=True, kw_only=True)
class _HostRow:
    """The last that is known of a host."""

    host: str
    state: str
    cause: str
    last_answer_at: float | None = None
    """Unix seconds by the controller's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """A host in hosts.json."""

    name: str


def _hosts(session: Session) -> list[_HostRow]:
    """Each host's last word: from its run, else from provision, else from the inventory."""
    if not (session.inventory / "hosts.json").is_file():
        return []
    asked = handoff.host_records(session)
    ready = {item.host: item for item in _of(session.provision / "readiness.json", handoff.readiness, session)}
    reached = {item.host: item for item in _of(session.inventory / "reachability.json", files.reachability, session)}
    rows = []
    for name in [host.name for host in session.read(session.inventory / "hosts.json", list[_Named])]:
        found = asked.get(name) or ready.get(name) or reached.get(name)
        rows.append(
            _HostRow(
                host=name,
                state=str(found.state) if found else "not asked yet",
                cause=(found.cause if found else "") or (asked[name].leaving if name in asked else ""),
                last_answer_at=asked[name].last_answer_at if name in asked else None,
            )
        )
    return rows


def _of(path: Path, read: Any, session: Session) -> Any:
    return read(session) if path.is_file() else ()


def _units(session: Session) -> list[UnitRecord]:
    if not handoff.planned(session):
        return []
    known = handoff.records(session)
    return [known.get(spec.unit) or handoff.pending(spec) for spec in handoff.plan(session).units]


def _progress(session: Session, record: UnitRecord) -> str:
    """How long a unit has run, of how long it should; samples are as of the controller's last change of mind."""
    if record.state is not UnitState.RUNNING or record.status is None:
        return ""
    path = session.run / "units" / f"{record.unit}.json"
    spent = max(0.0, time.time() - path.stat().st_mtime)
    return f"{duration(spent / 60)} of about {duration(record.status.expected_s / 60)}"


def _ago(when: float | None) -> str:
    return f"{max(0.0, time.time() - when):.0f} s ago" if when else ""
