"""mlperf_log_detail.txt -> LoadgenSummary. Text in, values out; the text comes from a host and is not trusted.

Keys and units follow the official checker at mlcommons/inference b66003e1 (tools/submission/submission_checker):
marked lines are JSON, others are ignored, the first value of a key wins.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from fleet.errors import ResultsError
from fleet.results.records import LoadgenSummary, Metric
from fleet.terms import Scenario

MARKER = ":::MLLOG"
ACCURACY_MODE = "AccuracyOnly"
LAST = {True: "power_end", False: "num_errors"}
"""By whether it is an accuracy run: what LoadGen 6.0.17 writes when all else is written. Late errors may follow it."""
NS_PER_MS = 1e6
PERCENTILES = ("50.00", "90.00", "95.00", "97.00", "99.00", "99.90")
SEEDS = ("qsl_rng_seed", "sample_index_rng_seed", "schedule_rng_seed")


@dataclass(frozen=True, slots=True)
class MetricRule:
    """Where a scenario's official number stands in the log."""

    key: str
    unit: str
    divisor: float


METRICS: dict[Scenario, MetricRule] = {
    Scenario.OFFLINE: MetricRule("result_samples_per_second", "Samples/s", 1.0),
    Scenario.SINGLE_STREAM: MetricRule("early_stopping_latency_ss", "ms", NS_PER_MS),
    Scenario.MULTI_STREAM: MetricRule("early_stopping_latency_ms", "ms", NS_PER_MS),
    Scenario.SERVER: MetricRule("result_completed_samples_per_sec", "Queries/s", 1.0),
}
"""The checker's RESULT_FIELD for rounds from v4.1 on and models without tokens."""
TOKEN_METRICS: dict[Scenario, MetricRule] = {
    **METRICS,
    Scenario.OFFLINE: MetricRule("result_tokens_per_second", "Tokens/s", 1.0),
    # Here early_stopping_latency_ss is the first token's latency, not the answer's.
    Scenario.SINGLE_STREAM: MetricRule("result_90.00_percentile_latency_ns", "ms", NS_PER_MS),
    Scenario.SERVER: MetricRule("result_completed_tokens_per_second", "Tokens/s", 1.0),
}
"""The checker's RESULT_FIELD_BENCHMARK_OVERWRITE for models whose log has token latencies."""


def parse(text: str) -> dict[str, Any]:
    """Key to value of a detail log; the first value of a key wins, as in the checker.

    Raises ResultsError, naming the line, when a marked line is not a LoadGen record.
    """
    return _first_values([record for _, record in _records(text)])


def summarise(text: str) -> LoadgenSummary:
    """What the log says, as one value.

    Raises ResultsError when a marked line is broken, when the log names no scenario or ends in the middle, or when a
    number is none. A log that a crash or a full disk cut off is no result, not an INVALID one.
    """
    records = [record for _, record in _records(text)]
    values = _first_values(records)
    scenario = _scenario(values)
    accuracy = values.get("effective_test_mode") == ACCURACY_MODE
    if LAST[accuracy] not in values or not text.endswith("\n"):
        raise ResultsError(
            "mlperf_log_detail.txt ends in the middle: LoadGen did not get to its last line", hint="run the unit again"
        )
    valid = None if accuracy else values.get("result_validity") == "VALID"
    return LoadgenSummary(
        scenario=scenario,
        valid=valid,
        invalid_reasons=_invalid_reasons(records, values) if valid is False else (),
        metric=None if accuracy else _metric(values, scenario),
        latencies_ns=_latencies(values, scenario),
        query_count=_int(values, "result_query_count") or 0,
        duration_ms=_duration_ms(records),
        min_duration_ms=_number(values, "effective_min_duration_ms") or 0.0,
        samples_per_query=_int(values, "effective_samples_per_query") or 0,
        performance_sample_count=_int(values, "effective_performance_sample_count") or 0,
        accuracy_sample_count=_accuracy_samples(values),
        early_stopping_met=_flag(values, "early_stopping_met"),
        seeds={name: seed for name in SEEDS if (seed := _int(values, f"effective_{name}")) is not None},
        loadgen_version=str(values.get("loadgen_version", "")),
        errors=_errors(records, values),
    )


