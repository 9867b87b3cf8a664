"""The plan against AWS as it answers over HTTP: prices, spot history, quotas, offerings; and how few calls it takes."""

import datetime as dt
import json

import pytest

from fleet.cloud import plan, prices
from fleet.cloud.plan import Plan
from fleet.cloud.price_table import table
from fleet.errors import CloudError
from tests.cloud.cloud import Cloud
from tests.cloud.conftest import MakeSession

TODAY = dt.datetime.now(dt.UTC).date().isoformat()
BASE = """\
submitter: ExampleLab
benchmarks: [{name: tiny-bert, backend: "null", scenarios: [Offline]}]
cloud:
"""


@pytest.fixture
def planned(cloud: Cloud, make_session: MakeSession) -> "Planned":
    """Plans for all instances of a cloud section, each in a session of its own."""
    return Planned(cloud, make_session)


class Planned:
    def __init__(self, cloud: Cloud, make_session: MakeSession) -> None:
        self.cloud, self._make, self._made = cloud, make_session, 0

    def __call__(self, section: str) -> Plan:
        self._made += 1
        text = BASE + "".join(f"  {line}\n" for line in section.splitlines())
        session, campaign = self._make(text, name=f"p{self._made}")
        assert campaign.cloud is not None
        return plan.make(session, campaign, [name for name, _ in campaign.cloud.hosts()])


ONE = "max_cost: 100\nlease_hours: 2\naddress: private\ninstances: [{name: g5, count: 3, types: [g5.xlarge]REST}]"


def only(rest: str = "") -> str:
    return ONE.replace("REST", rest)


def test_everything_is_known_before_and_nothing_is_made(planned: Planned) -> None:
    found = planned(only(", market: spot-then-on-demand"))
    (row,) = found.rows
    assert (row.vcpus, row.gpus, row.gpu, row.architecture) == (4, 1, "A10G", "x86_64")
    assert row.image.startswith("ami-")
    assert row.on_demand is not None
    assert (row.on_demand.usd_per_hour, row.on_demand.cited) == (1.006, f"pricing-api {TODAY}")
    assert set(row.spot) == set(row.zones)
    assert {price.cited for price in row.spot.values()} == {f"spot-history {TODAY}"}
    assert row.spot["us-east-1a"].usd_per_hour == pytest.approx(0.3521)
    assert {market: (quota.limit, quota.used) for market, quota in row.quotas.items()} == {
        "spot": (100_000, 0),
        "on-demand": (100_000, 0),
    }
    assert found.most_usd == pytest.approx(3 * 2 * (1.006 + table().besides(150, public=False)))
    assert (found.refusal, found.warnings) == ("", ())
    assert planned.cloud.counts() == {"instances": 0, "key_pairs": 0, "groups": 0, "volumes": 0}


def test_prices_are_asked_once_for_all_regions_and_kept(planned: Planned) -> None:
    both = only(", regions: [us-east-1, eu-west-1]")
    found = planned(both)
    assert [row.on_demand.usd_per_hour for row in found.rows if row.on_demand] == [1.006, 1.1066]
    assert planned.cloud.counted()["GetProducts"] == 1
    planned(both)
    assert planned.cloud.counted()["GetProducts"] == 1
    kept = json.loads(prices.cache_file().read_text())
    assert kept["on_demand"]["g5.xlarge"]["regions"]["us-east-1"] == 1.006


def test_a_plan_for_500_hosts_takes_the_calls_of_one(planned: Planned) -> None:
    planned(only().replace("count: 3", "count: 1"))
    prices.cache_file().unlink()
    once = planned.cloud.counted()
    planned.cloud.forget_calls()
    found = planned(only().replace("count: 3", "count: 500").replace("max_cost: 100", "max_cost: 5000"))
    assert len(found.hosts) == 500
    assert planned.cloud.counted() == once
    assert sum(once.values()) == 7


def test_what_runs_already_counts_against_the_quota(planned: Planned) -> None:
    planned.cloud.limit(16)
    ec2 = planned.cloud.client("ec2")
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    ec2.run_instances(ImageId=image, InstanceType="g5.xlarge", MinCount=2, MaxCount=2)
    found = planned(only())
    assert "the quota is too small for 1 of 3, of 4 vCPUs each: 8 of 16 vCPUs in use on-demand" in found.refusal
    assert "--desired-value 20" in found.hint
    assert planned("partial: true\n" + only()).refusal == ""


def test_without_the_pricing_api_the_table_is_used_and_said(planned: Planned) -> None:
    planned.cloud.fault("GetProducts", "AccessDeniedException", times=None)
    found = planned(only(", regions: [us-east-1, eu-west-1]"))
    cited = [row.on_demand.cited for row in found.rows if row.on_demand]
    assert cited == [f"table {table().date}", f"table of us-east-1 {table().date}"]
    assert any("get_products" in text and "AccessDenied" in text for text in found.warnings)


def test_without_quotas_and_spot_history_they_are_unknown(planned: Planned) -> None:
    planned.cloud.fault("GetServiceQuota|DescribeSpotPriceHistory", "AccessDeniedException", times=None)
    found = planned(only(", market: spot"))
    assert found.refusal == ""
    assert found.rows[0].quotas["spot"].limit is None
    assert found.rows[0].spot == {}
    assert found.price("g5.xlarge", "us-east-1", "us-east-1a", "spot").source == "at most pricing-api"


def test_an_unknown_type_and_one_that_the_region_lacks(planned: Planned) -> None:
    found = planned(only().replace("g5.xlarge", "g5.xlrage"))
    assert found.refusal == "cloud.instances g5: there is no g5.xlrage in us-east-1, did you mean g5.xlarge?"
    with pytest.raises(CloudError, match=r"did you mean g5\.xlarge"):
        found.check()


def test_an_unknown_image_names_the_nearest(planned: Planned) -> None:
    name = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-2404/latest/ami-id"
    with pytest.raises(CloudError, match=r"no image .*-2404.*did you mean .*gpu-ubuntu-24\.04/latest/ami-id\?"):
        planned(f"image_parameter: {name}\n{only()}")


def test_an_unknown_region_names_the_nearest(planned: Planned) -> None:
    with pytest.raises(CloudError, match="there is no region us-easst-1, did you mean us-east-1") as caught:
        planned(only(", regions: [us-easst-1]"))
    assert "us-west-2" in caught.value.hint


def test_without_credentials_it_says_so(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    planned.cloud.expire()
    with pytest.raises(CloudError, match="expired"):
        planned(only())
    planned.cloud.heal()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    clear_clients()
    with pytest.raises(CloudError, match="no AWS credentials"):
        planned(only())


def clear_clients() -> None:
    from fleet.cloud import aws

    aws.client.cache_clear()
    aws._session.cache_clear()


def test_a_cache_of_nonsense_changes_nothing(planned: Planned) -> None:
    path = prices.cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"on_demand": {"g5.xlarge": {"at": "yesterday"}}}')
    (row,) = planned(only()).rows
    assert row.on_demand is not None
    assert row.on_demand.usd_per_hour == 1.006
