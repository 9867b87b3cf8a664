"""Rows that several verbs show, and the exit code that goes with them. Nothing here prints."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fleet.cloud.leases import Lease, LeaseState
from fleet.errors import ExitCode
from fleet.results import dollars
from fleet.results.records import missing_as, other_starts
from fleet.terms import HostState, Mode, Scenario, UnitState, outcome
from fleet.watch import duration


def hosts(items: Iterable[Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for anything with host, state and cause."""
    return ["host", "state", "cause"], [[item.host, str(item.state), item.cause] for item in items]


def warnings(items: Iterable[Any]) -> list[str]:
    """What hosts are warned about, a line each: battery, heat."""
    return [f"{item.host}: {text}" for item in items for text in item.warnings]


def benchmarks(items: Iterable[Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of what preflight found out: one row per host that answered and benchmark."""
    rows = []
    for item in items:
        # A host that nobody could look at has no answer per benchmark.
        names = item.expected_s if item.state is HostState.READY else item.cannot
        for name in names:
            why, batch = item.cannot.get(name), item.batches.get(name)
            can = f"runs in batches of {batch}, for want of memory" if batch else "runs"
            expected = "-" if why else f"about {duration(item.expected_s[name] / 60)}"
            rows.append([item.host, name, f"cannot: {why}" if why else can, expected])
    return ["host", "benchmark", "answer", "time"], rows


def leased(known: Sequence[Lease], now: float) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a session's instances, and of what was asked for without an answer."""
    rows = []
    for lease in known:
        left = lease.expires_at - now
        until = f"ends in {duration(left / 60)}" if left > 0 else f"lease over for {duration(-left / 60)}"
        terms = [lease.type, lease.zone or lease.region, lease.market]
        if lease.state is LeaseState.INTENDED:
            rows.append([", ".join(lease.hosts), "not known", *terms, f"asked for, no answer noted; {until}"])
        for item in lease.instances:
            ended = f"ended{f': {item.cause}' if item.cause else ''}"
            rows.append([item.host or "one too many", item.id, *terms, until if item.ended_at is None else ended])
    return ["host", "instance", "type", "zone", "market", "lease"], rows


def hosts_title(items: Sequence[Any]) -> str:
    """How many of the hosts are fine: the first thing said."""
    ready = sum(item.state is HostState.READY for item in items)
    return f"{ready} of {len(items)} hosts ready"


def hosts_code(items: Iterable[Any]) -> ExitCode:
    """3 when a host is missing."""
    return ExitCode.OK if all(item.state is HostState.READY for item in items) else ExitCode.MISSING


def units(items: Iterable[Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for unit records, their labels behind their names and other starts behind their causes."""
    rows = []
    for item in items:
        start = f"start {len(item.attempts) + 1}" if item.attempts else ""
        told = "; ".join(filter(None, [item.cause, start, *other_starts(item.attempts, item.later)]))
        rows.append([item.unit + item.remark, outcome(item.state, item.reason), told])
    return ["unit", "state", "cause"], rows


def units_title(items: Sequence[Any]) -> str:
    """How many of the units are done."""
    done = sum(item.state is UnitState.DONE for item in items)
    return f"{done} of {len(items)} units done"


def units_code(items: Iterable[Any]) -> ExitCode:
    """3 when a unit did not end as done."""
    return ExitCode.OK if all(item.state is UnitState.DONE for item in items) else ExitCode.MISSING


def results(found: Any) -> tuple[list[str], list[list[str]]]:
    """One row per host, benchmark and scenario: performance and accuracy side by side, labels beside every number.

    A host without units has a row as well. What is to be known beside a number has a column where there is any.
    """
    grouped: dict[tuple[str, str, str], dict[Mode, Any]] = {}
    for unit in found.units:
        grouped.setdefault((unit.host, unit.benchmark, unit.scenario), {})[unit.mode] = unit
    of_host = {system.host: system.warnings for system in found.systems}
    rows, remarks, costs = [], [], []
    for (host, benchmark, scenario), modes in grouped.items():
        both = list(modes.values())
        labels = dict.fromkeys(label for unit in both for label in unit.labels)
        name = benchmark + (f" ({', '.join(labels)})" if labels else "")
        rows.append([host, name, scenario, *_performance(modes.get(Mode.PERFORMANCE)),
                     _accuracy(modes.get(Mode.ACCURACY)), _verdict(modes), _why(both)])  # fmt: skip
        remarks.append("; ".join([*_remarks(both), *of_host.pop(host, ())]))
        costs.append(_cost(modes))
    planned = {unit.host for unit in found.units}
    for system in found.systems:
        if system.host not in planned:
            rows.append([system.host, *"-----", missing_as(system), system.cause])
            remarks.append("; ".join(system.warnings))
            costs.append("-")
    columns = ["host", "benchmark", "scenario", "performance", "p99 ms", "accuracy", "verdict", "why"]
    if found.cost is not None:
        columns.append("cost")
        rows = [[*row, cost] for row, cost in zip(rows, costs, strict=True)]
    if any(remarks):
        return [*columns, "remarks"], [[*row, remark] for row, remark in zip(rows, remarks, strict=True)]
    return columns, rows


def cost(found: Any) -> list[str]:
    """What the session cost, for the lines below the table; nothing where no host has a price."""
    if found.cost is None:
        return []
    first, *more = dollars.lines(found.cost)
    return [f"cost: {first}", *(f"  {line}" for line in more)]


def _cost(modes: Mapping[Mode, Any]) -> str:
    """Of both units, and per million samples by the performance unit."""
    known = [unit.usd for unit in modes.values() if unit.usd is not None]
    each = dollars.per_million(modes.get(Mode.PERFORMANCE))
    return "; ".join(text for text in (dollars.dollars(sum(known) if known else None), each) if text != "-") or "-"


def _performance(unit: Any) -> tuple[str, str]:
    if unit is None or unit.summary is None or unit.summary.metric is None:
        return "-", "-"
    # Offline sends one query: its latencies are the length of the run.
    p99 = unit.summary.latencies_ns.get("99.00") if unit.scenario is not Scenario.OFFLINE else None
    return f"{unit.summary.metric.value:.4g} {unit.summary.metric.unit}", f"{p99 / 1e6:.4g}" if p99 else "-"


def _accuracy(unit: Any) -> str:
    scores = sorted(unit.accuracy.items()) if unit else []
    return ", ".join(f"{name} {value:.2f}" for name, value in scores) or "-"


def _verdict(modes: Mapping[Mode, Any]) -> str:
    missing: dict[Mode, str] = {mode: unit.outcome for mode, unit in modes.items() if not unit.measured}
    if len(missing) == len(modes) and len(set(missing.values())) == 1:
        return next(iter(missing.values()))
    if missing:
        return "; ".join(f"{mode}: {word}" for mode, word in missing.items())
    if any(unit.invalid for unit in modes.values()):
        return "INVALID"
    return "submittable" if all(unit.submittable for unit in modes.values()) else "not submittable"


def _why(both: Sequence[Any]) -> str:
    """Each cause once: what is said of a unit that has no result repeats its state, which the verdict shows."""
    reasons = dict.fromkeys(
        reason
        for unit in both
        for reason in ([unit.cause] if unit.cause else []) + list(unit.not_submittable_because)
        if reason == unit.cause or not reason.endswith(unit.cause or str(unit.state))
    )
    return "; ".join(reasons)


def _remarks(both: Sequence[Any]) -> list[str]:
    return [f"{unit.mode}: {text}" for unit in both for text in (*unit.warnings, unit.history) if text]


def results_code(found: Any) -> ExitCode:
    """3 when a host or unit is missing, 5 when a result is INVALID; the more serious wins."""
    codes = [ExitCode.MISSING if found.missing_hosts or found.missing_units else ExitCode.OK]
    if any(unit.invalid for unit in found.units):
        codes.append(ExitCode.INVALID)
    return ExitCode.worst(codes)
