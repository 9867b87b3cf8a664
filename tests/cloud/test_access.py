"""How instances are reached: networks, addresses, and a key pair and a group that are this session's and nobody else's."""

import http.server
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Any

import pytest

from fleet.cloud import caller, keys, leases
from fleet.cloud.up import up
from fleet.errors import CloudError
from fleet.session import Session
from fleet.watch import Silent
from tests.cloud.cloud import Cloud
from tests.cloud.conftest import MakeSession
from tests.cloud.launching import HOSTS, launched, nothing, quick, running, text

pytestmark = pytest.mark.usefixtures(quick.__name__)


def group(cloud: Cloud, session: Session) -> dict[str, Any]:
    named = [{"Name": "group-name", "Values": [f"fleet-{session.token}"]}]
    (found,) = cloud.client("ec2").describe_security_groups(Filters=named)["SecurityGroups"]
    return dict(found)


def let_in(cloud: Cloud, session: Session) -> list[tuple[str, int, int, list[str]]]:
    return [
        (rule["IpProtocol"], rule["FromPort"], rule["ToPort"], [found["CidrIp"] for found in rule["IpRanges"]])
        for rule in group(cloud, session)["IpPermissions"]
    ]


def test_key_pair_and_group_carry_the_sessions_tags_from_the_creating_call(
    cloud: Cloud, make_session: MakeSession
) -> None:
    session, read = make_session()
    up(session, read, Silent(), hosts=HOSTS)
    for action in ("ImportKeyPair", "CreateSecurityGroup"):
        (call,) = cloud.calls(action)
        said = {value for key, value in call["parameters"].items() if key.startswith("TagSpecification")}
        assert {session.token, "mlperf-fleet:session", "mlperf-fleet:owner", "mlperf-fleet:expires"} <= said
    assert let_in(cloud, session) == [("tcp", 22, 22, ["203.0.113.7/32"])]
    assert cloud.calls("CreateTags") == []


def test_ssh_comes_from_this_machines_own_address(
    cloud: Cloud, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller, "CHECKIP", cloud.checkip)
    cloud.come_from("198.51.100.9")
    session, read = make_session(text(without=("ssh_from", "address")))
    up(session, read, Silent(), hosts=HOSTS)
    assert let_in(cloud, session) == [("tcp", 22, 22, ["198.51.100.9/32"])]
    (call,) = cloud.calls("RunInstances")
    assert call["parameters"]["NetworkInterface.1.AssociatePublicIpAddress"] == "true"
    assert all(leased.public_address for _, leased in leases.live(leases.read(session)).values())
    # Another network, another address: the old one is shut out.
    cloud.come_from("198.51.100.10")
    cloud.end(launched(session)["g5-1"])
    up(session, read, Silent(), hosts=HOSTS)
    assert let_in(cloud, session) == [("tcp", 22, 22, ["198.51.100.10/32"])]
    assert len(running(cloud)) == 3


def test_an_address_that_nobody_tells_is_asked_of_the_user(
    cloud: Cloud, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller, "CHECKIP", f"{cloud.url}/_lab/nothing-there")
    session, read = make_session(text(without=("ssh_from", "address")))
    with pytest.raises(CloudError, match="does not say where ssh will come from") as caught:
        up(session, read, Silent(), hosts=HOSTS)
    assert "cloud.ssh_from" in caught.value.hint
    assert cloud.calls("RunInstances") == []
    assert nothing(cloud)


def test_what_goes_on_is_no_leftover(cloud: Cloud, make_session: MakeSession) -> None:
    """Key pair and group of an outing that goes on get the later expiry, so that nobody reaps them."""
    session, read = make_session()
    up(session, read, Silent(), hosts=["g5-1"])
    old = "2020-01-01T00:00:00Z"
    ec2 = cloud.client("ec2")
    ec2.create_tags(Resources=[group(cloud, session)["GroupId"]], Tags=[{"Key": "mlperf-fleet:expires", "Value": old}])
    up(session, read, Silent(), hosts=HOSTS)
    (expires,) = [tag["Value"] for tag in group(cloud, session)["Tags"] if tag["Key"] == "mlperf-fleet:expires"]
    assert expires > "2026"
    assert len(ec2.describe_key_pairs()["KeyPairs"]) == 1


