"""What becomes of a unit when a session goes on: kept, waited for, fetched, or run again, and why. No hosts, no files."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fleet import handoff, retries
from fleet.handoff import Attempt, Collected, Readiness, UnitRecord
from fleet.harness.contract import Reason, RunSpec, UnitState
from fleet.terms import HostState

NAMED = 3
"""Units that a line names before it counts them."""
_GOES_ON = frozenset({UnitState.PENDING, UnitState.QUEUED, UnitState.RUNNING, UnitState.UNREACHABLE,
                      UnitState.NOT_READY, UnitState.LEFT_OUT})  # fmt: skip
"""States after which the host is asked for the very same unit: it may run there, or have ended meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is done about one unit."""

    spec: RunSpec
    """What is planned now."""
    record: UnitRecord
    """What is known of it before anything is started."""
    keep: bool
    """Nothing is done: it is measured, and its files are here."""
    again: str = ""
    """Why a unit that had ended is started anew; empty where it goes on, or begins."""


def decide(old: RunSpec | None, new: RunSpec, record: UnitRecord | None, home: Collected | None) -> Decision:
    """What to do about a unit that was planned as `old` and is asked for as `new`."""
    if old is None or record is None:
        return Decision(spec=new, record=handoff.pending(new), keep=False)
    number = 1 + len(record.attempts)
    why = handoff.why_again(old, new, record, home)
    same = replace(old, work_dir=new.work_dir, attempt=number)
    if not why:
        return Decision(spec=same, record=record, keep=True)
    other = handoff.difference(old, new)
    # What was measured as something else does not stand for this.
    best = None if other else record.best
    pending = replace(handoff.pending(new), attempts=record.attempts, status=record.status, best=best)
    if gone := _gone(old, new):
        if record.status is None or record.status.started_at is None:
            # It was not begun there.
            return Decision(spec=replace(new, attempt=number), record=replace(pending, status=None), keep=False)
        why = other or (f"{gone}: {why}" if record.state.ended else f"{gone}, where it was last seen {record.state}")
        other = other or gone
    same = replace(same, instance=new.instance, market=new.market)
    there = record.state is UnitState.DONE and not (_is_corrupt(home) or record.later)
    if not other and (record.state in _GOES_ON or there):
        return Decision(spec=same, record=pending, keep=False)
    if record.status is None:
        # It never was on the host.
        return Decision(spec=replace(new, attempt=number), record=pending, keep=False)
    reason = Reason.LOCK_CHANGED if other and other != gone else record.reason
    ended = Attempt(state=record.state, reason=reason, cause=why, ended_at=time.time())
    pending = replace(pending, attempts=(*record.attempts, ended, *record.later), status=None)
    return Decision(spec=replace(new, attempt=number + 1 + len(record.later)), record=pending, keep=False, again=why)


def _gone(old: RunSpec, new: RunSpec) -> str:
    """That the instance on which a unit was to run is another now: nobody is there to be asked what became of it."""
    return f"instance {old.instance} is gone" if old.instance and new.instance not in {"", old.instance} else ""


def _is_corrupt(home: Collected | None) -> bool:
    return home is not None and home.reason is Reason.CORRUPT_FILES


def not_started(record: UnitRecord, ready: Readiness | None, cause: str = "") -> UnitRecord:
    """The record of a unit whose host cannot be given it now; what was measured earlier stays, and so do ends.

    `cause` says what stands in the way of this unit alone.
    """
    if record.state not in _GOES_ON:
        return retries.settled(record)
    if ready is None:
        return replace(record, state=UnitState.NOT_READY, cause="never provisioned: fleet provision")
    if ready.state is HostState.LEFT_OUT:
        cause = f"provision left it out: {ready.cause}"
    if cause or ready.state is not HostState.UNREACHABLE:
        key = ready.state in {HostState.UNKNOWN_KEY, HostState.CHANGED_KEY}
        reason = Reason.HOST_KEY if key else Reason.OTHER
        return replace(record, state=UnitState.NOT_READY, cause=cause or ready.cause or str(ready.state), reason=reason)
    return replace(
        record, state=UnitState.UNREACHABLE, cause=ready.cause or str(ready.state), reason=Reason.UNREACHABLE
    )


def left_out(record: UnitRecord, cause: str) -> UnitRecord:
    """The record of a unit that nobody asks for this time: an end stays, anything else is said."""
    if record.state not in _GOES_ON:
        return retries.settled(record)
    if record.state in {UnitState.UNREACHABLE, UnitState.NOT_READY}:
        return record
    seen = f"; last seen {record.state}" if record.state in {UnitState.QUEUED, UnitState.RUNNING} else ""
    return replace(record, state=UnitState.LEFT_OUT, cause=cause + seen)


def lines(decisions: Iterable[Decision]) -> list[str]:
    """What a person is told about the units of a host that are started anew, those with one cause in one line."""
    grouped: dict[str, list[str]] = {}
    for decision in decisions:
        if decision.again:
            grouped.setdefault(decision.again, []).append(decision.spec.unit)
    return [f"again: {_named(units)}: {why}" for why, units in grouped.items()]


def _named(units: list[str]) -> str:
    more = len(units) - NAMED
    return ", ".join(units[:NAMED]) + (f" and {more} more" if more > 0 else "")
