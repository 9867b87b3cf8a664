"""Prices: what is taken from AWS's answers, what is kept, and what stands in for them."""

import datetime as dt
import json
import time
from pathlib import Path
from typing import Any

import pytest

from fleet.cloud import aws, prices
from fleet.cloud.price_table import table
from fleet.cloud.prices import Prices
from fleet.errors import CloudError
from tests.unit.cloud.answering import Answering, listed, refused

ANSWER = json.loads((Path(__file__).parents[2] / "data" / "aws" / "get-products-g5.xlarge.json").read_text())[
    "PriceList"
]
TODAY = dt.datetime.now(dt.UTC).date().isoformat()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def answering(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> Answering:
    made = Answering(**answers)
    monkeypatch.setattr(aws, "client", made)
    return made


def test_one_call_tells_of_every_region_and_only_of_linux_shared_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, get_products=listed(*ANSWER))
    found = Prices()
    here, there = found.on_demand("g5.xlarge", "us-east-1"), found.on_demand("g5.xlarge", "eu-central-1")
    assert here is not None
    assert there is not None
    assert (here.usd_per_hour, here.cited) == (1.006, f"pricing-api {TODAY}")
    assert there.usd_per_hour == 1.258
    assert asked.asked == {"get_products": 1}


def odd(**changes: Any) -> str:
    """The first offer, with a price dimension's fields changed."""
    offer = json.loads(ANSWER[0])
    (term,) = offer["terms"]["OnDemand"].values()
    (dimension,) = term["priceDimensions"].values()
    dimension |= changes
    return json.dumps(offer)


@pytest.mark.parametrize(
    "item",
    [
        "{",
        "[]",
        "null",
        "{}",
        7,
        None,
        json.dumps({"product": {"attributes": []}, "terms": {"OnDemand": {}}}),
        odd(pricePerUnit={"CNY": "8.1"}),
        odd(pricePerUnit={"USD": "nan"}),
        odd(pricePerUnit={"USD": "inf"}),
        odd(pricePerUnit={"USD": "-1"}),
        odd(pricePerUnit={"USD": "1e9"}),
        odd(pricePerUnit={"USD": "a lot"}),
        odd(pricePerUnit=None),
        odd(unit="Quantity"),
    ],
)
def test_an_odd_offer_is_no_price(monkeypatch: pytest.MonkeyPatch, item: Any) -> None:
    answering(monkeypatch, get_products=listed(item))
    found = Prices().on_demand("g5.xlarge", "us-east-1")
    assert found is not None
    assert found.source == "table"
    answering(monkeypatch, get_products=listed(item, *ANSWER))
    prices.cache_file().unlink(missing_ok=True)
    found = Prices().on_demand("g5.xlarge", "us-east-1")
    assert found is not None
    assert (found.usd_per_hour, found.source) == (1.006, "pricing-api")


def test_of_two_offers_the_dearer_is_the_safe_one(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, get_products=listed(odd(pricePerUnit={"USD": "1.5"}), *ANSWER))
    found = Prices().on_demand("g5.xlarge", "us-east-1")
    assert found is not None
    assert found.usd_per_hour == 1.5


def test_what_was_asked_today_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, get_products=listed(*ANSWER))
    first = Prices()
    before = first.on_demand("g5.xlarge", "us-east-1")
    first.keep()
    asked = answering(monkeypatch, get_products=refused("AccessDenied"))
    assert Prices().on_demand("g5.xlarge", "us-east-1") == before
    assert asked.asked == {}
    assert [path.name for path in prices.cache_file().parent.iterdir()] == ["prices.json"]


def aged(hours: float) -> str:
    """Make what is kept so much older; returns its day."""
    at = time.time() - hours * 3600
    kept = json.loads(prices.cache_file().read_text())
    kept["on_demand"]["g5.xlarge"]["at"] = at
    prices.cache_file().write_text(json.dumps(kept))
    return dt.datetime.fromtimestamp(at, dt.UTC).date().isoformat()


def test_what_is_older_is_asked_again_and_serves_where_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, get_products=listed(*ANSWER))
    first = Prices()
    first.on_demand("g5.xlarge", "us-east-1")
    first.keep()
    day = aged(100)
    answering(monkeypatch, get_products=refused("AccessDenied"))
    silent = Prices()
    found = silent.on_demand("g5.xlarge", "us-east-1")
    assert found is not None
    assert (found.usd_per_hour, found.cited) == (1.006, f"pricing-api {day}")
    assert silent.trouble == ["it says AccessDenied"]
    answering(monkeypatch, get_products=listed(odd(pricePerUnit={"USD": "1.1"})))
    found = Prices().on_demand("g5.xlarge", "us-east-1")
    assert found is not None
    assert (found.usd_per_hour, found.date) == (1.1, TODAY)


