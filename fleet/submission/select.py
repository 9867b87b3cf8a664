"""Which units go into a submission, and why the others do not."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fleet.errors import CampaignError
from fleet.harness.contract import RANDOM_WEIGHTS, SIMULATED
from fleet.mlperf.rules import BenchmarkRule, load_benchmark
from fleet.results import verdict
from fleet.results.records import SessionResults, System, UnitResult
from fleet.submission.truncate import ACCURACY_LOG, ACCURACY_TEXT
from fleet.terms import Division, Mode, Scenario

REFUSED_LABELS = frozenset({RANDOM_WEIGHTS, SIMULATED})
REFUSED_BACKENDS = frozenset({verdict.NULL_BACKEND})
LOGS = ("mlperf_log_summary.txt", "mlperf_log_detail.txt")
MODEL_FACTS = (
    "input_data_types",
    "retraining",
    "starting_weights_filename",
    "weight_data_types",
    "weight_transformations",
)
"""The keys of measurements.json, all taken from UnitResult.model."""

K = TypeVar("K")
_LOWER_IS_BETTER = frozenset({Scenario.SINGLE_STREAM, Scenario.MULTI_STREAM})


@dataclass(frozen=True, slots=True)
class Left:
    """A unit that is not in the submission."""

    unit: str
    reason: str
    """In words for people; several reasons are joined by `; `."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One result: a scenario of a benchmark on a system, with both its units."""

    system: System
    benchmark: BenchmarkRule
    scenario: Scenario
    performance: UnitResult
    accuracy: UnitResult


@dataclass(frozen=True, slots=True)
class Selection:
    """Every unit of the session is in exactly one of both."""

    entries: tuple[Entry, ...]
    left: tuple[Left, ...]


def select(results: SessionResults, root: Path) -> Selection:
    """Choose one performance and one accuracy unit per system, benchmark and scenario.

    `root` is the session's folder. Where hosts share a system id, the one with the most complete scenarios stands
    for it (number_of_nodes is 1, so a system is one machine). A quick session keeps units that are merely short.
    """
    left: list[Left] = []
    usable: list[UnitResult] = []
    for unit in results.units:
        if reasons := _reasons(unit, results, root):
            left.append(Left(unit.unit, "; ".join(dict.fromkeys(reasons))))
        else:
            usable.append(unit)
    entries: list[Entry] = []
    systems = {system.host: system for system in results.systems}
    for system_id, mine in _grouped(usable, lambda unit: unit.system_id):
        by_host = [_entries_of(systems[host], units) for host, units in _grouped(mine, lambda unit: unit.host)]
        best = max(by_host, key=lambda pair: len(pair[0]))
        for found, lost in by_host:
            left.extend(lost)
            if found and found is not best[0]:
                reason = f"host {best[0][0].system.host} stands for system {system_id}"
                left.extend(Left(u.unit, reason) for entry in found for u in (entry.performance, entry.accuracy))
        entries.extend(best[0])
    return Selection(tuple(entries), tuple(left))


def _entries_of(system: System, units: list[UnitResult]) -> tuple[list[Entry], list[Left]]:
    entries: list[Entry] = []
    left: list[Left] = []
    for (name, scenario), mine in _grouped(units, lambda unit: (unit.benchmark, unit.scenario)):
        performance = sorted((u for u in mine if u.mode is Mode.PERFORMANCE), key=_rank)
        accuracy = [u for u in mine if u.mode is Mode.ACCURACY]
        if not performance or not accuracy:
            wanted = Mode.ACCURACY if performance else Mode.PERFORMANCE
            left.extend(Left(u.unit, f"the {wanted} unit of {name} {scenario} on {u.host} is missing") for u in mine)
            continue
        entries.append(Entry(system, load_benchmark(name), scenario, performance[0], accuracy[0]))
        left.extend(Left(u.unit, f"{performance[0].unit} is the better run") for u in performance[1:])
        left.extend(Left(u.unit, f"{accuracy[0].unit} was taken") for u in accuracy[1:])
    return entries, left


def _rank(unit: UnitResult) -> float:
    if unit.summary is None or unit.summary.metric is None:
        return float("inf")
    value = unit.summary.metric.value
    return value if unit.scenario in _LOWER_IS_BETTER else -value


def _reasons(unit: UnitResult, results: SessionResults, root: Path) -> list[str]:
    """Why the unit cannot be submitted; empty when it can."""
    if not unit.measured:
        return [f"{unit.outcome}: {unit.cause}" if unit.cause else unit.outcome]
    reasons = [f"labelled {label!r}: never submitted" for label in unit.labels if label in REFUSED_LABELS]
    if unit.backend in REFUSED_BACKENDS:
        reasons.append(f"backend {unit.backend} computes nothing: never submitted")
    reasons += _rule_reasons(unit, results)
    if not results.quick:
        if not unit.submittable:
            reasons += unit.not_submittable_because or (unit.cause or "not submittable",)
        elif unit.mode is Mode.PERFORMANCE and unit.summary is not None and not unit.summary.valid:
            reasons.append("LoadGen does not say VALID")
    return reasons + _file_reasons(unit, root)


def _rule_reasons(unit: UnitResult, results: SessionResults) -> list[str]:
    try:
        rule = load_benchmark(unit.benchmark)
    except CampaignError as error:
        return [error.message]
    if results.division not in rule.divisions:
        return [f"{rule.name} cannot be submitted to the {results.division} division"]
    # The open division takes any scenario: the checker at b66003e1 was tried with all four.
    allowed = rule.scenarios_of(results.category)
    if results.division != Division.OPEN and unit.scenario not in allowed:
        names = ", ".join(allowed) or "none"
        return [f"{unit.scenario} is no scenario of {rule.official} in category {results.category} (there: {names})"]
    return []


def _file_reasons(unit: UnitResult, root: Path) -> list[str]:
    if not unit.folder:
        return ["nothing came home from its host"]
    folder = root / unit.folder
    names = [*LOGS, *((ACCURACY_LOG, ACCURACY_TEXT) if unit.mode is Mode.ACCURACY else ("user.conf",))]
    # A link would ship whatever it points to on the controller.
    missing = [name for name in names if (folder / name).is_symlink() or not (folder / name).is_file()]
    reasons = [f"files missing: {', '.join(missing)}"] if missing else []
    if unit.mode is Mode.PERFORMANCE and (lacking := [k for k in MODEL_FACTS if not unit.model.get(k)]):
        reasons.append(f"its manifest does not say: {', '.join(lacking)}")
    return reasons


def _grouped(units: Iterable[UnitResult], key: Callable[[UnitResult], K]) -> list[tuple[K, list[UnitResult]]]:
    groups: dict[K, list[UnitResult]] = defaultdict(list)
    for unit in units:
        groups[key(unit)].append(unit)
    return list(groups.items())
