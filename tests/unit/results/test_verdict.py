"""Each reason against submitting, alone: a passing unit with one thing wrong."""

import dataclasses
from typing import Any

import pytest

from fleet.mlperf.rules import load_benchmark, load_round
from fleet.results import loadgen_log
from fleet.results.verdict import Evidence, reasons
from fleet.terms import Mode, Scenario, UnitState
from tests.unit.results.session_files import LOGS, Unit, spec

PERFORMANCE = Unit()
ACCURACY = Unit(mode=Mode.ACCURACY, log="offline-accuracy")


def evidence(unit: Unit, *, summary: dict[str, Any] | None = None, **changes: Any) -> Evidence:
    text = (LOGS / unit.log / "mlperf_log_detail.txt").read_text(encoding="utf-8")
    values: dict[str, Any] = {
        "spec": spec("h", unit),
        "state": UnitState.DONE,
        "cause": "",
        "manifest": None,
        "summary": dataclasses.replace(loadgen_log.summarise(text), **(summary or {})),
        "accuracy": {"F1": 87.0} if unit.mode is Mode.ACCURACY else {},
        "labels": ("demo model",),
    }
    return Evidence(**(values | changes))


def judged(found: Evidence, division: str = "open") -> tuple[str, ...]:
    return reasons(found, load_benchmark("tiny-bert"), load_round("v6.1"), division)


@pytest.mark.parametrize("unit", [PERFORMANCE, ACCURACY])
def test_a_full_run_has_nothing_against_it(unit: Unit) -> None:
    assert judged(evidence(unit)) == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"state": UnitState.TIMEOUT, "cause": "past 2000 s", "summary": None}, "timeout: past 2000 s"),
        ({"summary": None, "cause": "not collected"}, "not collected"),
        ({"spec": spec("h", PERFORMANCE, quick=True)}, "quick run"),
        ({"labels": ("random weights",)}, "random weights"),
        ({"labels": ("simulated",)}, "simulated: the null backend computes nothing"),
        ({"spec": spec("h", Unit(backend="null"))}, "simulated: the null backend computes nothing"),
    ],
)
def test_what_the_run_says(changes: dict[str, Any], expected: str) -> None:
    found = dataclasses.replace(evidence(PERFORMANCE), **changes)
    assert judged(found) == (expected,)


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ({"valid": False, "invalid_reasons": ("a", "b")}, "INVALID: a; b"),
        ({"errors": 2}, "LoadGen logged 2 errors"),
        ({"metric": None}, "LoadGen wrote no figure for Offline"),
        ({"seeds": {}}, "qsl_rng_seed, sample_index_rng_seed, schedule_rng_seed: not the seed of round v6.1"),
        ({"min_duration_ms": 599_999.0}, "min_duration 599.999 s, the round wants 600 s"),
        ({"performance_sample_count": 1024}, "1024 of 10833 performance samples"),
        ({"valid": None}, "the log is not of performance mode"),
    ],
)
def test_what_a_performance_log_says(summary: dict[str, Any], expected: str) -> None:
    (reason,) = judged(evidence(PERFORMANCE, summary=summary))
    assert reason.startswith(expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"accuracy": {}}, "accuracy missing: accuracy.txt has no F1"),
        ({"summary": {"accuracy_sample_count": 500}}, "500 of 10833 samples: not the whole dataset"),
        ({"spec": spec("h", ACCURACY, sample_count=100)}, "100 of 10833 samples: not the whole dataset"),
    ],
)
def test_what_an_accuracy_log_says(changes: dict[str, Any], expected: str) -> None:
    assert judged(evidence(ACCURACY, **changes)) == (expected,)


def test_another_scenarios_log_is_noticed() -> None:
    (reason,) = judged(evidence(Unit(log="offline-valid"), spec=spec("h", Unit(scenario=Scenario.SINGLE_STREAM))))
    assert reason == "the log is of Offline, planned was SingleStream"


def test_closed_wants_the_whole_dataset_in_offline() -> None:
    found = evidence(PERFORMANCE, summary={"samples_per_query": 1000})
    assert judged(found) == ()
    assert judged(found, "closed") == ("1000 Offline samples, closed wants 10833",)
