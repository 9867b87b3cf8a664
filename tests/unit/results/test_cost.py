"""What things cost, by hand; an unknown price is never 0."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fleet import campaign as campaigns
from fleet import pipeline
from fleet.cli import tables
from fleet.handoff import InstanceSpend, Spend, UnitRecord, spend_file
from fleet.harness.contract import UnitStatus
from fleet.pipeline import Outing
from fleet.results import cost, dollars, export
from fleet.results.cost import Rates
from fleet.results.load import load
from fleet.results.records import LoadgenSummary, Metric, Price, SessionResults
from fleet.session import Session
from fleet.terms import Mode, Reason, Scenario, UnitState
from tests.unit.cloud.leased import NOW, lease, leased
from tests.unit.fakes import FakePlays, RecordingWatch
from tests.unit.results.session_files import ALL_FOUR, Host, Unit, build

HOUR = Price(usd_per_hour=3.6, source="fleet.yml", market="own")


def instance(host: str, **changes: Any) -> InstanceSpend:
    values: dict[str, Any] = {
        "id": f"i-{host}",
        "host": host,
        "lease": "lease-1",
        "type": "g5.xlarge",
        "region": "us-east-1",
        "zone": "us-east-1a",
        "market": "spot",
        "usd_per_hour": 0.4,
        "price_source": "spot-history 2026-11-25",
        "launched_at": 0.0,
        "ended_at": 3600.0,
        "usd": 0.4,
        "besides_usd": 0.02,
    }
    return InstanceSpend(**(values | changes))


def priced(session: Session, *instances: InstanceSpend) -> None:
    session.write(spend_file(session), Spend(at=NOW, instances=instances, besides_source="table 2026-08-17"))


def summary(scenario: Scenario, value: float, unit: str, *, valid: bool | None = True) -> LoadgenSummary:
    made = load_summary()
    return dataclasses.replace(made, scenario=scenario, valid=valid, metric=Metric(key="k", value=value, unit=unit))


def load_summary() -> LoadgenSummary:
    return LoadgenSummary(
        scenario=Scenario.OFFLINE,
        valid=True,
        invalid_reasons=(),
        metric=None,
        latencies_ns={},
        query_count=1,
        duration_ms=1,
        min_duration_ms=1,
        samples_per_query=1,
        performance_sample_count=1,
        accuracy_sample_count=None,
        early_stopping_met=None,
        seeds={},
        loadgen_version="",
        errors=0,
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        # 3.6 dollars an hour are a thousandth of a dollar a second.
        (summary(Scenario.OFFLINE, 100, "Samples/s"), (10.0, "samples")),
        (summary(Scenario.SERVER, 50, "Queries/s"), (20.0, "samples")),
        (summary(Scenario.OFFLINE, 1000, "Tokens/s"), (1.0, "tokens")),
        (summary(Scenario.SINGLE_STREAM, 10, "ms"), (10.0, "samples")),
        (summary(Scenario.MULTI_STREAM, 80, "ms"), (10.0, "samples")),
        (summary(Scenario.OFFLINE, 100, "Samples/s", valid=False), (None, "")),
        (summary(Scenario.OFFLINE, 100, "Samples/s", valid=None), (None, "")),
        (summary(Scenario.OFFLINE, 0, "Samples/s"), (None, "")),
        (summary(Scenario.OFFLINE, 5, "Joules"), (None, "")),
        (summary(Scenario.SERVER, 5, "ms"), (None, "")),
        (load_summary(), (None, "")),
        (None, (None, "")),
    ],
)
def test_a_million(found: LoadgenSummary | None, expected: tuple[float | None, str]) -> None:
    each, things = cost.per_million(HOUR, found)
    assert (each if each is None else pytest.approx(each), things) == expected
    assert cost.per_million(None, found) == (None, "")


def test_wall_time_that_makes_no_sense_is_unknown() -> None:
    assert cost.seconds(10.0, 610.0) == 600
    unknown = [(None, 1.0), (1.0, None), (10.0, 9.0), (0.0, float("nan")), (0.0, float("inf")), (0.0, 1e9)]
    assert [cost.seconds(*pair) for pair in unknown] == [None] * len(unknown)


def test_the_price_is_that_of_the_instance_it_ran_on() -> None:
    first, second = instance("a"), instance("a", id="i-2", launched_at=5000.0, usd_per_hour=1.0, market="on-demand")
    rates = Rates(
        own={"a": 9.0, "b": 0.2, "c": None}, spend=Spend(at=NOW, instances=(second, first), besides_source="")
    )
    at = {when: rates.price("a", when) for when in (-60.0, 100.0, 6000.0, None)}
    assert [price.usd_per_hour for price in at.values() if price] == [0.4, 0.4, 1.0, 1.0]
    own = rates.price("b")
    assert own is not None
    assert (own.usd_per_hour, own.cited) == (0.2, "own, fleet.yml")
    assert rates.price("c") is None
    assert rates.price("d") is None


def test_units_and_session_by_hand(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a", units=ALL_FOUR), Host(name="b", units=ALL_FOUR, usd_per_hour=3.6)])
    priced(session, instance("a"), instance("", id="i-spare", usd=0.1, ended_at=None))
    found = load(session)
    # Each unit's manifest says 611 s.
    assert [unit.usd for unit in found.units] == pytest.approx([0.4 * 611 / 3600] * 4 + [0.611] * 4)
    assert found.cost is not None
    assert found.cost.instances_usd == pytest.approx(0.5)
    assert found.cost.own_usd == pytest.approx(4 * 0.611)
    assert found.cost.usd == pytest.approx(0.5 + 4 * 0.611)
    assert found.cost.measured_usd == pytest.approx(4 * 0.611 + 4 * 0.4 * 611 / 3600)
    assert (found.cost.open, found.cost.unpriced) == (("i-spare",), ())
    assert [system.price.cited for system in found.systems if system.price] == [
        "spot, spot-history 2026-11-25",
        "own, fleet.yml",
    ]
    offline = next(unit for unit in found.units if unit.unit == "b.tiny-bert.Offline.performance")
    assert offline.summary is not None
    assert offline.summary.metric is not None
    assert offline.usd_per_million == pytest.approx(1000 / offline.summary.metric.value)
    assert {unit.usd_per_million for unit in found.units if unit.mode is Mode.ACCURACY} == {None}


def test_in_words_the_whole_session_comes_first(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a", units=ALL_FOUR), Host(name="b", units=ALL_FOUR, usd_per_hour=3.6)])
    priced(session, instance("a"), instance("", id="i-spare", usd=0.1, ended_at=None))
    assert tables.cost(load(session)) == [
        "cost: $2.94, of which units ran for $2.72",
        "  2 instances, from launch to end, idle time too: $0.50; traffic, taxes and discounts are not in it",
        "  their volumes and addresses, beside it: about $0.04 (table 2026-08-17)",
        "  other hosts, for the time of their units: $2.44",
        "  not seen to be gone, so the sum may still grow: i-spare",
    ]


def test_without_prices_nothing_is_said_of_cost(tmp_path: Path) -> None:
    found = load(build(tmp_path, [Host(name="a", units=ALL_FOUR)]))
    assert found.cost is None
    assert {unit.usd for unit in found.units} == {None}
    assert "cost" not in tables.results(found)[0]
    assert tables.cost(found) == []
    assert export.units_frame(found)[["usd", "usd_per_hour", "usd_per_million"]].isna().all(axis=None)


def test_one_host_without_a_price_is_named_and_not_counted_as_free(tmp_path: Path) -> None:
    found = load(build(tmp_path, [Host(name="a", units=(Unit(),)), Host(name="b", units=(Unit(),), usd_per_hour=3.6)]))
    assert found.cost is not None
    assert found.cost.unpriced == ("a",)
    columns, rows = tables.results(found)
    assert rows[0][columns.index("cost")] == "-"
    assert rows[1][columns.index("cost")].startswith("$0.61; $")
    lines = tables.cost(found)
    assert lines[0] == "cost: $0.61 for the time of the units"
    assert "  without a price, so not in the sum: a" in lines


def test_an_invalid_run_has_a_cost_and_no_price_per_million(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a", units=(Unit(log="offline-invalid"),), usd_per_hour=3.6)])
    (unit,) = load(session).units
    assert unit.usd == pytest.approx(0.611)
    assert unit.usd_per_million is None


def test_a_unit_that_failed_cost_money_all_the_same(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a", units=(Unit(state=UnitState.FAILED, cause="x"),), usd_per_hour=3.6)])
    name = "a.tiny-bert.Offline.performance"
    status = UnitStatus(unit=name, state=UnitState.FAILED, started_at=100.0, ended_at=400.0)
    record = UnitRecord(unit=name, host="a", state=UnitState.FAILED, cause="x", reason=Reason.OTHER, status=status)
    session.write(session.run / "units" / f"{name}.json", record)
    (unit,) = load(session).units
    assert unit.usd == pytest.approx(0.3)


def test_the_files_hold_prices_with_their_source(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a", units=ALL_FOUR), Host(name="b", units=ALL_FOUR)])
    priced(session, instance("a"))
    found = load(session)
    export.export(session, found)
    frame = pd.read_parquet(session.results / "results.parquet")
    assert frame["price_source"].dropna().unique().tolist() == ["spot-history 2026-11-25"]
    assert frame["price_market"].dropna().unique().tolist() == ["spot"]
    assert frame.loc[frame["host"] == "a", "usd"].notna().all()
    assert frame.loc[frame["host"] == "b", ["usd", "usd_per_hour"]].isna().all(axis=None)
    assert json.loads((session.results / "results.json").read_text())["cost"]["unpriced"] == ["b"]
    assert session.read(session.results / "results.json", SessionResults) == found


def test_results_of_before_prices_can_still_be_read(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a", units=(Unit(),))])
    export.export(session, load(session))
    path = session.results / "results.json"
    old = json.loads(path.read_text())
    del old["cost"]
    for unit in old["units"]:
        for name in ("price", "usd", "usd_per_million", "million_of"):
            del unit[name]
    path.write_text(json.dumps(old))
    assert session.read(path, SessionResults).cost is None


def test_the_results_stage_asks_the_leases(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a", units=(Unit(),))])
    session.write(session.cloud / "leases" / "lease-1.json", lease(instances=(leased("a", ended_at=NOW),)))
    outing = Outing(
        session=session,
        campaign=campaigns.load(session.campaign_file),
        base=tmp_path,
        source="fleet.yml",
        plays=FakePlays(),
        watch=RecordingWatch(),
        quick=False,
    )
    found = pipeline.results(outing)
    assert found.cost.instances_usd == 2.0
    assert found.units[0].price.cited == "on-demand, pricing-api 2026-11-25"


def test_dollars_for_people() -> None:
    assert dollars.hourly(1.006) == "$1.006"
    assert [dollars.dollars(usd) for usd in (None, 0.0, 0.00314, 0.5, 1, 1234.5)] == [
        "-", "$0.00", "$0.0031", "$0.50", "$1.00", "$1,234.50",
    ]  # fmt: skip
