"""What results are made of: one record per unit, one per host, none ever missing. Values only, no IO."""

from dataclasses import dataclass, field

from fleet.terms import HostState, Mode, Scenario, UnitState

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
    schema: int = field(default=SCHEMA)

    @property
    def headline(self) -> str:
        """The first line of every table and report: how many of the hosts and units are in it.

        A host counts when each of its planned units was measured and came home.
        """
        hosts = {system.host for system in self.systems}
        complete = {
            host
            for host in hosts
            if (mine := [u for u in self.units if u.host == host]) and all(u.measured for u in mine)
        }
        measured = sum(unit.measured for unit in self.units)
        text = f"{len(complete)} of {len(hosts)} hosts, {measured} of {len(self.units)} units"
        if invalid := sum(unit.invalid for unit in self.units):
            text += f" · {invalid} INVALID"
        return f"{text} · quick run, not submittable" if self.quick else text
