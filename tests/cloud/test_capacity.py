"""Where there is not enough: each error by its own rule, partial fleets, and everything taken back where those are not wanted."""

from typing import Any

import pytest

from fleet.cloud import keys, leases
from fleet.cloud.hosts import planned
from fleet.cloud.leases import LeaseState
from fleet.cloud.up import up
from fleet.errors import CloudError, ExitCode, LeakError
from fleet.handoff import Plan
from fleet.watch import Silent
from tests.cloud.cloud import Cloud
from tests.cloud.conftest import MakeSession
from tests.cloud.launching import HOSTS, entry, launched, nothing, places, quick, running, text

pytestmark = pytest.mark.usefixtures(quick.__name__)

ZONE_B = "g5.xlarge on-demand us-east-1b"


def test_what_one_zone_lacks_comes_from_the_next(cloud: Cloud, make_session: MakeSession) -> None:
    cloud.capacity("g5.xlarge", 1, zone="us-east-1a")
    session, read = make_session()
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    assert places(session) == ["g5.xlarge on-demand us-east-1a", ZONE_B, ZONE_B]
    # One came, then the same zone was asked for the others and said why not.
    assert [(lease.zone[-1], lease.state.value, lease.code) for lease in leases.read(session)] == [
        ("a", "launched", ""),
        ("a", "refused", "InsufficientInstanceCapacity"),
        ("b", "launched", ""),
    ]


@pytest.mark.parametrize(
    ("code", "market", "expected"),
    [
        ("InsufficientInstanceCapacity", "on-demand", ZONE_B),
        ("InsufficientFreeAddressesInSubnet", "on-demand", ZONE_B),
        ("Unsupported", "on-demand", ZONE_B),
        ("VcpuLimitExceeded", "on-demand", "g5.xlarge on-demand us-west-2a"),
        ("VcpuLimitExceeded", "spot-then-on-demand", "g5.xlarge spot us-west-2a"),
        ("MaxSpotInstanceCountExceeded", "spot-then-on-demand", "g5.xlarge spot us-west-2a"),
        (
            "AuthFailure.ServiceLinkedRoleCreationNotPermitted",
            "spot-then-on-demand",
            "g5.xlarge spot us-west-2a",
        ),
        ("SpotMaxPriceTooLow", "spot-then-on-demand", "g5.xlarge on-demand us-east-1a"),
    ],
)
def test_each_refusal_has_its_rule(
    cloud: Cloud, make_session: MakeSession, code: str, market: str, expected: str
) -> None:
    cloud.fault("RunInstances", code)
    session, read = make_session(text(instances=entry(market=market), regions=["us-east-1", "us-west-2"]))
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    assert places(session) == [expected] * 3
    assert cloud.counted()["RunInstances"] == 2
    assert sorted(launched(session).values()) == running(cloud)


def test_spot_falls_back_to_on_demand_and_then_to_the_next_type(cloud: Cloud, make_session: MakeSession) -> None:
    cloud.capacity("g5.xlarge", 1, market="spot")
    cloud.capacity("g5.xlarge", 1, market="on-demand")
    cloud.capacity("g6.xlarge", 0, market="spot")
    kinds = ["g5.xlarge", "g6.xlarge"]
    session, read = make_session(text(instances=entry(types=kinds, market="spot-then-on-demand")))
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    assert [place.rpartition(" ")[0] for place in places(session)] == [
        "g5.xlarge spot",
        "g5.xlarge on-demand",
        "g6.xlarge on-demand",
    ]


def test_zones_are_tried_in_the_order_of_the_campaign(cloud: Cloud, make_session: MakeSession) -> None:
    cloud.capacity("g5.xlarge", 2, zone="us-east-1c")
    session, read = make_session(text(instances=entry(zones=["us-east-1c", "us-east-1a"])))
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    assert [place[-1] for place in places(session)] == ["c", "c", "a"]


@pytest.mark.parametrize("code", ["RequestLimitExceeded", "InvalidGroup.NotFound", "InvalidKeyPair.NotFound"])
def test_what_came_too_soon_is_asked_again_with_the_same_token(
    cloud: Cloud, make_session: MakeSession, code: str
) -> None:
    cloud.fault("RunInstances", code, times=5)
    session, read = make_session()
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    assert len(leases.read(session)) == 1
    assert len({call["parameters"]["ClientToken"] for call in cloud.calls("RunInstances")}) == 1
    assert len(running(cloud)) == 3


