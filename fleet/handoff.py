"""What one stage leaves for the next: the types of the session's files, and reading them back. No logic."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fleet.harness.contract import Reason, RunSpec, Scenario, SystemFacts, UnitState, UnitStatus
from fleet.session import Session
from fleet.terms import HostState

SAID_AT_MOST = 60
"""Characters of a value that is told to people."""
NAMED = 6
"""Differences that are told before they are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """What provision or check found out about one host."""

    host: str
    state: HostState
    cause: str = ""
    hint: str = ""
    changed: int = 0
    """Tasks that changed something; 0 on a converged host."""
    work_dir: str = ""
    """fleet's folder on the host, absolute."""
    cannot: dict[str, str] = field(default_factory=dict)
    """Benchmarks this host cannot run, and why."""
    batches: dict[str, int] = field(default_factory=dict)
    """Benchmarks that run here only in batches of so many samples, for want of memory."""
    expected_s: dict[str, float] = field(default_factory=dict)
    """Benchmark to the wall seconds that all its units will take here; a slow machine's, until tuning knows better."""
    warnings: tuple[str, ...] = ()
    lock: dict[str, str] = field(default_factory=dict)
    """What RunSpec.lock takes from the host: digests of harness and environment, wheels, driver, cuda."""
    weights: dict[str, str] = field(default_factory=dict)
    """Benchmark to the sha256 of the weights that lie on the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadinessFile:
    """provision/readiness.json."""

    hosts: tuple[Readiness, ...]
    schema: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """run/plan.json: everything that was asked for, whether or not its host is there."""

    quick: bool
    units: tuple[RunSpec, ...]
    schema: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Another start of a unit, and how it ended."""

    state: UnitState
    reason: Reason
    cause: str
    ended_at: float
    """Unix seconds by the controller's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRecord:
    """run/units/<unit>.json: what the controller knows of a unit."""

    unit: str
    host: str
    state: UnitState
    cause: str = ""
    status: UnitStatus | None = None
    """The host's own word, once it has said one."""
    reason: Reason = Reason.NONE
    attempts: tuple[Attempt, ...] = ()
    """Starts before this one, the oldest first."""
    later: tuple[Attempt, ...] = ()
    """Starts after this one, which came to nothing: this one stands."""
    best: "UnitRecord | None" = None
    """An earlier start that was measured and is home, while it is tried again: it stands if nothing comes of that."""
    labels: tuple[str, ...] = ()
    """What a reader must know of the unit whatever becomes of it: `demo model`, `random weights`."""
    schema: int = 1

    @property
    def attempt(self) -> int:
        """Which start it is of, as RunSpec counts them."""
        return 1 + len(self.attempts)

    @property
    def remark(self) -> str:
        """The labels, to be put behind the unit's name."""
        return f" ({', '.join(self.labels)})" if self.labels else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRecord:
    """run/hosts/<host>.json: whether a host answers while its units run; written when that changes."""

    host: str
    state: HostState
    """READY while it answers, UNREACHABLE once it counts as lost, CHANGED_KEY when it must not be asked any more."""
    cause: str = ""
    """Why the last question got no answer; said from the first one on, long before the host counts as lost."""
    hint: str = ""
    since: float
    """When this became so: Unix seconds by the controller's clock."""
    last_answer_at: float | None = None
    """The same clock; None before its first answer."""
    leaving: str = ""
    """Why the host said that it is about to go away; nothing more is started on it in this run."""
    schema: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What came home of one unit."""

    folder: str
    """Relative to the session; empty when nothing came."""
    complete: bool
    """True when the manifest and every file it names are here and match."""
    cause: str = ""
    reason: Reason = Reason.NONE
    attempt: int = 0
    """Which start made the files, where they are complete; 0 where an older fleet did not say: then it is the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectedFile:
    """collect/collected.json."""

    units: dict[str, Collected]
    schema: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedFile:
    """tune/<host>.json."""

    host: str
    values: dict[str, dict[Scenario, dict[str, float]]]
    """Benchmark to scenario to LoadGen's settings, as short probes found them."""
    causes: dict[str, str] = field(default_factory=dict)
    """Tuning units that came to nothing, and why."""
    instance_type: str = ""
    """Of the EC2 instance that was probed: what is right for it is not for another."""
    schema: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSpend:
    """One EC2 instance, what it cost and by which price."""

    id: str
    host: str
    """Empty for one that EC2 made too many."""
    lease: str
    type: str
    region: str
    zone: str
    market: str
    """`on-demand` or `spot`."""
    usd_per_hour: float
    price_source: str
    """`pricing-api 2026-11-25`."""
    launched_at: float
    """Unix seconds."""
    ended_at: float | None
    """When it was seen to be gone; None while it may run."""
    usd: float
    """From its launch to its end, or to when this was written."""
    besides_usd: float
    """Its volume and public address, by the table's prices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """cloud/spend.json: every instance of the session, whatever became of it. Traffic is not in it."""

    at: float
    """Unix seconds: instances without an end are counted until then."""
    instances: tuple[InstanceSpend, ...]
    besides_source: str
    schema: int = 1

    @property
    def usd(self) -> float:
        """Instances alone."""
        return sum(item.usd for item in self.instances)

    @property
    def besides_usd(self) -> float:
        """Their volumes and addresses."""
        return sum(item.besides_usd for item in self.instances)


def spend_file(session: Session) -> Path:
    """Where up, down and results leave what the instances cost."""
    return session.cloud / "spend.json"


def spend(session: Session) -> Spend | None:
    """What the session's instances cost; None when it never had any."""
    path = spend_file(session)
    return session.read(path, Spend) if path.is_file() else None


