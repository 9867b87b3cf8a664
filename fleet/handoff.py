"""What one stage leaves for the next: the types of the session's files, and reading them back. No logic."""

from dataclasses import dataclass, field, replace

from fleet.harness.contract import RunSpec, UnitState, UnitStatus
from fleet.session import Session
from fleet.terms import HostState


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
    warnings: tuple[str, ...] = ()


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
class UnitRecord:
    """run/units/<unit>.json: what the controller knows of a unit."""

    unit: str
    host: str
    state: UnitState
    cause: str = ""
    status: UnitStatus | None = None
    """The host's own word, once it has said one."""
    schema: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What came home of one unit."""

    folder: str
    """Relative to the session; empty when nothing came."""
    complete: bool
    """True when the manifest and every file it names are here and match."""
    cause: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectedFile:
    """collect/collected.json."""

    units: dict[str, Collected]
    schema: int = 1


def same_run(one: RunSpec, other: RunSpec) -> bool:
    """Whether two specs ask for the same measurement: where fleet's folder lies on the host makes no difference."""
    return replace(one, work_dir="") == replace(other, work_dir="")


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


def records(session: Session) -> dict[str, UnitRecord]:
    """What is known of each unit that has been looked at."""
    found = {}
    for path in sorted((session.run / "units").glob("*.json")):
        record = session.read(path, UnitRecord)
        found[record.unit] = record
    return found


def collected(session: Session) -> dict[str, Collected]:
    """What earlier collects brought home."""
    path = session.collect / "collected.json"
    return dict(session.read(path, CollectedFile).units) if path.is_file() else {}
