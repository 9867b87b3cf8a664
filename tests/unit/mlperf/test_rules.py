from collections.abc import Callable

import pytest
from pydantic import ValidationError

from fleet.errors import CampaignError
from fleet.mlperf.rules import BenchmarkRule, Source, benchmark_names, load_benchmark, load_round, round_names
from fleet.terms import Category, Division, Scenario


@pytest.mark.parametrize("name", round_names())
def test_every_round_reads_and_is_named_as_its_file(name: str) -> None:
    rules = load_round(name)
    assert rules.name == name
    assert set(rules.seeds) == {"qsl_rng_seed", "sample_index_rng_seed", "schedule_rng_seed"}
    assert rules.system_keys.may_be_empty < set(rules.system_keys.required)
    assert len(rules.system_keys.required) == len(set(rules.system_keys.required)) == 35


@pytest.mark.parametrize("name", benchmark_names())
def test_every_benchmark_reads_and_stands_for_an_official_one(name: str) -> None:
    rule = load_benchmark(name)
    assert rule.name == name
    assert any(rule.official in load_round(round_name).benchmarks for round_name in round_names())


@pytest.mark.parametrize(("load", "known"), [(load_round, "v6.1"), (load_benchmark, "tiny-bert")])
def test_an_unknown_name_lists_what_there_is(load: Callable[[str], object], known: str) -> None:
    with pytest.raises(CampaignError, match=known) as caught:
        load("../rounds/v6.1")
    assert caught.value.exit_code == 2


def test_scenarios_of_both_categories_are_joined() -> None:
    rule = load_benchmark("tiny-bert")
    assert rule.scenarios_of("edge") == (Scenario.SINGLE_STREAM, Scenario.OFFLINE)
    assert rule.scenarios_of("datacenter,edge") == (Scenario.SINGLE_STREAM, Scenario.OFFLINE)
    assert rule.scenarios_of(Category.DATACENTER) == ()
    assert rule.divisions == (Division.OPEN,)


def test_a_key_nobody_knows_is_refused() -> None:
    data = load_benchmark("tiny-bert").model_dump()
    with pytest.raises(ValidationError, match="surprise"):
        BenchmarkRule.model_validate(data | {"surprise": 1})


@pytest.mark.parametrize("name", benchmark_names())
def test_what_comes_from_outside_is_verified_and_bounded(name: str) -> None:
    for source in load_benchmark(name).sources.values():
        assert (source.url or source.uri).startswith("https://")
        assert source.uri or source.sha256 or source.md5
        assert source.max_gib < 30


@pytest.mark.parametrize("given", [{}, {"url": "https://a/b", "uri": "https://a/b.uri"}, {"uri": "https://a/b.uri"},
                                   {"url": "https://a/b", "files": ["*"]}])  # fmt: skip
def test_a_source_is_of_one_kind(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="a source has a url, or a uri with files"):
        Source.model_validate(given)
