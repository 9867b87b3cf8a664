"""The plan before a launch: sums by hand, refusals, and what is said of what is unknown."""

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fleet import campaign as campaigns
from fleet import session as sessions
from fleet.cli import cloud_tables
from fleet.cloud import aws, leases, plan
from fleet.cloud.plan import Plan
from fleet.cloud.price_table import table
from fleet.errors import CloudError, ExitCode
from tests.unit.cloud.answering import C7I, G5, Answering, listed, refused
from tests.unit.cloud.leased import NOW, lease, leased

BESIDES = table().besides(150, public=True)


def types(*known: dict[str, Any]) -> Callable[..., Any]:
    """DescribeInstanceTypes with a filter: those of the asked that there are."""
    return lambda Filters, **_: [item for item in known if item["InstanceType"] in Filters[0]["Values"]]  # noqa: N803


def offered(zones: str = "abc") -> Callable[..., Any]:
    def answer(LocationType: str, region: str, Filters: Any = None) -> Any:  # noqa: N803
        if LocationType == "region":
            return [{"InstanceType": kind, "Location": region} for kind in ("g5.xlarge", "c7i.large", "g4dn.xlarge")]
        return [{"InstanceType": kind, "Location": region + zone} for kind in Filters[0]["Values"] for zone in zones]

    return answer


