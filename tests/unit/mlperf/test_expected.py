"""How long units take, by hand; and the figures behind it against LoadGen's own."""

import json
import subprocess
import sys
from typing import Any

import pytest

from fleet.mlperf import expected, rules
from fleet.terms import Mode, Scenario

BERT, GPTJ = rules.load_benchmark("bert-99"), rules.load_benchmark("gptj-99")


def seconds(rule: rules.BenchmarkRule, scenario: Scenario, mode: Mode, **settings: float) -> float:
    return expected.seconds(rule, scenario, mode, settings, min_duration_ms=600_000, samples=rule.samples)


def test_without_a_known_speed_it_is_the_slow_machines() -> None:
    assert seconds(BERT, Scenario.OFFLINE, Mode.ACCURACY) == 7200
    assert seconds(BERT, Scenario.OFFLINE, Mode.PERFORMANCE) == 60 + 7200
    assert seconds(BERT, Scenario.SINGLE_STREAM, Mode.PERFORMANCE) == 60 + 1.4 * 600
    assert seconds(BERT, Scenario.MULTI_STREAM, Mode.PERFORMANCE) == pytest.approx(60 + 8 * 662 * 7200 / 10833)
    assert seconds(GPTJ, Scenario.SINGLE_STREAM, Mode.PERFORMANCE) == 60 + 90_000


def test_with_a_target_it_is_the_systems_own() -> None:
    assert seconds(BERT, Scenario.OFFLINE, Mode.ACCURACY, target_qps=100) == pytest.approx(108.33)
    assert seconds(BERT, Scenario.OFFLINE, Mode.ACCURACY, target_qps=5000) == 60
    assert seconds(BERT, Scenario.OFFLINE, Mode.PERFORMANCE, target_qps=5000) == 60 + 1.4 * 600
    assert seconds(BERT, Scenario.OFFLINE, Mode.PERFORMANCE, target_qps=1) == 60 + 10833
    assert seconds(BERT, Scenario.SINGLE_STREAM, Mode.PERFORMANCE, target_latency=20_000) == 60 + 100 * 20
    assert seconds(BERT, Scenario.MULTI_STREAM, Mode.ACCURACY, target_latency=800) == pytest.approx(1083.3)
    # Equal issue in SingleStream: 1200 queries fit into one pass of 13,368, 24,000 take two.
    assert seconds(GPTJ, Scenario.SINGLE_STREAM, Mode.PERFORMANCE, target_latency=1000) == 60 + 13368
    assert seconds(GPTJ, Scenario.SINGLE_STREAM, Mode.PERFORMANCE, target_latency=50) == 60 + 2 * 13368 * 0.05
    assert seconds(GPTJ, Scenario.SERVER, Mode.PERFORMANCE, target_qps=2, target_latency=1) == 60 + 13368 / 2


ASK = """
import json, sys
import mlperf_loadgen as lg
settings = lg.TestSettings()
settings.scenario = getattr(lg.TestScenario, sys.argv[2])
settings.mode = lg.TestMode.PerformanceOnly
settings.FromConfig("", sys.argv[1], sys.argv[2], 0)
print(json.dumps([settings.min_query_count, settings.sample_concatenate_permutation]))
"""


def asked(model: str, scenario: Scenario) -> Any:
    told = subprocess.run([sys.executable, "-c", ASK, model, scenario], capture_output=True, text=True, check=True)
    return json.loads(told.stdout)


@pytest.mark.parametrize("name", rules.benchmark_names())
def test_the_least_that_loadgen_sends_is_what_the_rules_say(name: str) -> None:
    rule = rules.load_benchmark(name)
    for scenario in Scenario:
        queries, whole = asked(rule.loadgen_model, scenario)
        assert (scenario in rule.whole_set) is (whole or queries >= rule.samples), scenario
        if scenario is not Scenario.OFFLINE:
            assert queries == expected.LEAST_QUERIES[scenario]