def test_a_colleague_in_the_same_rule_goes_and_the_caller_stays(cloud: Cloud, make_session: MakeSession) -> None:
    """EC2 shows all sources of a port as one rule."""
    session, read = make_session()
    up(session, read, Silent(), hosts=["g5-1"])
    cloud.client("ec2").authorize_security_group_ingress(
        GroupId=group(cloud, session)["GroupId"], IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp="198.51.100.9/32"
    )
    assert [sources for *_, sources in let_in(cloud, session)] == [["203.0.113.7/32", "198.51.100.9/32"]]
    up(session, read, Silent(), hosts=HOSTS)
    assert let_in(cloud, session) == [("tcp", 22, 22, ["203.0.113.7/32"])]


@pytest.mark.parametrize("what", ["key pair", "security group"])
def test_what_is_not_this_sessions_is_not_touched(cloud: Cloud, make_session: MakeSession, what: str) -> None:
    session, read = make_session()
    ec2 = cloud.client("ec2")
    name = f"fleet-{session.token}"
    if what == "key pair":
        ec2.create_key_pair(KeyName=name)
    else:
        ec2.create_security_group(GroupName=name, Description="somebody's")
    with pytest.raises(CloudError, match=f"{what} {name} in us-east-1 is there and is not this session's"):
        up(session, read, Silent(), hosts=HOSTS)
    assert cloud.calls("RunInstances") == []
    assert nothing(cloud)
    kept = ec2.describe_key_pairs()["KeyPairs"] if what == "key pair" else [group(cloud, session)]
    assert len(kept) == 1


@pytest.mark.parametrize("action", ["ImportKeyPair", "CreateSecurityGroup", "AuthorizeSecurityGroupIngress"])
def test_an_answer_that_was_lost_makes_nothing_twice(cloud: Cloud, make_session: MakeSession, action: str) -> None:
    cloud.lose(action)
    session, read = make_session()
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    assert cloud.counts() == {**cloud.counts(), "key_pairs": 1, "groups": 1, "instances": 3}
    assert let_in(cloud, session) == [("tcp", 22, 22, ["203.0.113.7/32"])]


def test_a_key_pair_whose_private_half_is_lost_is_replaced(cloud: Cloud, make_session: MakeSession) -> None:
    session, read = make_session()
    up(session, read, Silent(), hosts=["g5-1"])
    keys.forget(session)
    up(session, read, Silent(), hosts=HOSTS)
    (pair,) = cloud.client("ec2").describe_key_pairs(IncludePublicKey=True)["KeyPairs"]
    assert pair["PublicKey"].split()[1] == keys.ensure(session).login_public.split()[1]


def test_no_default_vpc(cloud: Cloud, make_session: MakeSession) -> None:
    cloud.no_default_vpc()
    session, read = make_session()
    with pytest.raises(CloudError, match="no default VPC in us-east-1") as caught:
        up(session, read, Silent(), hosts=HOSTS)
    assert "cloud.subnets: {us-east-1a: subnet-" in caught.value.hint
    assert cloud.calls("RunInstances") == []
    assert nothing(cloud)
    assert keys.known() == []


@pytest.fixture
def subnets(cloud: Cloud) -> dict[str, str]:
    """Two subnets of a VPC of one's own, and no default VPC."""
    cloud.no_default_vpc()
    ec2 = cloud.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    return {
        zone: ec2.create_subnet(VpcId=vpc, CidrBlock=block, AvailabilityZone=zone)["Subnet"]["SubnetId"]
        for zone, block in (("us-east-1b", "10.9.1.0/24"), ("us-east-1c", "10.9.2.0/24"))
    }