def _records(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.startswith(MARKER):
            continue
        try:
            record = json.loads(line[len(MARKER) :], parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ResultsError(f"mlperf_log_detail.txt: line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("key"), str) or "value" not in record:
            raise ResultsError(f"mlperf_log_detail.txt: line {number} has no key and value")
        yield number, record


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _first_values(records: list[dict[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for record in records:
        values.setdefault(record["key"], record["value"])
    return values


def _scenario(values: dict[str, Any]) -> Scenario:
    text = values.get("effective_scenario")
    try:
        return Scenario(str(text))
    except ValueError as error:
        raise ResultsError(
            f"mlperf_log_detail.txt: effective_scenario is {text!r}, LoadGen ended before it wrote its settings",
            hint="run the unit again",
        ) from error


def _metric(values: dict[str, Any], scenario: Scenario) -> Metric | None:
    rule = (TOKEN_METRICS if values.get("requested_use_token_latencies") is True else METRICS)[scenario]
    value = _number(values, rule.key)
    if not value:  # LoadGen writes 0 where early stopping could not estimate a latency: that is no measurement
        return None
    return Metric(key=rule.key, value=value / rule.divisor, unit=rule.unit)


def _latencies(values: dict[str, Any], scenario: Scenario) -> dict[str, float]:
    """MultiStream's latencies are those of a query of several samples, as in the rules."""
    stem = "_query" if scenario is Scenario.MULTI_STREAM else ""
    per = "_per_query" if scenario is Scenario.MULTI_STREAM else ""
    keys = {name: f"result_{name}{stem}_latency_ns" for name in ("min", "mean", "max")}
    keys |= {name: f"result_{name}_percentile{per}_latency_ns" for name in PERCENTILES}
    return {name: value for name, key in keys.items() if (value := _number(values, key)) is not None}


def _invalid_reasons(records: list[dict[str, Any]], values: dict[str, Any]) -> tuple[str, ...]:
    """LoadGen's own words where it has any, and what its flags say."""
    if "result_validity" not in values:
        return ("LoadGen wrote no verdict: the run was cut short",)
    flags = {
        "result_perf_constraints_met": "latency constraint not met",
        "result_min_duration_met": "minimum duration not met",
        "result_min_queries_met": "minimum query count not met",
        "early_stopping_met": "early stopping criterion not met",
    }
    said = [str(record["value"]) for record in records if record["key"] == "result_invalid_reason"]
    if values.get("early_stopping_met") is False:
        said.append(str(values.get("early_stopping_result", "")))
    reasons = [reason for key, reason in flags.items() if values.get(key) is False]
    reasons += [" ".join(text.split()) for text in said if text.strip()]
    return tuple(dict.fromkeys(reasons)) or ("LoadGen gives no reason",)


def _accuracy_samples(values: dict[str, Any]) -> int | None:
    """The checker's dataset coverage: effective_accuracy_sample_count, else what the QSL reported."""
    count = _int(values, "effective_accuracy_sample_count")
    return _int(values, "qsl_reported_total_count") if count is None else count


def _duration_ms(records: list[dict[str, Any]]) -> float:
    times = [time for record in records if (time := _number(record, "time_ms")) is not None]
    return times[-1] - times[0] if times else 0.0


def _errors(records: list[dict[str, Any]], values: dict[str, Any]) -> int:
    """LoadGen's own count or the marked records, whichever is larger: errors may follow the count."""
    marked = sum(
        isinstance(meta := record.get("metadata"), dict) and meta.get("is_error") is True for record in records
    )
    return max(marked, _int(values, "num_errors") or 0)


def _number(values: dict[str, Any], key: str) -> float | None:
    value = values.get(key)
    if value is None:
        return None
    # bool is an int to Python, but not to LoadGen
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise ResultsError(f"mlperf_log_detail.txt: {key} is {str(value)[:80]!r}, not a number")
    return float(value)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer with hundreds of digits
        return False


def _int(values: dict[str, Any], key: str) -> int | None:
    """Exact, because seeds do not fit into a float."""
    value = values.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _number(values, key)
    return None if number is None else int(number)


def _flag(values: dict[str, Any], key: str) -> bool | None:
    value = values.get(key)
    return value if isinstance(value, bool) else None
