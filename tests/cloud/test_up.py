"""`up` against moto: what is asked of EC2, in which order, and what the ledger says afterwards."""

import base64
import email
import time
from typing import Any

import pytest

from fleet.cloud import arrivals, keys, leases, user_data
from fleet.cloud.leases import LeaseState
from fleet.cloud.up import up
from fleet.errors import CloudError
from fleet.watch import Silent
from tests.cloud.cloud import Cloud
from tests.cloud.conftest import MakeSession
from tests.cloud.launching import HOSTS, Beside, entry, launched, nothing, quick, running, text, until

pytestmark = pytest.mark.usefixtures(quick.__name__)


def tags(parameters: dict[str, str]) -> dict[str, dict[str, str]]:
    """Resource type to the tags that a call gives it."""
    found: dict[str, dict[str, str]] = {}
    number = 1
    while kind := parameters.get(f"TagSpecification.{number}.ResourceType"):
        found[kind] = {}
        tag = 1
        while key := parameters.get(f"TagSpecification.{number}.Tag.{tag}.Key"):
            found[kind][key] = parameters[f"TagSpecification.{number}.Tag.{tag}.Value"]
            tag += 1
        number += 1
    return found


def test_one_call_launches_all_with_everything_that_keeps_them_in_hand(cloud: Cloud, make_session: MakeSession) -> None:
    session, read = make_session(text(owner="me@example.org", lease_hours=2))
    before = time.time()
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    (call,), (lease,) = cloud.calls("RunInstances"), leases.read(session)
    said: dict[str, Any] = call["parameters"]
    assert said["ClientToken"] == lease.id
    assert said["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert said["MetadataOptions.HttpTokens"] == "required"
    assert said["BlockDeviceMapping.1.Ebs.Encrypted"] == "true"
    assert said["BlockDeviceMapping.1.Ebs.DeleteOnTermination"] == "true"
    assert said["BlockDeviceMapping.1.DeviceName"] == lease.root_device
    assert said["NetworkInterface.1.DeleteOnTermination"] == "true"
    assert not [key for key in said if key.startswith("InstanceMarketOptions")]
    expected = {
        "Name": f"fleet-{session.token}",
        "mlperf-fleet:session": session.token,
        "mlperf-fleet:owner": "me@example.org",
        "mlperf-fleet:lease": lease.id,
        "mlperf-fleet:expires": leases.expiry_text(lease.expires_at),
    }
    assert tags(said) == dict.fromkeys(["instance", "volume", "network-interface"], expected)
    assert before + 7200 <= lease.expires_at <= time.time() + 7200
    assert lease.state is LeaseState.LAUNCHED
    assert (lease.usd_per_hour, lease.price_source.split()[0]) == (1.006, "pricing-api")
    assert sorted(launched(session).values()) == running(cloud)
    assert launched(session).keys() == set(HOSTS)


def test_a_spot_instance_ends_when_it_is_interrupted(cloud: Cloud, make_session: MakeSession) -> None:
    session, read = make_session(text(instances=entry(market="spot")))
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    (call,), (lease,) = cloud.calls("RunInstances"), leases.read(session)
    said = call["parameters"]
    assert said["InstanceMarketOptions.MarketType"] == "spot"
    assert said["InstanceMarketOptions.SpotOptions.SpotInstanceType"] == "one-time"
    assert said["InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior"] == "terminate"
    assert tags(said)["spot-instances-request"]["mlperf-fleet:lease"] == lease.id
    assert lease.market == "spot"
    assert lease.price_source.startswith("spot-history")


def test_user_data_arms_the_timer_of_this_lease_and_brings_the_sessions_host_key(
    cloud: Cloud, make_session: MakeSession
) -> None:
    session, read = make_session()
    up(session, read, Silent(), hosts=HOSTS)
    (call,), (lease,) = cloud.calls("RunInstances"), leases.read(session)
    data = base64.b64decode(call["parameters"]["UserData"])
    made = keys.ensure(session)
    assert data == user_data.make(made, expires_at=lease.expires_at, written_at=lease.written_at, user="ubuntu")
    hook = next(part for part in email.message_from_bytes(data).walk() if not part.is_multipart())
    assert f"expires={int(lease.expires_at)}" in str(hook.get_payload())
    assert cloud.instances()[0]["key"].split()[:2] == made.login_public.split()[:2]


def test_the_lease_is_on_disk_when_the_call_arrives(cloud: Cloud, make_session: MakeSession) -> None:
    session, read = make_session()
    cloud.delay("RunInstances", 2)
    with Beside(lambda: up(session, read, Silent(), hosts=HOSTS)):
        (call,) = until(lambda: cloud.calls("RunInstances"))
        (lease,) = leases.read(session)
        assert call.get("status") is None
        assert lease.state is LeaseState.INTENDED
        assert lease.id == call["parameters"]["ClientToken"]
        assert lease.hosts == HOSTS
        assert keys.known() == [(session.token, session.root)]
    assert launched(session).keys() == set(HOSTS)


def test_everything_is_planned_and_found_before_anything_is_made(cloud: Cloud, make_session: MakeSession) -> None:
    session, read = make_session()
    up(session, read, Silent(), hosts=HOSTS)
    order = [call["action"] for call in cloud.calls()]
    making = [order.index(name) for name in ("ImportKeyPair", "CreateSecurityGroup", "RunInstances")]
    asking = [order.index(name) for name in ("GetProducts", "DescribeSubnets", "DescribeImages", "GetCallerIdentity")]
    assert max(asking) < min(making)
    assert making == sorted(making)
    assert (session.cloud / "plan.json").is_file()


def test_the_same_again_launches_nothing(cloud: Cloud, make_session: MakeSession) -> None:
    session, read = make_session()
    up(session, read, Silent(), hosts=HOSTS)
    before = launched(session)
    cloud.forget_calls()
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    assert launched(session) == before
    assert set(cloud.counted()) == {"DescribeInstances"}


def test_only_the_hosts_that_are_asked_for(cloud: Cloud, make_session: MakeSession) -> None:
    session, read = make_session()
    assert up(session, read, Silent(), hosts=[]) == {}
    assert cloud.calls() == []
    assert up(session, read, Silent(), hosts=["g5-2", "of-no-entry"]) == {}
    assert launched(session).keys() == {"g5-2"}
    up(session, read, Silent(), hosts=HOSTS)
    assert launched(session).keys() == set(HOSTS)
    assert sorted(launched(session).values()) == running(cloud)


def test_an_instance_that_ended_is_replaced_and_its_lease_says_why(cloud: Cloud, make_session: MakeSession) -> None:
    session, read = make_session(text(instances=entry(market="spot")))
    up(session, read, Silent(), hosts=HOSTS)
    before = launched(session)
    cloud.end(before["g5-2"])
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    after = launched(session)
    assert {host for host in HOSTS if before[host] != after[host]} == {"g5-2"}
    first, second = leases.read(session)
    ended = next(leased for leased in first.instances if leased.host == "g5-2")
    assert ended.cause == "spot interruption"
    assert ended.ended_at is not None
    assert second.hosts == ("g5-2",)
    assert sorted(after.values()) == running(cloud)


def test_instances_are_awaited_until_they_run(cloud: Cloud, make_session: MakeSession) -> None:
    session, read = make_session()
    cloud.slow(pending_s=1)
    up(session, read, Silent(), hosts=HOSTS)
    assert {one["state"] for one in cloud.instances()} == {"running"}
    assert all(leased.private_address for _, leased in leases.live(leases.read(session)).values())


def test_what_ends_before_it_runs_is_sought_elsewhere(cloud: Cloud, make_session: MakeSession) -> None:
    session, read = make_session()
    cloud.slow(pending_s=3)
    with Beside(lambda: up(session, read, Silent(), hosts=HOSTS)) as bringing:
        first = until(lambda: [one["id"] for one in cloud.instances()])
        cloud.slow(pending_s=0)
        cloud.end(first[0], "Server.InsufficientInstanceCapacity", "no capacity after all")
    assert bringing.came == {}
    zones = [lease.zone for lease in leases.read(session)]
    assert zones == ["us-east-1a", "us-east-1b"]
    assert sorted(launched(session).values()) == running(cloud)
    assert len(running(cloud)) == 3


def test_what_never_runs_is_ended_and_named(
    cloud: Cloud, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals, "ARRIVE_S", 0.5)
    session, read = make_session()
    cloud.slow(pending_s=3600)
    with pytest.raises(CloudError, match=r"3 of 3 instances cannot be had: g5-\[1-3\]") as caught:
        up(session, read, Silent(), hosts=HOSTS)
    assert "did not run with an address" in caught.value.message
    assert nothing(cloud)


def test_new_instances_may_be_unknown_for_a_while(cloud: Cloud, make_session: MakeSession) -> None:
    session, read = make_session()
    cloud.slow(hidden_calls=3)
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    assert sorted(launched(session).values()) == running(cloud)
    assert len(running(cloud)) == 3
    assert cloud.counted()["RunInstances"] == 1


def test_an_image_of_ones_own_is_named_by_a_parameter(cloud: Cloud, make_session: MakeSession) -> None:
    image = cloud.client("ec2").describe_images(Filters=[{"Name": "architecture", "Values": ["x86_64"]}])["Images"][0]
    cloud.client("ssm").put_parameter(Name="/ours/image", Value=image["ImageId"], Type="String")
    session, read = make_session(text(image_parameter="/ours/image", volume_gib=33))
    up(session, read, Silent(), hosts=HOSTS)
    (lease,) = leases.read(session)
    assert lease.image == image["ImageId"]
    assert lease.volume_gib >= 33


@pytest.mark.parametrize(
    ("types", "parameter", "cause"),
    [
        (["g5.xlarge"], "/nobody/knows", "no image /nobody/knows in us-east-1"),
        (["g5g.xlarge"], "/ours/x86", "image /ours/x86 in us-east-1 is for x86_64, and g5g.xlarge is arm64"),
    ],
)
def test_an_image_that_does_not_fit_stops_before_anything_is_made(
    cloud: Cloud, make_session: MakeSession, types: list[str], parameter: str, cause: str
) -> None:
    image = cloud.client("ec2").describe_images(Filters=[{"Name": "architecture", "Values": ["x86_64"]}])["Images"][0]
    cloud.client("ssm").put_parameter(Name="/ours/x86", Value=image["ImageId"], Type="String")
    prices = {"g5g.xlarge": 0.42}
    session, read = make_session(text(instances=entry(types=types), image_parameter=parameter, prices=prices))
    with pytest.raises(CloudError) as caught:
        up(session, read, Silent(), hosts=HOSTS)
    assert caught.value.message.startswith(cause)
    assert "image_parameter" in caught.value.hint
    assert cloud.calls("ImportKeyPair") == []
    assert nothing(cloud)