def test_subnets_of_ones_own(cloud: Cloud, make_session: MakeSession, subnets: dict[str, str]) -> None:
    cloud.capacity("g5.xlarge", 1, zone="us-east-1b")
    session, read = make_session(text(subnets=subnets))
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    assert {(lease.zone, lease.subnet) for lease in leases.read(session) if lease.instances} == set(subnets.items())
    found = [leased for _, leased in leases.live(leases.read(session)).values()]
    assert all(leased.private_address.startswith("10.9.") for leased in found)
    assert not any(leased.public_address for leased in found)


def test_subnets_that_are_not_there_or_elsewhere(
    cloud: Cloud, make_session: MakeSession, subnets: dict[str, str]
) -> None:
    wrong = {
        "there is no subnet subnet-0123 in us-east-1": {"us-east-1b": "subnet-0123"},
        f"subnet {subnets['us-east-1b']} is in us-east-1b, not in us-east-1a": {"us-east-1a": subnets["us-east-1b"]},
    }
    for number, (said, given) in enumerate(wrong.items()):
        session, read = make_session(text(subnets=given), f"s{number}")
        with pytest.raises(CloudError, match=said) as caught:
            up(session, read, Silent(), hosts=HOSTS)
        assert "cloud.subnets" in caught.value.hint
    assert cloud.calls("RunInstances") == []
    assert nothing(cloud)


class Metadata(http.server.BaseHTTPRequestHandler):
    """An instance metadata service that wants its token."""

    vpc = ""

    def do_PUT(self) -> None:
        self._say("the-token" if self.headers.get("X-aws-ec2-metadata-token-ttl-seconds") else "")

    def do_GET(self) -> None:
        answers = {
            "/latest/meta-data/mac": "0e:00",
            "/latest/meta-data/network/interfaces/macs/0e:00/vpc-id": self.vpc,
            "/latest/meta-data/local-ipv4": "172.31.77.7",
        }
        self._say(answers.get(self.path, "") if self.headers.get("X-aws-ec2-metadata-token") == "the-token" else "")

    def _say(self, text: str) -> None:
        self.send_response(200 if text else 401)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Metadata]]:
    class Handler(Metadata):
        pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    yield Handler
    server.shutdown()
    server.server_close()


def test_within_the_vpc_no_public_address_is_needed(
    cloud: Cloud, make_session: MakeSession, metadata: type[Metadata]
) -> None:
    defaults = cloud.client("ec2").describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    metadata.vpc = defaults[0]["VpcId"]
    assert caller.here() == caller.Here(vpc=metadata.vpc, address=IPv4Address("172.31.77.7"))
    session, read = make_session(text(without=("ssh_from", "address")))
    up(session, read, Silent(), hosts=HOSTS)
    assert let_in(cloud, session) == [("tcp", 22, 22, ["172.31.77.7/32"])]
    (call,) = cloud.calls("RunInstances")
    assert "NetworkInterface.1.AssociatePublicIpAddress" not in call["parameters"]
    assert not any(leased.public_address for _, leased in leases.live(leases.read(session)).values())


def test_an_instance_elsewhere_comes_from_outside(
    cloud: Cloud, make_session: MakeSession, metadata: type[Metadata], monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata.vpc = "vpc-of-somebody"
    monkeypatch.setattr(caller, "CHECKIP", cloud.checkip)
    session, read = make_session(text(without=("ssh_from", "address")))
    up(session, read, Silent(), hosts=HOSTS)
    assert let_in(cloud, session) == [("tcp", 22, 22, ["203.0.113.7/32"])]


def test_without_a_metadata_service_this_is_no_instance(
    metadata: type[Metadata], monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata.vpc = "vpc-1"
    assert caller.here() is not None
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert caller.here() is None
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    assert caller.here() is None
