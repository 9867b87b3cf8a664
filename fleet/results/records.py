"""What results are made of: one record per unit, one per host, none ever missing. Values only, no IO."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fleet.handoff import Attempt
from fleet.terms import HostState, Mode, Reason, Scenario, UnitState, outcome

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One number with its LoadGen key and unit."""

    key: str
    """LoadGen's key in mlperf_log_detail.txt, `result_samples_per_second`."""
    value: float
    unit: str
    """`Samples/s`, `Queries/s`, `Tokens/s` or `ms`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadgenSummary:
    """What one mlperf_log_detail.txt says. Latencies in nanoseconds, by LoadGen's percentile name."""

    scenario: Scenario
    valid: bool | None
    """None in accuracy mode, where LoadGen gives no verdict."""
    invalid_reasons: tuple[str, ...]
    metric: Metric | None
    """The number the checker takes for the scenario; None in accuracy mode or when LoadGen wrote none."""
    latencies_ns: dict[str, float]
    """`min`, `mean`, `max`, `50.00`, `90.00`, `95.00`, `97.00`, `99.00`, `99.90` where logged."""
    query_count: int
    duration_ms: float
    """Wall time between the first and the last log line."""
    min_duration_ms: float
    samples_per_query: int
    performance_sample_count: int
    accuracy_sample_count: int | None
    early_stopping_met: bool | None
    seeds: dict[str, int]
    loadgen_version: str
    errors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a host costs an hour, and who says so."""

    usd_per_hour: float
    source: str
    """`pricing-api 2026-11-25`, `spot-history 2026-11-25`, `table 2026-08-17`, or `fleet.yml`."""
    market: str
    """`on-demand`, `spot`, or `own` for hosts that fleet did not launch."""

    @property
    def cited(self) -> str:
        """Market and source, as they stand beside the number."""
        return f"{self.market}, {self.source}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """US dollars of a session, by recorded prices. No traffic, no tax, no discount that fleet.yml does not know."""

    usd: float
    """Instances whole, from launch to end, idle time too; of other hosts the time of their units."""
    instances_usd: float
    own_usd: float
    measured_usd: float
    """The share of `usd` in which units ran; of units that were started more than once only the last start."""
    besides_usd: float
    """Volumes and public addresses, not in `usd`."""
    besides_source: str
    """`table 2026-08-17`."""
    instances: int
    open: tuple[str, ...]
    """Instances that were not seen to be gone: what they cost is still growing, or is known to their lease's end only."""
    unpriced: tuple[str, ...]
    """Hosts that ran something and have no price: they are not in these sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitResult:
    """One unit of the session, measured or not."""

    unit: str
    host: str
    system_id: str
    benchmark: str
    scenario: Scenario
    mode: Mode
    backend: str
    state: UnitState
    cause: str
    """Why there is no number, or why it is INVALID; empty when all is well."""
    summary: LoadgenSummary | None
    accuracy: dict[str, float]
    """Metric name to value for accuracy units: `F1` and `exact_match`, or ROUGE's and `GEN_LEN`."""
    submittable: bool
    not_submittable_because: tuple[str, ...]
    """Every reason, in words for people: quick run, INVALID, demo backend, missing files …"""
    labels: tuple[str, ...]
    loadgen_s: float | None
    started_at: float | None
    versions: dict[str, str]
    model: dict[str, str]
    folder: str
    """Path of the collected files relative to the session; empty when nothing came home."""
    reason: Reason = Reason.NONE
    """The cause for machines; empty when all is well."""
    attempts: tuple[Attempt, ...] = ()
    """Starts before the one that this record is of, the oldest first."""
    later: tuple[Attempt, ...] = ()
    """Starts after it, which came to nothing."""
    warnings: tuple[str, ...] = ()
    """What may have touched the number although the run counts: `on battery for 31 s`."""
    price: Price | None = None
    """Of its host while it ran; None when unknown."""
    usd: float | None = None
    """Its wall time on the host at that price; None when one of the two is unknown."""
    usd_per_million: float | None = None
    """US dollars per million samples or tokens at the metric; only where that is VALID."""
    million_of: str = ""
    """`samples` or `tokens`; empty without such a number."""

    @property
    def outcome(self) -> str:
        """State and reason in a word or two: `failed (out-of-memory)`, `no result (corrupt-files)`, `done`."""
        if self.state is UnitState.DONE and not self.measured:
            return "no result" if self.reason in {Reason.NONE, Reason.OTHER} else f"no result ({self.reason})"
        return outcome(self.state, self.reason)

    @property
    def starts(self) -> int:
        """How often it was started so far."""
        waits = self.state in {UnitState.PENDING, UnitState.NOT_READY, UnitState.LEFT_OUT}
        return len(self.attempts) + len(self.later) + (0 if waits else 1)

    @property
    def history(self) -> str:
        """What its other starts came to; empty when there were none."""
        if not self.attempts and not self.later:
            return ""
        times = "once" if self.starts == 1 else f"{self.starts} times"
        return "; ".join([f"started {times}", *other_starts(self.attempts, self.later)])

    @property
    def measured(self) -> bool:
        """True when the unit ended well and its log came home and could be read, whatever its verdict."""
        return self.state is UnitState.DONE and self.summary is not None

    @property
    def invalid(self) -> bool:
        """True when LoadGen said INVALID."""
        return self.summary is not None and self.summary.valid is False


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A system under test: by default one host is one system and number_of_nodes is 1."""

    system_id: str
    host: str
    kind: str
    state: HostState
    cause: str
    description: dict[str, str]
    """The checker's names, spelt as there; empty for a host that never answered."""
    identity: str
    """machine-id and GPU UUIDs; two hosts with one hostname stay two systems."""
    notes: dict[str, str]
    """The owner's notes, apart from what was measured, already merged into `description`."""
    hint: str = ""
    """The next command or edit that helps a host that is not ready; may be empty."""
    reason: Reason = Reason.NONE
    """The cause for machines, where a host's state does not say it all."""
    warnings: tuple[str, ...] = ()
    """What preflight saw and let pass, and what makes the host's identity doubtful."""
    price: Price | None = None
    """Now, or last; None when nobody gave one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionResults:
    """Everything results, submission and report know about a session."""

    session: str
    created_at: str
    """ISO 8601, UTC."""
    fleet_version: str
    submitter: str
    division: str
    category: str
    round: str
    quick: bool
    systems: tuple[System, ...]
    """One per host of the campaign, never fewer."""
    units: tuple[UnitResult, ...]
    """One per planned unit, never fewer."""
    cost: Cost | None = None
    """None when no host has a price."""
    schema: int = field(default=SCHEMA)

    @property
    def headline(self) -> str:
        """The first line of every table and report: how many of the hosts and units are in it.

        A host counts when each of its planned units was measured and came home.
        """
        complete, planned = len(self.systems) - len(self.missing_hosts), len(self.units)
        measured = planned - len(self.missing_units)
        text = f"{complete} of {len(self.systems)} hosts, {measured} of {planned} units"
        if invalid := sum(unit.invalid for unit in self.units):
            text += f" · {invalid} INVALID"
        return f"{text} · quick run, not submittable" if self.quick else text

    @property
    def missing_hosts(self) -> tuple[System, ...]:
        """Hosts without units, or with a unit that was not measured, did not come home or cannot be read.

        A host that is away now but whose units are all home is not missing.
        """
        planned = {unit.host for unit in self.units}
        lacking = {unit.host for unit in self.missing_units}
        return tuple(s for s in self.systems if s.host in lacking or s.host not in planned)

    @property
    def missing_units(self) -> tuple[UnitResult, ...]:
        """Planned units without a result."""
        return tuple(unit for unit in self.units if not unit.measured)

    @property
    def warnings(self) -> tuple[tuple[str, str], ...]:
        """Host or unit, and what a reader of its numbers should know."""
        return (
            *((system.host, text) for system in self.systems for text in system.warnings),
            *((unit.unit, text) for unit in self.units for text in unit.warnings),
        )


def other_starts(attempts: Sequence[Attempt], later: Sequence[Attempt]) -> list[str]:
    """What came of the starts before and after one; nothing where there were none."""
    return [
        f"{when}: {'; '.join(endings(starts))}" for when, starts in (("before", attempts), ("later", later)) if starts
    ]


def endings(attempts: Iterable[Attempt]) -> list[str]:
    """How each of some starts ended, in words."""
    return [f"{outcome(a.state, a.reason)}{f': {a.cause}' if a.cause else ''}" for a in attempts]


def missing_as(system: System) -> str:
    """The state and reason of a host that is missing; one that is ready lacks units, and its cause says how many."""
    return "incomplete" if system.state is HostState.READY else outcome(system.state, system.reason)
