"""Rows that several verbs show, and the exit code that goes with them. Nothing here prints."""

from collections.abc import Iterable, Sequence
from typing import Any

from fleet.errors import ExitCode
from fleet.terms import HostState, Mode, Scenario, UnitState
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


def hosts_title(items: Sequence[Any]) -> str:
    """How many of the hosts are fine: the first thing said."""
    ready = sum(item.state is HostState.READY for item in items)
    return f"{ready} of {len(items)} hosts ready"


def hosts_code(items: Iterable[Any]) -> ExitCode:
    """3 when a host is missing."""
    return ExitCode.OK if all(item.state is HostState.READY for item in items) else ExitCode.MISSING


def units(items: Iterable[Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for unit records, their labels behind their names."""
    return ["unit", "state", "cause"], [[item.unit + item.remark, str(item.state), item.cause] for item in items]


def units_title(items: Sequence[Any]) -> str:
    """How many of the units are done."""
    done = sum(item.state is UnitState.DONE for item in items)
    return f"{done} of {len(items)} units done"


def units_code(items: Iterable[Any]) -> ExitCode:
    """3 when a unit did not end as done."""
    return ExitCode.OK if all(item.state is UnitState.DONE for item in items) else ExitCode.MISSING


def results(found: Any) -> tuple[list[str], list[list[str]]]:
    """One row per host, benchmark and scenario: performance and accuracy side by side, labels beside every number."""
    columns = ["host", "benchmark", "scenario", "performance", "p99 ms", "accuracy", "verdict", "why"]
    grouped: dict[tuple[str, str, str], dict[Mode, Any]] = {}
    for unit in found.units:
        grouped.setdefault((unit.host, unit.benchmark, unit.scenario), {})[unit.mode] = unit
    rows = []
    for (host, benchmark, scenario), modes in grouped.items():
        both = list(modes.values())
        labels = dict.fromkeys(label for unit in both for label in unit.labels)
        name = benchmark + (f" ({', '.join(labels)})" if labels else "")
        rows.append([host, name, scenario, *_performance(modes.get(Mode.PERFORMANCE)),
                     _accuracy(modes.get(Mode.ACCURACY)), _verdict(both), _why(both)])  # fmt: skip
    return columns, rows


def _performance(unit: Any) -> tuple[str, str]:
    if unit is None or unit.summary is None or unit.summary.metric is None:
        return "-", "-"
    # Offline sends one query: its latencies are the length of the run.
    p99 = unit.summary.latencies_ns.get("99.00") if unit.scenario is not Scenario.OFFLINE else None
    return f"{unit.summary.metric.value:.4g} {unit.summary.metric.unit}", f"{p99 / 1e6:.4g}" if p99 else "-"


def _accuracy(unit: Any) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in sorted(unit.accuracy.items())) if unit else "-"


def _verdict(both: Sequence[Any]) -> str:
    missing = [unit for unit in both if unit.state is not UnitState.DONE]
    if missing:
        return str(missing[0].state)
    if any(unit.summary is not None and unit.summary.valid is False for unit in both):
        return "INVALID"
    return "submittable" if all(unit.submittable for unit in both) else "not submittable"


def _why(both: Sequence[Any]) -> str:
    reasons = dict.fromkeys(
        reason for unit in both for reason in ([unit.cause] if unit.cause else []) + list(unit.not_submittable_because)
    )
    return "; ".join(reasons)


def results_code(found: Any) -> ExitCode:
    """3 when a host or unit is missing, 5 when a result is INVALID; the more serious wins."""
    codes = [units_code(found.units)]
    measured = {unit.host for unit in found.units if unit.state is UnitState.DONE}
    if any(system.state is not HostState.READY and system.host not in measured for system in found.systems):
        codes.append(ExitCode.MISSING)
    if any(unit.summary is not None and unit.summary.valid is False for unit in found.units):
        codes.append(ExitCode.INVALID)
    return ExitCode.worst(codes)
