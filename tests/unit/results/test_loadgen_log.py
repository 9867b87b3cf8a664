"""Genuine LoadGen logs in, one value out; broken logs name their line."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.errors import ResultsError
from fleet.mlperf.rules import load_round
from fleet.results.loadgen_log import MARKER, parse, summarise
from fleet.results.records import LoadgenSummary
from fleet.terms import Scenario
from tests.unit.results.session_files import LOGS


def log(case: str) -> str:
    return (LOGS / case / "mlperf_log_detail.txt").read_text(encoding="utf-8")


def line(key: str, value: Any, **extra: Any) -> str:
    return f"{MARKER} {json.dumps({'key': key, 'value': value, 'time_ms': 1.5, **extra})}\n"


def whole(scenario: str = "Server") -> str:
    """The least that a log of a performance run holds."""
    return line("effective_scenario", scenario) + line("num_errors", 0)


@pytest.mark.parametrize(
    ("case", "scenario", "key", "unit"),
    [
        ("offline-valid", Scenario.OFFLINE, "result_samples_per_second", "Samples/s"),
        ("singlestream-valid", Scenario.SINGLE_STREAM, "early_stopping_latency_ss", "ms"),
        ("multistream-quick", Scenario.MULTI_STREAM, "early_stopping_latency_ms", "ms"),
        ("server-quick", Scenario.SERVER, "result_completed_samples_per_sec", "Queries/s"),
    ],
)
def test_every_scenario_has_the_checkers_metric(case: str, scenario: Scenario, key: str, unit: str) -> None:
    found = summarise(log(case))
    assert found.scenario is scenario
    assert found.metric is not None
    assert (found.metric.key, found.metric.unit) == (key, unit)
    raw = parse(log(case))[key]
    assert found.metric.value == pytest.approx(raw / 1e6 if unit == "ms" else raw)
    assert set(found.latencies_ns) == {"min", "mean", "max", "50.00", "90.00", "95.00", "97.00", "99.00", "99.90"}
    assert found.latencies_ns["50.00"] <= found.latencies_ns["99.00"]


def test_a_valid_run() -> None:
    found = summarise(log("offline-valid"))
    assert found.valid is True
    assert found.invalid_reasons == ()
    assert found.errors == 0
    assert found.min_duration_ms == 600_000
    assert found.duration_ms > 600_000
    assert found.performance_sample_count == 10833
    assert found.seeds == dict(load_round("v6.1").seeds)
    assert found.loadgen_version.startswith("6.0.17")


def test_an_invalid_run_says_why_in_loadgens_words() -> None:
    found = summarise(log("offline-invalid"))
    assert found.valid is False
    assert "minimum duration not met" in found.invalid_reasons
    assert any("Increase expected QPS" in reason for reason in found.invalid_reasons)


@pytest.mark.parametrize("case", ["offline-accuracy", "singlestream-accuracy"])
def test_accuracy_mode_has_no_verdict(case: str) -> None:
    found = summarise(log(case))
    assert found.valid is None
    assert found.metric is None
    assert found.accuracy_sample_count == 10833


def test_first_value_wins_and_other_lines_are_ignored() -> None:
    assert parse("noise\n" + line("a", 1) + "{}\n" + line("a", 2) + line("b", "x")) == {"a": 1, "b": "x"}


@pytest.mark.parametrize("broken", ["{", "[1]", '{"key": 1, "value": 2}', '{"key": "a"}', "[" * 100_000])
def test_a_broken_marked_line_is_named(broken: str) -> None:
    with pytest.raises(ResultsError, match="line 2 "):
        parse(line("a", 1) + f"{MARKER} {broken}\n" + line("b", 1))


CASES = sorted(path.name for path in LOGS.iterdir() if path.is_dir())


@pytest.mark.parametrize("case", CASES)
def test_a_log_that_broke_off_at_any_line_is_no_result(case: str) -> None:
    lines = log(case).splitlines(keepends=True)
    assert len(lines) > 50
    for count in range(len(lines)):
        with pytest.raises(ResultsError):
            summarise("".join(lines[:count]))


@pytest.mark.parametrize("case", CASES)
def test_a_log_that_broke_off_within_its_last_line_is_no_result(case: str) -> None:
    text = log(case)
    for count in range(len(text) - len(text.splitlines(keepends=True)[-1]) + 1, len(text)):
        with pytest.raises(ResultsError):
            summarise(text[:count])


def test_errors_may_follow_the_last_line() -> None:
    assert summarise(log("offline-valid") + line("error_runtime", "late", metadata={"is_error": True})).errors == 1


def test_a_run_without_verdict_is_invalid() -> None:
    found = summarise(whole() + line("effective_test_mode", "PerformanceOnly"))
    assert found.valid is False
    assert found.invalid_reasons == ("LoadGen wrote no verdict: the run was cut short",)


def test_early_stopping_that_could_not_estimate_gives_no_metric() -> None:
    text = whole("MultiStream") + line("result_validity", "INVALID") + line("early_stopping_latency_ms", 0)
    assert summarise(text).metric is None


def test_errors_are_counted_even_where_loadgen_does_not() -> None:
    text = whole() + line("error_runtime", "no", metadata={"is_error": True}) + line("x", 1, metadata="odd")
    assert summarise(text).errors == 1
    assert summarise(line("num_errors", 7) + text).errors == 7


@pytest.mark.parametrize("value", ["fast", True, [1], 10**400])
def test_a_number_that_is_none_is_an_error(value: Any) -> None:
    with pytest.raises(ResultsError, match="result_completed_samples_per_sec"):
        summarise(whole() + line("result_completed_samples_per_sec", value))


@pytest.mark.parametrize("word", ["NaN", "Infinity"])
def test_numbers_outside_json_are_an_error(word: str) -> None:
    with pytest.raises(ResultsError, match="line 3 "):
        summarise(whole() + f'{MARKER} {{"key": "result_samples_per_second", "value": {word}}}\n')


def test_seeds_keep_every_digit() -> None:
    assert summarise(whole() + line("effective_qsl_rng_seed", 2**64 - 1)).seeds == {"qsl_rng_seed": 2**64 - 1}


@given(st.lists(st.one_of(st.text(), st.text().map(lambda text: f"{MARKER} {text}"))))
def test_any_text_is_read_or_refused(lines: list[str]) -> None:
    with contextlib.suppress(ResultsError):
        assert isinstance(summarise("\n".join(lines)), LoadgenSummary)
