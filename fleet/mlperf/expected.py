"""How long a unit takes: arithmetic over a benchmark's figures, and over what is known of a system. No IO."""

from collections.abc import Mapping

from fleet.mlperf.rules import BenchmarkRule
from fleet.terms import Mode, Scenario

START_S = 60.0
"""Interpreter, model, warm-up and tuning; no unit takes less."""
LENGTH = 1.4
"""Offline's one query is sized 1.1 times the duration, at a rate 1.2 times the measured one."""
QUERY_SAMPLES = {Scenario.MULTI_STREAM: 8}
"""Samples of a query; one in the other scenarios."""
LEAST_QUERIES = {Scenario.SINGLE_STREAM: 100, Scenario.MULTI_STREAM: 662, Scenario.SERVER: 100}
"""LoadGen's min_query_count in every round's mlperf.conf; Offline's is the whole set."""
QUICK_SET_S, QUICK_LEAST = 120.0, 100
"""--quick takes so many samples of a set as a slow machine answers in so long, and enough for early stopping."""


def few(rule: BenchmarkRule, samples: int) -> int:
    """How many of a set's samples --quick takes."""
    return min(samples, max(QUICK_LEAST, int(rule.samples * QUICK_SET_S / rule.run_seconds)))


def seconds(
    rule: BenchmarkRule,
    scenario: Scenario,
    mode: Mode,
    settings: Mapping[str, float],
    *,
    min_duration_ms: float,
    samples: int,
) -> float:
    """Wall seconds of a unit over a QSL of `samples`.

    `settings` are LoadGen's, of which target_qps and target_latency tell the system's speed; without them it is that
    of the slow machine which `run_seconds` is of.
    """
    if mode is Mode.ACCURACY:
        return max(START_S, samples * _sample_s(rule, scenario, settings))
    each = _sample_s(rule, scenario, settings)
    least = samples
    if scenario is not Scenario.OFFLINE:
        together = QUERY_SAMPLES.get(scenario, 1)
        least = together * min(LEAST_QUERIES[scenario], samples)
    if scenario in rule.whole_set:
        least = max(least, samples)
    if scenario is Scenario.SINGLE_STREAM and scenario in rule.whole_set and "target_latency" in settings:
        # Equal issue: as many whole passes as hold twice what fits into the duration.
        least = samples * (1 + int(2 * min_duration_ms / settings["target_latency"]) // samples)
    return START_S + max(LENGTH * min_duration_ms / 1000, least * each)


def _sample_s(rule: BenchmarkRule, scenario: Scenario, settings: Mapping[str, float]) -> float:
    if scenario in {Scenario.OFFLINE, Scenario.SERVER}:
        rate = settings.get("target_qps", 0.0)
        known = 1 / rate if rate > 0 else 0.0
    else:
        known = settings.get("target_latency", 0.0) / 1000 / QUERY_SAMPLES.get(scenario, 1)
    return known or rule.run_seconds / rule.samples