@pytest.mark.parametrize(
    ("code", "hint"),
    [("UnauthorizedOperation", "docs/cloud.md"), ("InvalidAMIID.NotFound", ""), ("SomethingNew", "")],
)
def test_what_nobody_has_thought_of_takes_everything_back(
    cloud: Cloud, make_session: MakeSession, code: str, hint: str
) -> None:
    cloud.fault("RunInstances", code, times=None, match={"InstanceType": "g6.xlarge"})
    instances = [*entry(count=2), {"name": "g6", "count": 1, "types": ["g6.xlarge"]}]
    session, read = make_session(text(instances=instances))
    with pytest.raises(CloudError, match=code) as caught:
        up(session, read, Silent(), hosts=["g5-1", "g5-2", "g6-1"])
    assert hint in caught.value.hint
    assert caught.value.exit_code is ExitCode.ERROR
    assert len(cloud.instances()) == 2
    assert nothing(cloud)
    assert keys.known() == []
    assert {lease.state for lease in leases.read(session)} == {LeaseState.ENDED, LeaseState.REFUSED}


def test_fewer_than_wanted_are_taken_back(cloud: Cloud, make_session: MakeSession) -> None:
    cloud.capacity("g5.xlarge", 2)
    session, read = make_session()
    with pytest.raises(CloudError, match="1 of 3 instances cannot be had: g5-3: ") as caught:
        up(session, read, Silent(), hosts=HOSTS)
    assert "sufficient g5.xlarge capacity" in caught.value.message
    assert "cloud.partial: true" in caught.value.hint
    assert len(cloud.instances()) == 2
    assert nothing(cloud)


def test_a_partial_fleet_goes_on_with_what_came(cloud: Cloud, make_session: MakeSession) -> None:
    cloud.capacity("g5.xlarge", 2)
    session, read = make_session(text(partial=True))
    causes = up(session, read, Silent(), hosts=HOSTS)
    assert causes.keys() == {"g5-3"}
    assert "sufficient g5.xlarge capacity" in causes["g5-3"]
    assert launched(session).keys() == {"g5-1", "g5-2"}
    assert len(running(cloud)) == 2


def test_a_partial_fleet_of_nothing_is_none(cloud: Cloud, make_session: MakeSession) -> None:
    cloud.capacity("g5.xlarge", 0)
    session, read = make_session(text(partial=True))
    with pytest.raises(CloudError, match="3 of 3 instances cannot be had"):
        up(session, read, Silent(), hosts=HOSTS)
    assert nothing(cloud)


def test_once_units_were_handed_out_nothing_is_taken_back_for_want_of_one(
    cloud: Cloud, make_session: MakeSession
) -> None:
    session, read = make_session()
    up(session, read, Silent(), hosts=HOSTS[:2])
    before = running(cloud)
    session.write(session.run / "plan.json", Plan(quick=True, units=()))
    cloud.capacity("g5.xlarge", 0)
    causes = up(session, read, Silent(), hosts=HOSTS)
    assert "sufficient g5.xlarge capacity" in causes["g5-3"]
    assert running(cloud) == before
    # The same where AWS gives another refusal than that there are none, and where the plan does.
    cloud.fault("RunInstances", "UnauthorizedOperation", times=None)
    cloud.capacity("g5.xlarge", 9)
    assert "UnauthorizedOperation" in up(session, read, Silent(), hosts=HOSTS)["g5-3"]
    assert read.cloud
    dear = read.model_copy(update={"cloud": read.cloud.model_copy(update={"max_cost": 0.01})})
    assert "max_cost" in up(session, dear, Silent(), hosts=HOSTS)["g5-3"]
    assert running(cloud) == before
    assert [host.missing for host in planned(session, read)][:2] == ["", ""]
    # EC2 that does not answer is an error, not hosts that run.
    cloud.fault("DescribeInstances", "UnauthorizedOperation", times=None)
    with pytest.raises(CloudError, match="UnauthorizedOperation"):
        up(session, read, Silent(), hosts=HOSTS[:2])
    cloud.heal()
    assert running(cloud) == before


