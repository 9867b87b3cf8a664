"""A host while its units run: where it stands with them, and what a person is told of it."""

import time
from dataclasses import dataclass, field

from fleet.handoff import UnitRecord
from fleet.harness.contract import RunSpec, UnitState, UnitStatus
from fleet.inventory import reach
from fleet.inventory.hosts import Host
from fleet.results import caveats
from fleet.terms import HostState
from fleet.watch import Watch, duration

MINUTE = 60.0


@dataclass(slots=True, kw_only=True)
class Polled:
    """A host, its units, and where it stands with them."""

    host: Host
    work_dir: str
    specs: dict[str, RunSpec]
    """Its units, as they are, or will be, started."""
    to_start: list[str]
    """Units that the host has not taken yet."""
    connection: reach.Connection | None = None
    asking: bool = False
    due: float = 0.0
    """When it is asked next, by time.monotonic, as are the other times."""
    last_answer: float = field(default_factory=time.monotonic)
    answered_at: float | None = None
    """The last answer by the wall clock, for people."""
    said: tuple[HostState, str] | None = None
    """What its HostRecord says."""
    supervisor: int = 0
    cause: str = ""
    """Why the last question got no answer; empty when it did."""
    lost: float | None = None
    """Since when it counts as lost."""
    leaving: str = ""
    """Why it is about to go away, as it said; then nothing more is started there."""
    over: bool = False
    """Nothing more is asked of it."""
    stale: dict[str, float] = field(default_factory=dict)
    """Units whose supervisor seems dead, and since when."""
    again: dict[str, float] = field(default_factory=dict)
    """Units that are started again, and when."""
    cancelling: list[str] = field(default_factory=list)
    """Units that the host must still be told to stop."""
    cancelled: set[str] = field(default_factory=set)
    to_bring: list[str] = field(default_factory=list)
    """Ended units whose files have not been sent for."""
    bringing: str = ""
    """The unit whose files are on their way."""
    fetched: dict[str, int] = field(default_factory=dict)
    """How often a unit's files were sent for in vain."""


def tell(item: Polled, known: dict[str, UnitRecord], watch: Watch) -> None:
    """What the host is doing now, as it was last heard."""
    name = item.host.name
    if item.over:
        return
    if item.cause:
        watch.host(name, f"no answer: {item.cause}")
        return
    for number, unit in enumerate(item.specs, start=1):
        status = known[unit].status
        if status is not None and status.state is UnitState.RUNNING:
            spent = age(status)
            fraction = min(0.99, spent / status.expected_s) if status.expected_s > 0 else None
            short = unit.removeprefix(name + ".") + known[unit].remark
            left = sum(_left(known[other].status) for other in item.specs)
            text = f"{short} ({number}/{len(item.specs)}), {status.samples_done} samples, {spent:.0f} s"
            if late := spent > status.expected_s > 0:
                text += ", longer than expected"
            if left >= MINUTE:
                # Of a unit that is late nobody knows how long it will still take.
                text += f", about {duration(left / MINUTE)} {'for the others' if late else 'left'}"
            watch.host(name, text, fraction=fraction)
            return


def tell_conditions(item: Polled, before: UnitRecord, now: UnitRecord, watch: Watch) -> None:
    """A unit that has got onto battery, asleep or too hot since its host was last asked: a line that stays."""
    known = before.status.conditions if before.status is not None else {}
    seen = now.status.conditions if now.status is not None else {}
    ignored = item.specs[now.unit].conditions
    for name, words in caveats.CONDITIONS.items():
        if seen.get(name, 0) > 0 and known.get(name, 0) <= 0 and ignored.get(name) != caveats.IGNORE:
            watch.note(f"{item.host.name}: {now.unit.removeprefix(item.host.name + '.')}: {words}")


def age(status: UnitStatus) -> float:
    """Seconds that a unit has run, by its host's clock."""
    return max(0.0, (status.heartbeat_at or 0.0) - (status.started_at or 0.0))


def _left(status: UnitStatus | None) -> float:
    """Seconds that a unit will still take, as its host expects."""
    if status is None or status.state.ended:
        return 0.0
    return max(0.0, status.expected_s - age(status)) if status.state is UnitState.RUNNING else status.expected_s


def summary(item: Polled, known: dict[str, UnitRecord]) -> str:
    """How a host's units ended, in a line."""
    done = sum(known[unit].state is UnitState.DONE for unit in item.specs)
    causes = {known[unit].cause for unit in item.specs if known[unit].cause}
    return f"{done} of {len(item.specs)} units done" + (f": {min(causes)}" if causes else "")