@pytest.mark.parametrize(
    "kept",
    [
        "",
        "{",
        "[]",
        '{"on_demand": {"g5.xlarge": {"at": 9e9, "regions": {"us-east-1": 0.01}}}}',
        '{"on_demand": {"g5.xlarge": {"at": 1, "regions": {"us-east-1": -1}}}}',
        '{"on_demand": {"g5.xlarge": {"at": 1, "regions": {"us-east-1": "free"}}}}',
        '{"on_demand": 3}',
    ],
)
def test_a_broken_cache_is_no_cache(monkeypatch: pytest.MonkeyPatch, kept: str) -> None:
    prices.cache_file().parent.mkdir(parents=True)
    prices.cache_file().write_text(kept)
    answering(monkeypatch, get_products=listed(*ANSWER))
    first = Prices()
    found = first.on_demand("g5.xlarge", "us-east-1")
    assert found is not None
    assert found.usd_per_hour == 1.006
    first.keep()
    assert Prices().on_demand("g5.xlarge", "us-east-1") == found


def test_a_cache_that_cannot_be_written_stops_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    answering(monkeypatch, get_products=listed(*ANSWER))
    found = Prices()
    found.on_demand("g5.xlarge", "us-east-1")
    found.keep()
    assert (tmp_path / "file").read_text() == ""


def test_without_an_answer_the_table_is_marked_and_the_api_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, get_products=refused("AccessDenied"))
    found = Prices()
    here, there = found.on_demand("g5.xlarge", "us-east-1"), found.on_demand("g5.2xlarge", "eu-west-1")
    assert here is not None
    assert there is not None
    assert here.cited == f"table {table().date}"
    assert there.cited == f"table of us-east-1 {table().date}"
    assert found.on_demand("u7in-24tb.224xlarge", "us-east-1") is None
    assert asked.asked == {"get_products": 1}
    assert found.trouble == ["it says AccessDenied"]


def test_the_campaigns_own_price_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch)
    found = Prices(given={"g5.xlarge": 0.7}).on_demand("g5.xlarge", "us-east-1")
    assert found is not None
    assert (found.usd_per_hour, found.source) == (0.7, "fleet.yml")
    assert asked.asked == {}


@pytest.mark.parametrize("code", [aws.NO_CREDENTIALS, *sorted(aws.EXPIRED)])
def test_without_credentials_nothing_stands_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    answering(monkeypatch, get_products=refused(code), describe_spot_price_history=refused(code))
    with pytest.raises(CloudError, match=code):
        Prices().on_demand("g5.xlarge", "us-east-1")
    with pytest.raises(CloudError, match=code):
        Prices().spot(("g5.xlarge",), "us-east-1")


def said(zone: str, hour: int, usd: str, kind: str = "g5.xlarge") -> dict[str, Any]:
    at = dt.datetime(2026, 11, 25, hour, tzinfo=dt.UTC)
    return {"InstanceType": kind, "AvailabilityZone": zone, "Timestamp": at, "SpotPrice": usd}


def test_of_spot_history_the_last_price_in_each_zone_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    history = listed(
        said("us-east-1a", 3, "0.41"),
        said("us-east-1a", 2, "0.44"),
        said("us-east-1b", 1, "0.52"),
        said("us-east-1c", 1, "free"),
        said("us-east-1d", 1, "0"),
        {"InstanceType": "g5.xlarge"},
    )
    asked = answering(monkeypatch, describe_spot_price_history=history)
    first = Prices()
    found = first.spot(("g5.xlarge", "p5.48xlarge"), "us-east-1")
    assert {zone: price.usd_per_hour for zone, price in found["g5.xlarge"].items()} == {
        "us-east-1a": 0.41,
        "us-east-1b": 0.52,
    }
    assert found["g5.xlarge"]["us-east-1a"].cited == "spot-history 2026-11-25"
    assert found["p5.48xlarge"] == {}
    first.keep()
    assert Prices().spot(("g5.xlarge", "p5.48xlarge"), "us-east-1") == found
    assert asked.asked == {"describe_spot_price_history": 1}


def test_what_a_volume_and_an_address_cost_by_hand() -> None:
    assert table().besides(150, public=False) == pytest.approx(150 * 0.08 / 730)
    assert table().besides(150, public=True) == pytest.approx(150 * 0.08 / 730 + 0.005)
    assert not [kind for kind, usd in table().usd_per_hour.items() if not 0.1 < usd < 100]