def test_a_host_that_was_not_asked_for_any_more_says_why(cloud: Cloud, make_session: MakeSession) -> None:
    """Both entries want the same type: what the first was refused the second does not ask for again."""
    cloud.fault("RunInstances", "VcpuLimitExceeded", times=None, match={"InstanceType": "g5.xlarge"})
    instances = [*entry(count=1), {"name": "more", "count": 1, "types": ["g5.xlarge"]}]
    instances.append({"name": "g6", "count": 1, "types": ["g6.xlarge"], "market": "spot"})
    session, read = make_session(text(instances=instances, partial=True))
    causes = up(session, read, Silent(), hosts=["g5-1", "more-1", "g6-1"])
    assert causes.keys() == {"g5-1", "more-1"}
    there = {host.name: host.missing for host in planned(session, read)}
    assert "VcpuLimitExceeded" in there["g5-1"]
    assert there["more-1"] == causes["more-1"]
    assert there["g6-1"] == ""


def test_what_cannot_be_taken_back_is_named_and_is_exit_4(cloud: Cloud, make_session: MakeSession) -> None:
    cloud.fault("RunInstances", "UnauthorizedOperation", times=None, match={"InstanceType": "g6.xlarge"})
    cloud.fault("TerminateInstances", "UnauthorizedOperation", times=None)
    instances = [*entry(count=2), {"name": "g6", "count": 1, "types": ["g6.xlarge"]}]
    session, read = make_session(text(instances=instances))
    with pytest.raises(LeakError) as caught:
        up(session, read, Silent(), hosts=["g5-1", "g5-2", "g6-1"])
    assert caught.value.exit_code is ExitCode.LEAK
    assert all(one in caught.value.message for one in running(cloud))
    assert "run_instances" in caught.value.message
    assert "fleet down" in caught.value.hint
    assert keys.known() == [(session.token, session.root)]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("the price is above the limit", {"max_cost": 1}, r"this can cost \$[0-9.]+ .* cloud.max_cost is \$1.00"),
    ("no such region", {"regions": ["us-east-9"]}, "there is no region us-east-9"),
    ("no such type", {"instances": entry(types=["g5.xlagre"])}, "did you mean g5.xlarge"),
    ("not in these zones", {"instances": entry(zones=["us-east-1z"])}, "of the zones named none offers g5.xlarge"),
]


@pytest.mark.parametrize(("cloud_section", "said"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
def test_a_plan_that_is_refused_launches_nothing(
    cloud: Cloud, make_session: MakeSession, cloud_section: dict[str, Any], said: str
) -> None:
    session, read = make_session(text(**cloud_section))
    with pytest.raises(CloudError, match=said) as caught:
        up(session, read, Silent(), hosts=HOSTS)
    assert caught.value.hint
    made = {"RunInstances", "ImportKeyPair", "CreateSecurityGroup"} & set(cloud.counted())
    assert made == set()
    assert keys.known() == []
    assert leases.read(session) == ()


def test_a_quota_that_is_too_small_launches_nothing(cloud: Cloud, make_session: MakeSession) -> None:
    cloud.limit(8)
    session, read = make_session()
    with pytest.raises(CloudError, match="the quota is too small for 1 of 3, of 4 vCPUs each"):
        up(session, read, Silent(), hosts=HOSTS)
    assert cloud.calls("RunInstances") == []
    assert nothing(cloud)


def test_no_credentials(cloud: Cloud, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    session, read = make_session()
    with pytest.raises(CloudError, match="no AWS credentials") as caught:
        up(session, read, Silent(), hosts=HOSTS)
    assert "aws configure" in caught.value.hint
    assert cloud.calls() == []


def test_credentials_that_expire_in_the_middle_are_said_and_what_runs_is_named(
    cloud: Cloud, make_session: MakeSession
) -> None:
    cloud.fault("DescribeInstances", "RequestExpired", times=None, match={"Filter.1.Name": "tag:mlperf-fleet:session"})
    cloud.fault("TerminateInstances", "RequestExpired", times=None)
    session, read = make_session()
    with pytest.raises(LeakError) as caught:
        up(session, read, Silent(), hosts=HOSTS)
    assert all(one in caught.value.message for one in running(cloud))
    cloud.heal()
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    assert sorted(launched(session).values()) == running(cloud)
    assert len(running(cloud)) == 3
