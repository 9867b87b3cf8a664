"""Stop units: the controller that may be at work is told by files, and every host by itself, whether or not one is.

Takes no lock: who wants to stop a session must not have to wait for it.
"""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fleet import handoff, launch, subset, threads
from fleet.errors import CampaignError, SessionError
from fleet.handoff import Plan, UnitRecord
from fleet.harness.contract import Reason, UnitState
from fleet.inventory import files, reach
from fleet.inventory.hosts import Host
from fleet.session import Session

STOP_S = 15.0
"""So long a host may take to stop its units, with all their processes."""
_STATES = TypeAdapter(dict[str, UnitState])


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """What became of a unit that was to stop."""

    unit: str
    host: str
    state: UnitState
    """As its host says; of a host that says nothing, as it was last seen."""
    stopped: bool
    """False where it may still run."""
    cause: str = ""


def cancel(session: Session, names: Sequence[str]) -> tuple[Cancelled, ...]:
    """Stop the units of these hosts (names, ranges, patterns) and these units; all of them without names.

    One answer per unit that was meant. Raises CampaignError for a name that is neither, and SessionError where nothing
    was started yet.
    """
    if not handoff.planned(session):
        raise SessionError(f"nothing was started in session {session.id}", hint=f"fleet status {session.option}")
    plan = handoff.plan(session)
    hosts, units = _meant(plan, names)
    folder = launch.cancel_folder(session)
    folder.mkdir(parents=True, exist_ok=True)
    for name in [*hosts, *units]:
        (folder / name).touch()
    known = handoff.records(session)
    work_dirs = {item.host: item.work_dir for item in _readiness(session)}
    wanted = {host: [] if host in hosts else [u.unit for u in plan.units if u.unit in units and u.host == host]
              for host in dict.fromkeys(spec.host for spec in plan.units)}  # fmt: skip
    meant = [spec.unit for spec in plan.units if spec.host in hosts or spec.unit in units]
    records = {spec.unit: known.get(spec.unit) or handoff.pending(spec) for spec in plan.units if spec.unit in meant}
    asked = {
        host.name: host
        for host in files.hosts(session)
        if work_dirs.get(host.name) and (host.name in hosts or wanted.get(host.name))
    }
    token = session.token
    said = dict(threads.each(lambda name: _tell(asked[name], work_dirs[name], token, wanted[name]), list(asked)))
    found = tuple(_cancelled(records[unit], said.get(records[unit].host)) for unit in meant)
    _note(session, found, records)
    return found


def forget(session: Session) -> None:
    """What was cancelled until now is asked for again: by the command that has just taken the session, not later."""
    for path in launch.cancel_folder(session).glob("*"):
        path.unlink(missing_ok=True)


def _meant(plan: Plan, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hosts and units that `names` stand for."""
    hosts, units = list(dict.fromkeys(spec.host for spec in plan.units)), [spec.unit for spec in plan.units]
    if not names:
        return hosts, []
    of_units = [name for name in names if name in units]
    others = [name for name in names if name not in units]
    for name in others:
        if not subset.matching([name], hosts):
            raise CampaignError(f"{name}: neither a host nor a unit of this session", hint="fleet status")
    return subset.matching(others, hosts), of_units


def _readiness(session: Session) -> Sequence[Any]:
    return handoff.readiness(session) if (session.provision / "readiness.json").is_file() else ()


def _tell(host: Host, work_dir: str, token: str, units: Sequence[str]) -> dict[str, UnitState] | str:
    """The states of the host's units after it stopped them; a text says why it did not."""
    words = [f"{work_dir}/venv/bin/python", f"{work_dir}/harness/current", "cancel", work_dir, token, *units]
    try:
        connection = reach.connect(host)
        try:
            answer = connection.run(shlex.join(words), timeout=STOP_S)
        finally:
            connection.close()
    except reach.Unreachable as error:
        return error.cause
    try:
        return _STATES.validate_json(answer.out)
    except ValidationError:
        return (answer.err.strip().splitlines() or ["its answer cannot be read"])[-1][:300]


def _cancelled(record: UnitRecord, said: dict[str, UnitState] | str | None) -> Cancelled:
    unit, host = record.unit, record.host
    if record.state.ended and record.state is not UnitState.UNREACHABLE:
        return Cancelled(unit=unit, host=host, state=record.state, stopped=True, cause="it had ended")
    if isinstance(said, str):
        return Cancelled(unit=unit, host=host, state=record.state, stopped=False, cause=said)
    if not said or unit not in said:
        # The host does not know it: it was never started there.
        return Cancelled(unit=unit, host=host, state=UnitState.INTERRUPTED, stopped=True, cause="it was not started")
    state = said[unit]
    return Cancelled(
        unit=unit, host=host, state=state, stopped=state.ended, cause="" if state.ended else "it still runs"
    )


def _note(session: Session, found: Sequence[Cancelled], records: dict[str, UnitRecord]) -> None:
    """Where no controller does it, write down what stopped."""
    with suppress(SessionError), session.locked("fleet cancel"):
        for item in found:
            before = records[item.unit]
            if item.stopped and item.state is UnitState.INTERRUPTED and before.state is not UnitState.INTERRUPTED:
                after = replace(before, state=item.state, cause="cancelled", reason=Reason.CANCELLED)
                session.write(session.run / "units" / f"{item.unit}.json", after)
