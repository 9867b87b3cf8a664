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


def settings(scenario: str = "Server") -> str:
    return line("effective_scenario", scenario)


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


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9, 0.99])
def test_a_log_that_broke_off_is_never_valid(cut: float) -> None:
    text = log("offline-valid")
    lines = text.splitlines(keepends=True)
    short = "".join(lines[: int(len(lines) * cut)])
    with contextlib.suppress(ResultsError):  # so short that it names no scenario
        assert summarise(short).valid is not True or "result_validity" in short


def test_a_run_without_verdict_is_invalid() -> None:
    found = summarise(settings() + line("effective_test_mode", "PerformanceOnly"))
    assert found.valid is False
    assert found.invalid_reasons == ("LoadGen wrote no verdict: the run was cut short",)


def test_early_stopping_that_could_not_estimate_gives_no_metric() -> None:
    text = settings("MultiStream") + line("result_validity", "INVALID") + line("early_stopping_latency_ms", 0)
    assert summarise(text).metric is None


def test_errors_are_counted_even_where_loadgen_does_not() -> None:
    text = settings() + line("error_runtime", "no", metadata={"is_error": True}) + line("x", 1, metadata="odd")
    assert summarise(text).errors == 1
    assert summarise(text + line("num_errors", 7)).errors == 7


@pytest.mark.parametrize("value", ["fast", True, [1], 10**400])
def test_a_number_that_is_none_is_an_error(value: Any) -> None:
    with pytest.raises(ResultsError, match="result_completed_samples_per_sec"):
        summarise(settings() + line("result_completed_samples_per_sec", value))


@pytest.mark.parametrize("word", ["NaN", "Infinity"])
def test_numbers_outside_json_are_an_error(word: str) -> None:
    with pytest.raises(ResultsError, match="line 2 "):
        summarise(settings() + f'{MARKER} {{"key": "result_samples_per_second", "value": {word}}}\n')


def test_seeds_keep_every_digit() -> None:
    assert summarise(settings() + line("effective_qsl_rng_seed", 2**64 - 1)).seeds == {"qsl_rng_seed": 2**64 - 1}


@given(st.lists(st.one_of(st.text(), st.text().map(lambda text: f"{MARKER} {text}"))))
def test_any_text_is_read_or_refused(lines: list[str]) -> None:
    with contextlib.suppress(ResultsError):
        assert isinstance(summarise("\n".join(lines)), LoadgenSummary)
