"""The runs of one result: logs, accuracy.txt, measurements.json.

Source: performance_check.py, accuracy_check.py and measurements_checks.py of the official checker, b66003e1, and the
rules where that checker is laxer (VALID, LoadGen's errors).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleet.errors import ResultsError
from fleet.mlperf.rules import BenchmarkRule, Round
from fleet.results import accuracy as accuracy_text
from fleet.results import loadgen_log
from fleet.results.records import LoadgenSummary
from fleet.submission.findings import Finding, Reporter
from fleet.submission.layout import SubmissionLayout
from fleet.submission.select import LOGS
from fleet.submission.truncate import ACCURACY_LOG, ACCURACY_TEXT, HASH_LINE
from fleet.terms import Scenario

_AGAIN = "run the unit again, then `fleet collect`, `fleet results` and `fleet submission`"
_REBUILD = "run `fleet submission` again"
_INFERRED = frozenset({("SingleStream", "MultiStream"), ("SingleStream", "Offline"), ("MultiStream", "Offline")})
SCENARIOS = frozenset({*(scenario.lower() for scenario in Scenario), "interactive"})
"""Scenario folders, in lower case: the checker takes any case."""
_EARLY_STOPPING = frozenset({Scenario.SINGLE_STREAM, Scenario.MULTI_STREAM, Scenario.SERVER})


@dataclass(frozen=True, slots=True)
class Place:
    """One result of a tree, and the rules it must keep."""

    layout: SubmissionLayout
    system: str
    benchmark: str
    scenario: str
    """As the folder spells it; the checker takes any case."""
    rule: BenchmarkRule | None
    """None for official benchmarks that this fleet has no file for: their sample counts are not checked."""
    rules: Round
    report: Reporter

    @property
    def key(self) -> tuple[str, str, str]:
        """What the layout's methods take."""
        return self.system, self.benchmark, self.scenario


@dataclass(slots=True)
class RunFindings:
    """What is wrong with one result, sorted by whether a short run explains it."""

    plain: list[Finding] = field(default_factory=list)
    timing: list[Finding] = field(default_factory=list)
    """INVALID and early stopping: what a short run leads to."""
    coverage: list[Finding] = field(default_factory=list)
    """Too few samples: what a quick session leads to."""
    short_ms: float | None = None
    """min_duration of the performance run, when it is below the round's."""


def check_runs(place: Place) -> RunFindings:
    """Everything about one result but its system."""
    found = RunFindings()
    found.plain.extend(_check_measurements(place))
    _check_performance(place, found)
    _check_accuracy(place, found)
    return found