def pending(spec: RunSpec) -> UnitRecord:
    """What is known of a unit before anybody has done anything about it."""
    return UnitRecord(unit=spec.unit, host=spec.host, state=UnitState.PENDING, labels=spec.labels)


UNMEASURED = frozenset(
    {
        "schema",
        "session",
        "work_dir",
        "start",
        "attempt",
        "labels",
        "expected_s",
        "deadline_s",
        "conditions",
        "lock",
        "instance",
        "market",
    }
)
"""Parts of a spec that make no other measurement of it: where fleet's folder lies, where tuning begins, what is said."""


def difference(old: RunSpec, new: RunSpec) -> str:
    """What makes two specs two measurements, `driver 550.1 → 560.2, user_conf changed`; empty when nothing does.

    Then a number of one is a number of the other. A spec may come from a host: what is said of it is one bounded line.
    """
    found = []
    for name in sorted(set(old.lock) | set(new.lock)):
        before, after = old.lock.get(name, ""), new.lock.get(name, "")
        # Weights are known once they lie on the host, Python to newer sessions; from then on they must not change.
        if before != after and not (name in {"weights", "python"} and not (before and after)):
            found.append(_told(name.removeprefix("wheel:"), before, after))
    one, other = asdict(old), asdict(new)
    found += [
        _told(name, one[name], other[name]) for name in one if name not in UNMEASURED and one[name] != other[name]
    ]
    more = [f"and {len(found) - NAMED} more"] if len(found) > NAMED else []
    return ", ".join([*found[:NAMED], *more])


def _told(name: str, before: object, after: object) -> str:
    """What changed, in a line: digests by their beginnings, long texts not at all."""
    short = [" ".join(str(value).split()) or "none" for value in (before, after)]
    short = [text[:12] if re.fullmatch(r"[0-9a-f]{16,}", text) else text for text in short]
    changed = "changed" if max(map(len, short)) > SAID_AT_MOST else " → ".join(short)
    return f"{' '.join(name.split())[:SAID_AT_MOST]} {changed}"


def same_run(one: RunSpec, other: RunSpec) -> bool:
    """Whether two specs ask for the same measurement, under the same lock."""
    return not difference(one, other)


def is_from(home: Collected | None, record: UnitRecord) -> bool:
    """Whether verified files of the very start that `record` is of are here; those of an earlier one say nothing of it."""
    return home is not None and home.complete and home.attempt in {0, record.attempt}