def quota(limit: float) -> Callable[..., Any]:
    return lambda **_: {"Quota": {"Value": limit}}


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Answering:
    """Plenty of everything, no answer about prices: the table's are used."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = Answering(
        describe_instance_types=types(G5, C7I),
        describe_instance_type_offerings=offered(),
        describe_instances=listed(),
        get_service_quota=quota(1000),
        get_products=refused("AccessDenied"),
        describe_spot_price_history=listed(),
        get_parameter=lambda **_: {"Parameter": {"Value": "ami-1"}},
        describe_images=lambda **_: {"Images": [{"ImageId": "ami-1", "RootDeviceName": "/dev/sda1"}]},
    )
    monkeypatch.setattr(aws, "client", made)
    return made


def made(tmp_path: Path, cloud: str, **more: Any) -> Plan:
    """The plan for every instance of `cloud`, a flow mapping."""
    session, campaign = begun(tmp_path, cloud)
    assert campaign.cloud is not None
    found = plan.make(session, campaign, [name for name, _ in campaign.cloud.hosts()], **more)
    assert session.read(session.cloud / "plan.json", Plan) == found
    return found


def begun(tmp_path: Path, cloud: str) -> tuple[sessions.Session, campaigns.Campaign]:
    text = f"submitter: X\nbenchmarks: [{{name: tiny-bert}}]\ncloud: {cloud}\n"
    return sessions.create(tmp_path, text), campaigns.load_text(text, "fleet.yml")


@pytest.mark.usefixtures("account")
def test_the_most_is_every_host_on_the_dearest_candidate_until_its_lease_ends(tmp_path: Path) -> None:
    cloud = "{max_cost: 100, lease_hours: 3, prices: {c7i.large: 2.0}, instances: [\
        {name: a, count: 3, types: [g5.xlarge, c7i.large]}, {name: b, count: 1, types: [g5.xlarge]}]}"
    found = made(tmp_path, cloud)
    assert found.most_usd == pytest.approx(3 * 3 * (2.0 + BESIDES) + 3 * (1.006 + BESIDES))
    assert found.hosts == ("a-1", "a-2", "a-3", "b-1")
    assert found.refusal == ""
    found.check()
    row = found.rows[0]
    assert (row.vcpus, row.gpus, row.gpu, row.zones) == (4, 1, "A10G", ("us-east-1a", "us-east-1b", "us-east-1c"))
    assert found.price("g5.xlarge", "us-east-1", "", "on-demand").cited == f"table {table().date}"


@pytest.mark.usefixtures("account")
def test_above_max_cost_it_is_refused(tmp_path: Path) -> None:
    found = made(tmp_path, "{max_cost: 4, lease_hours: 4, instances: [{name: a, types: [g5.xlarge]}]}")
    assert found.refusal == "this can cost $4.11 until the leases end, cloud.max_cost is $4.00"
    assert "lease_hours" in found.hint
    assert cloud_tables.plan_code(found) is ExitCode.ERROR
    with pytest.raises(CloudError, match=r"\$4\.11"):
        found.check()


def test_spot_can_cost_what_on_demand_does_and_says_what_it_costs_now(account: Answering, tmp_path: Path) -> None:
    account.answers["describe_spot_price_history"] = listed(spot("a", "0.4"), spot("b", "0.5"))
    found = made(tmp_path, "{max_cost: 9, lease_hours: 1, instances: [{name: a, types: [g5.xlarge], market: spot}]}")
    assert found.most_usd == pytest.approx(1.006 + BESIDES)
    assert found.price("g5.xlarge", "us-east-1", "us-east-1a", "spot").usd_per_hour == 0.4
    assert found.price("g5.xlarge", "us-east-1", "", "spot").usd_per_hour == 0.5
    assert "0.4-0.5 (spot-history 2026-11-25)" in cloud_tables.plan(found)[1][0]


def spot(zone: str, usd: str) -> dict[str, Any]:
    at = dt.datetime(2026, 11, 25, tzinfo=dt.UTC)
    return {"InstanceType": "g5.xlarge", "AvailabilityZone": f"us-east-1{zone}", "Timestamp": at, "SpotPrice": usd}


@pytest.mark.usefixtures("account")
def test_a_spot_price_that_nobody_tells_is_at_most_that_on_demand(tmp_path: Path) -> None:
    found = made(tmp_path, "{max_cost: 9, instances: [{name: a, types: [g5.xlarge], market: spot}]}")
    price = found.price("g5.xlarge", "us-east-1", "us-east-1a", "spot")
    assert (price.usd_per_hour, price.source) == (1.006, "at most table")
    assert any("no spot price" in text for text in found.warnings)


@pytest.mark.usefixtures("account")
def test_an_unknown_type_is_told_with_the_nearest_there_is(tmp_path: Path) -> None:
    found = made(tmp_path, "{max_cost: 9, instances: [{name: a, types: [g5.xlrage]}]}")
    assert found.refusal == "cloud.instances a: there is no g5.xlrage in us-east-1, did you mean g5.xlarge?"
    with pytest.raises(CloudError, match=r"no price of g5\.xlrage"):
        found.price("g5.xlrage", "us-east-1", "", "on-demand")
    beside = made(tmp_path, "{max_cost: 9, instances: [{name: a, types: [g5.xlrage, g5.xlarge]}]}")
    assert beside.refusal == ""
    assert "a: there is no g5.xlrage in us-east-1, did you mean g5.xlarge?" in beside.warnings


def test_a_type_without_a_price_is_refused_with_the_key_that_helps(account: Answering, tmp_path: Path) -> None:
    with pytest.raises(CloudError, match=r"no price of c7i\.large in us-east-1") as caught:
        made(tmp_path, "{max_cost: 9, instances: [{name: a, types: [c7i.large]}]}")
    assert "cloud.prices: {c7i.large:" in caught.value.hint
    # What spot costs today says nothing of what it may rise to.
    history = {**spot("a", "0.05"), "InstanceType": "c7i.large"}
    account.answers["describe_spot_price_history"] = listed(history)
    with pytest.raises(CloudError, match=r"no price of c7i\.large in us-east-1"):
        made(tmp_path, "{max_cost: 9, instances: [{name: a, types: [c7i.large], market: spot}]}")
    account.answers["describe_instance_types"] = refused(aws.NO_CREDENTIALS)
    with pytest.raises(CloudError, match=aws.NO_CREDENTIALS):
        made(tmp_path, "{max_cost: 9, instances: [{name: a, types: [g5.xlarge]}]}")


def test_an_image_that_is_not_there_is_told_with_the_nearest(account: Answering, tmp_path: Path) -> None:
    account.answers["get_parameter"] = refused("ParameterNotFound")
    near = "/aws/service/deeplearning/ami/x86_64/base-ubuntu-24.04/latest/ami-id"
    account.answers["get_parameters_by_path"] = listed({"Name": near}, {"Name": "/aws/service/other"})
    name = near.replace("ubuntu", "ubunut")
    cloud = f"{{max_cost: 9, image_parameter: {name}, instances: [{{name: a, types: [g5.xlarge]}}]}}"
    with pytest.raises(CloudError, match=rf"no image {name} in us-east-1 .*did you mean {near}\?"):
        made(tmp_path, cloud)


@pytest.mark.usefixtures("account")
def test_zones_that_do_not_offer_it(tmp_path: Path) -> None:
    cloud = "{max_cost: 9, instances: [{name: a, types: [g5.xlarge], zones: [us-east-1f]}]}"
    assert made(tmp_path, cloud).refusal == (
        "cloud.instances a: of the zones named none offers g5.xlarge; us-east-1a, us-east-1b, us-east-1c of us-east-1 do"
    )


def test_a_quota_that_is_too_small(account: Answering, tmp_path: Path) -> None:
    account.answers["get_service_quota"] = quota(9)
    account.answers["describe_instances"] = listed({"Instances": [{"InstanceType": "g5.xlarge"}]})
    cloud = "{max_cost: 90, instances: [{name: a, count: 2, types: [g5.xlarge]}]}"
    found = made(tmp_path, cloud)
    assert found.refusal == (
        "cloud.instances a: the quota is too small for 1 of 2, of 4 vCPUs each: "
        "4 of 9 vCPUs in use on-demand in us-east-1 (L-DB2E81BA)"
    )
    assert "--quota-code L-DB2E81BA --desired-value 12 --region us-east-1" in found.hint
    assert made(tmp_path, cloud.replace("{max", "{partial: true, max")).refusal == ""
    account.answers["get_service_quota"] = quota(0)
    assert "for 2 of 2" in made(tmp_path, cloud.replace("{max", "{partial: true, max")).refusal


def test_what_one_quota_lacks_another_region_or_market_has(account: Answering, tmp_path: Path) -> None:
    account.answers["get_service_quota"] = quota(8)
    one = "{max_cost: 90, instances: [{name: a, count: 4, types: [g5.xlarge]REST}]}"
    assert "for 2 of 4" in made(tmp_path, one.replace("REST", "")).refusal
    assert made(tmp_path, one.replace("REST", ", market: spot-then-on-demand")).refusal == ""
    assert made(tmp_path, one.replace("REST", ", regions: [us-east-1, eu-west-1]")).refusal == ""
    # Two entries share one quota.
    two = "{max_cost: 90, instances: [{name: a, count: 2, types: [g5.xlarge]}, {name: b, types: [g5.xlarge]}]}"
    assert "cloud.instances b: the quota is too small for 1 of 1" in made(tmp_path, two).refusal


def test_an_unknown_quota_refuses_nothing_and_is_said(account: Answering, tmp_path: Path) -> None:
    account.answers["get_service_quota"] = refused("NoSuchResourceException")
    found = made(tmp_path, "{max_cost: 900, instances: [{name: a, count: 99, types: [g5.xlarge]}]}")
    assert found.refusal == ""
    assert "quota L-DB2E81BA in us-east-1: it says NoSuchResourceException" in found.warnings
    assert cloud_tables.plan(found)[1][0][6] == "unknown on-demand"


@pytest.mark.usefixtures("account")
def test_what_the_session_has_spent_counts(tmp_path: Path) -> None:
    cloud = "{max_cost: 9, lease_hours: 1, instances: [{name: a, count: 2, types: [g5.xlarge]}]}"
    session, campaign = begun(tmp_path, cloud)
    leases.write(session, lease(instances=(leased("a-2", ended_at=NOW),), public=True))
    found = plan.make(session, campaign, ["a-1"])
    assert found.spent_usd == pytest.approx(2 * (1.0 + BESIDES))
    assert found.most_usd == pytest.approx(found.spent_usd + 1.006 + BESIDES)
    assert "from earlier leases" in cloud_tables.plan_title(found)


@pytest.mark.usefixtures("account")
def test_a_price_of_another_region_is_marked(tmp_path: Path) -> None:
    found = made(tmp_path, "{max_cost: 9, regions: [eu-west-1], instances: [{name: a, types: [g5.xlarge]}]}")
    marked = f"table of us-east-1 {table().date}"
    assert f"g5.xlarge in eu-west-1: its price is that of another region ({marked})" in found.warnings
    assert f"1.006 ({marked})" in cloud_tables.plan(found)[1][0]


@pytest.mark.usefixtures("account")
def test_units_that_take_longer_than_the_lease_are_warned_about(tmp_path: Path) -> None:
    cloud = "{max_cost: 9, lease_hours: 0.02, instances: [{name: a, types: [g5.xlarge]}]}"
    full, quick = made(tmp_path, cloud), made(tmp_path, cloud, quick=True)
    assert any("longer than cloud.lease_hours (0.02)" in text for text in full.warnings)
    # Two performance units of 1.4 x 600 s and more, beside their accuracy units.
    assert full.expected_hours > 2 * 1.4 * 600 / 3600
    assert quick.expected_hours < full.expected_hours / 3


def test_however_many_hosts_the_calls_are_the_same(account: Answering, tmp_path: Path) -> None:
    made(tmp_path, "{max_cost: 9, instances: [{name: a, count: 1, types: [g5.xlarge]}]}")
    once = dict(account.asked)
    account.asked.clear()
    made(tmp_path, "{max_cost: 9000, instances: [{name: a, count: 500, types: [g5.xlarge]}]}")
    assert account.asked == once
    assert sum(once.values()) <= 8


def test_a_campaign_without_cloud_is_told_so(tmp_path: Path) -> None:
    text = "submitter: X\nbenchmarks: [{name: tiny-bert}]\nhosts: [{name: a, kind: server}]\n"
    with pytest.raises(CloudError, match="no `cloud:` section"):
        plan.make(sessions.create(tmp_path, text), campaigns.load_text(text, "fleet.yml"), [])