def read_object(path: Path, report: Reporter) -> dict[str, Any] | Finding:
    """The JSON object in `path`, or the finding that says why there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return report.error(path, "the file is missing", _REBUILD)
    except (OSError, ValueError, RecursionError) as error:
        return report.error(path, f"not readable as JSON: {error}", _REBUILD)
    return data if isinstance(data, dict) else report.error(path, "not a JSON object", _REBUILD)


def _check_measurements(place: Place) -> Iterator[Finding]:
    path = place.layout.measurements(*place.key)
    data = read_object(path, place.report)
    if isinstance(data, Finding):
        yield data
    else:
        for key in place.rules.measurements:
            if not data.get(key):
                yield place.report.error(path, f"{key} is {'empty' if key in data else 'missing'}", _REBUILD)
            elif not isinstance(data[key], str):
                yield place.report.warning(path, f"{key} is not text: checkers before v5.1 crash on it", _REBUILD)
    for name in ("README.md", "user.conf"):
        file = place.layout.notes_dir(*place.key) / name
        if not file.is_file():
            yield place.report.error(file, "the file is missing", _REBUILD)
        elif not file.stat().st_size:
            yield place.report.error(file, "the file is empty", "say in it how to reproduce the result")


def _read_log(folder: Path, place: Place, found: RunFindings) -> tuple[LoadgenSummary, dict[str, Any], Path] | None:
    path = folder / "mlperf_log_detail.txt"
    missing = [folder / name for name in LOGS if not (folder / name).is_file()]
    found.plain.extend(place.report.error(file, "the log is missing", _AGAIN) for file in missing)
    if path in missing:
        return None
    try:
        text = path.read_text(encoding="utf-8")
        if not text.startswith(loadgen_log.MARKER):
            found.plain.append(place.report.error(path, f"the first line lacks {loadgen_log.MARKER}", _AGAIN))
        summary = loadgen_log.summarise(text)
        values = loadgen_log.parse(text)
    except (ResultsError, UnicodeDecodeError, OSError) as error:
        found.plain.append(place.report.error(path, str(error), _AGAIN))
        return None
    if summary.errors:
        found.plain.append(place.report.error(path, f"LoadGen logged {summary.errors} errors", _AGAIN))
    return summary, values, path


def _check_performance(place: Place, found: RunFindings) -> None:
    log = _read_log(place.layout.performance_dir(*place.key), place, found)
    if log is None:
        return
    summary, values, path = log
    report = place.report
    if wrong := list(_check_mode(values, "PerformanceOnly", path, report)):
        found.plain.extend(wrong)
        return  # the rest would only say it again
    found.plain.extend(_check_scenario(summary.scenario, place, path))
    for name, seed in place.rules.seeds.items():
        if summary.seeds.get(name) != seed:
            found.plain.append(
                report.error(
                    path,
                    f"{name} is {summary.seeds.get(name)}, {place.rules.name} demands {seed}",
                    f"use mlcommons-loadgen {place.rules.loadgen} and run the unit again",
                )
            )
    if summary.metric is None:
        found.timing.append(report.error(path, "the log holds no result for its scenario", _AGAIN))
    if summary.min_duration_ms < place.rules.min_duration_ms:
        found.short_ms = summary.min_duration_ms
    if summary.valid is False:
        reasons = "; ".join(summary.invalid_reasons) or "LoadGen gives no reason"
        found.timing.append(report.error(path, f"the run is INVALID: {reasons}", _AGAIN))
    if summary.scenario in _EARLY_STOPPING and not summary.early_stopping_met:
        found.timing.append(report.error(path, "early stopping was not met: too few queries", _AGAIN))
    _check_samples(summary, place, path, found)


def _check_mode(values: dict[str, Any], wanted: str, path: Path, report: Reporter) -> Iterator[Finding]:
    mode = values.get("effective_test_mode")
    if mode not in (wanted, "SubmissionRun"):
        yield report.error(path, f"the log is of mode {mode}, not {wanted}", _AGAIN)


def _check_scenario(logged: Scenario, place: Place, path: Path) -> Iterator[Finding]:
    folder = place.scenario.lower()
    # Interactive is the Server scenario with tighter limits, under a name of its own.
    if folder not in SCENARIOS or logged.lower() == folder or (folder == "interactive" and logged is Scenario.SERVER):
        return
    if any(logged == source and folder == target.lower() for source, target in _INFERRED):
        yield place.report.warning(path, f"inferred from a {logged} run", "run the scenario itself")
    else:
        yield place.report.error(path, f"the log is of {logged}, the folder of {place.scenario}", _REBUILD)


def _check_samples(summary: LoadgenSummary, place: Place, path: Path, found: RunFindings) -> None:
    if place.rule is None:
        return
    need, have = place.rule.performance_samples, summary.performance_sample_count
    if have < need:
        found.coverage.append(
            place.report.error(path, f"performance_sample_count is {have}, {place.rule.official} needs {need}", _AGAIN)
        )
    if summary.scenario is Scenario.OFFLINE and summary.samples_per_query < place.rule.samples:
        # v6.1's checker asks this in closed only; all earlier ones in open, too.
        make = place.report.error if place.layout.division == "closed" else place.report.warning
        count = summary.samples_per_query
        message = f"Offline issued {count} samples, {place.rule.official} has {place.rule.samples}"
        found.coverage.append(make(path, message, "raise target_qps and run the unit again"))


def _check_accuracy(place: Place, found: RunFindings) -> None:
    folder, report = place.layout.accuracy_dir(*place.key), place.report
    if log := _read_log(folder, place, found):
        summary, values, path = log
        found.plain.extend(_check_mode(values, "AccuracyOnly", path, report))
        count = summary.accuracy_sample_count
        if place.rule and count != place.rule.samples:
            message = f"the accuracy run covers {count} samples of {place.rule.samples}"
            found.coverage.append(report.error(path, message, "run the accuracy unit over the whole dataset"))
    log_file, text_file = folder / ACCURACY_LOG, folder / ACCURACY_TEXT
    if not log_file.is_file():
        found.plain.append(report.error(log_file, "the file is missing", _AGAIN))
    elif (size := log_file.stat().st_size) > place.rules.accuracy_log_bytes:
        message = f"it has {size} bytes, more than {place.rules.accuracy_log_bytes}: not truncated"
        found.plain.append(report.error(log_file, message, _REBUILD))
    found.plain.extend(_check_accuracy_text(text_file, place))


def _check_accuracy_text(path: Path, place: Place) -> Iterator[Finding]:
    try:
        text = path.read_text(encoding="utf-8")
        metrics = accuracy_text.parse(text)
    except FileNotFoundError:
        yield place.report.error(path, "the file is missing", _AGAIN)
        return
    except (OSError, UnicodeDecodeError, ResultsError) as error:
        yield place.report.error(path, str(error), _AGAIN)
        return
    if missing := [name for name in (place.rule.metrics if place.rule else ()) if name not in metrics]:
        yield place.report.error(path, f"no line that the checker reads as {missing[0]}", _AGAIN)
    if not HASH_LINE.search(text):
        yield place.report.error(path, "no hash= line: the accuracy log was not truncated", _REBUILD)