def why_again(old: RunSpec, new: RunSpec, record: UnitRecord, home: Collected | None) -> str:
    """Why a unit is not finished with: what it was made with, how it ended, or that its files are not here.

    Empty when it is done, verified at home and what `new` asks for: then nothing is done about it.
    """
    if changed := difference(old, new):
        return changed
    if record.state is not UnitState.DONE:
        return f"{record.state}: {record.cause}" if record.cause else str(record.state)
    if home is None:
        return "its files are not home"
    if not home.complete:
        return f"its files are not home: {home.cause}"
    return "" if is_from(home, record) else f"its files are not home: those of start {home.attempt} are"


def readiness(session: Session) -> tuple[Readiness, ...]:
    """What provision left; one per host. Raises SessionError when there is nothing."""
    return session.read(session.provision / "readiness.json", ReadinessFile).hosts


def plan(session: Session) -> Plan:
    """What run set out to do. Raises SessionError when there is nothing."""
    return session.read(session.run / "plan.json", Plan)


def planned(session: Session) -> bool:
    """Whether run has been here."""
    return (session.run / "plan.json").is_file()


def was_quick(session: Session) -> bool:
    """Whether the session was begun as a quick one: going on with it must not change that."""
    return planned(session) and plan(session).quick


def records(session: Session, stage: Path | None = None) -> dict[str, UnitRecord]:
    """What is known of each unit that has been looked at, in the folder of a stage; by default of run."""
    found = {}
    for path in sorted(((stage or session.run) / "units").glob("*.json")):
        record = session.read(path, UnitRecord)
        found[record.unit] = record
    return found


def host_records(session: Session) -> dict[str, HostRecord]:
    """Hosts that were asked while their units ran, and whether they answered."""
    paths = sorted((session.run / "hosts").glob("*.json"))
    return {found.host: found for found in (session.read(path, HostRecord) for path in paths)}


def interrupted_hosts(session: Session) -> dict[str, str]:
    """Hosts that EC2 takes back, or has taken, with the words of their notice; another instance has not answered since."""
    return {name: record.leaving for name, record in host_records(session).items() if record.leaving}


def tuned(session: Session) -> dict[str, TunedFile]:
    """What tune found, by host."""
    paths = sorted(session.tune.glob("*.json"))
    return {found.host: found for found in (session.read(path, TunedFile) for path in paths)}


def system_kinds(session: Session) -> dict[str, tuple[str, ...]]:
    """Host to what makes its numbers comparable with another's: processor, accelerators, driver and software."""
    kinds = {}
    for path in sorted((session.provision / "facts").glob("*.json")):
        facts = session.read(path, SystemFacts)
        kinds[path.stem] = (
            facts.cpu_model,
            str(facts.cpu_threads),
            *(gpu.name for gpu in facts.accelerators),
            facts.driver_version,
            *(f"{name} {version}" for name, version in sorted(facts.software.items())),
        )
    return kinds


def facts_of(session: Session, instance: str) -> Path:
    """Where the facts of an EC2 instance are, whichever of them is its host now."""
    return session.provision / "facts" / "instances" / f"{instance}.json"


def missing(planned: Iterable[RunSpec], known: Mapping[str, UnitRecord], home: Mapping[str, Collected]) -> list[str]:
    """Units without which a session is not finished: those that are not done, or not verified at home as they were done."""
    return [
        spec.unit
        for spec in planned
        if spec.unit not in known
        or known[spec.unit].state is not UnitState.DONE
        or not is_from(home.get(spec.unit), known[spec.unit])
    ]


def lacking(session: Session) -> set[str]:
    """Hosts with units that are not done, or not verified at home."""
    units = plan(session).units
    names = set(missing(units, records(session), collected(session)))
    return {spec.host for spec in units if spec.unit in names}


def collected(session: Session) -> dict[str, Collected]:
    """What earlier collects brought home."""
    path = session.collect / "collected.json"
    return dict(session.read(path, CollectedFile).units) if path.is_file() else {}
