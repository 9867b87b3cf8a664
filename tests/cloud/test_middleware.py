"""The layer before moto does what EC2 does and moto does not: each behaviour as boto3 sees it."""

import json
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.exceptions import ClientError, ConnectionClosedError, HTTPClientError

from fleet.cloud import aws
from fleet.errors import CloudError
from tests.cloud import supplied
from tests.cloud.cloud import KEY, Cloud
from tests.cloud.conftest import MakeSession

if TYPE_CHECKING:
    from collections.abc import Callable

TAGS = [{"Key": "mlperf-fleet:lease", "Value": "lease-1"}]
PARAMETER = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"


def image(cloud: Cloud, region: str = "us-east-1") -> str:
    found: str = cloud.client("ssm", region).get_parameter(Name=PARAMETER)["Parameter"]["Value"]
    return found


def launch(cloud: Cloud, count: int = 1, *, ec2: Any = None, **more: Any) -> list[str]:
    """Run instances with our tag; their ids."""
    asked: dict[str, Any] = {
        "ImageId": image(cloud), "InstanceType": "g5.xlarge", "MinCount": 1, "MaxCount": count,
        "TagSpecifications": [{"ResourceType": sort, "Tags": TAGS} for sort in ("instance", "volume")], **more,
    }  # fmt: skip
    answer = (ec2 or cloud.client("ec2")).run_instances(**asked)
    return [one["InstanceId"] for one in answer["Instances"]]


def code(excinfo: pytest.ExceptionInfo[ClientError]) -> str:
    found: str = excinfo.value.response["Error"]["Code"]
    return found


def states(cloud: Cloud, **asked: Any) -> dict[str, str]:
    pages = cloud.client("ec2").get_paginator("describe_instances").paginate(**asked)
    return {
        one["InstanceId"]: one["State"]["Name"]
        for page in pages
        for reservation in page["Reservations"]
        for one in reservation["Instances"]
    }


def test_every_call_is_logged_with_its_parameters(cloud: Cloud) -> None:
    cloud.client("ec2", "eu-west-1").describe_instances(MaxResults=7)
    cloud.client("sts").get_caller_identity()
    cloud.client("s3").create_bucket(Bucket="results")
    seen = [(call["service"], call["region"], call["action"], call["status"]) for call in cloud.calls()]
    assert seen == [
        ("ec2", "eu-west-1", "DescribeInstances", 200),
        ("sts", "us-east-1", "GetCallerIdentity", 200),
        ("s3", "us-east-1", "PUT", 200),
    ]
    assert cloud.calls("DescribeInstances")[0]["parameters"]["MaxResults"] == "7"
    assert cloud.counted()["DescribeInstances"] == 1
    cloud.forget_calls()
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("InsufficientInstanceCapacity", 500),
        ("VcpuLimitExceeded", 400),
        ("MaxSpotInstanceCountExceeded", 400),
        ("SpotMaxPriceTooLow", 400),
        ("UnauthorizedOperation", 403),
        ("RequestLimitExceeded", 503),
    ],
)
def test_ec2_refuses_as_often_as_it_was_asked_to(cloud: Cloud, said: str, status: int) -> None:
    cloud.fault("RunInstances", said, match={"InstanceType": r"^g5\."}, times=1, message="so it is")
    with pytest.raises(ClientError, match="so it is") as refused:
        launch(cloud)
    assert code(refused) == said
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    assert len(launch(cloud)) == 1
    assert cloud.counts()["instances"] == 1


def test_a_fault_matches_parameters_skips_and_lasts(cloud: Cloud) -> None:
    cloud.fault("RunInstances", "VcpuLimitExceeded", match={"InstanceType": r"^g6\."}, times=None)
    cloud.fault("DescribeVpcs", "InternalError", skip=1)
    launch(cloud)
    for _ in range(2):
        with pytest.raises(ClientError):
            launch(cloud, InstanceType="g6.xlarge")
    ec2 = cloud.client("ec2")
    ec2.describe_vpcs()
    with pytest.raises(ClientError):
        ec2.describe_vpcs()
    cloud.fault("DescribeSubnets", "InternalError", times=None, seconds=1)
    with pytest.raises(ClientError):
        ec2.describe_subnets()
    time.sleep(1)
    ec2.describe_subnets()
    cloud.heal()
    launch(cloud, InstanceType="g6.xlarge")


def test_each_protocol_has_its_own_words_for_expired_credentials(cloud: Cloud) -> None:
    cloud.expire()
    asked: dict[str, Callable[[Any], Any]] = {
        "ec2": lambda client: client.describe_instances(),
        "sts": lambda client: client.get_caller_identity(),
        "ssm": lambda client: client.get_parameter(Name=PARAMETER),
        "pricing": lambda client: client.get_products(ServiceCode="AmazonEC2"),
        "service-quotas": lambda client: client.list_service_quotas(ServiceCode="ec2"),
        "s3": lambda client: client.get_object(Bucket="results", Key="a"),
    }
    for service, ask in asked.items():
        with pytest.raises(ClientError) as refused:
            ask(cloud.client(service))
        assert code(refused) == ("RequestExpired" if service == "ec2" else "ExpiredTokenException")
    with pytest.raises(CloudError) as said:
        aws.client("ec2", "us-east-1").call("describe_instances")
    assert said.value.code in aws.EXPIRED


@pytest.mark.parametrize("status", [None, 500])
def test_an_answer_may_be_lost_though_the_call_was_carried_out(cloud: Cloud, status: int | None) -> None:
    cloud.lose("RunInstances", status=status)
    with pytest.raises((ClientError, ConnectionClosedError, HTTPClientError)):
        launch(cloud)
    assert cloud.counts()["instances"] == 1
    assert cloud.calls("RunInstances")[0]["lost"]


def test_the_same_token_makes_nothing_twice(cloud: Cloud) -> None:
    cloud.lose("RunInstances")
    with pytest.raises((ConnectionClosedError, HTTPClientError)):
        launch(cloud, 2, ClientToken="lease-1")
    first = launch(cloud, 2, ClientToken="lease-1")
    assert launch(cloud, 2, ClientToken="lease-1") == first
    assert set(cloud.standing()["instances"]) == set(first)
    assert len(first) == 2
    with pytest.raises(ClientError) as refused:
        launch(cloud, 3, ClientToken="lease-1")
    assert code(refused) == "IdempotentParameterMismatch"
    # botocore repeats a call that was cut by itself, with the token that it had
    cloud.lose("RunInstances", times=2)
    config = boto3.session.Config(retries={"total_max_attempts": 4, "mode": "standard"})
    ec2 = boto3.client("ec2", region_name="us-east-1", endpoint_url=cloud.url, config=config, **KEY)
    launch(cloud, 1, ec2=ec2, ClientToken="lease-2")
    assert cloud.counts()["instances"] == 3


def test_moto_itself_makes_it_twice(cloud: Cloud) -> None:
    cloud.tokens(idempotent=False)
    assert launch(cloud, ClientToken="lease-1") != launch(cloud, ClientToken="lease-1")
    assert cloud.counts()["instances"] == 2


def test_a_refused_call_does_not_spend_its_token(cloud: Cloud) -> None:
    cloud.fault("RunInstances", "InsufficientInstanceCapacity")
    with pytest.raises(ClientError):
        launch(cloud, ClientToken="lease-1")
    assert len(launch(cloud, ClientToken="lease-1")) == 1


def test_new_instances_are_not_seen_for_some_looks(cloud: Cloud) -> None:
    cloud.slow(hidden_calls=2)
    old = launch(cloud)
    with pytest.raises(ClientError) as blind:
        states(cloud, InstanceIds=old)
    assert code(blind) == "InvalidInstanceID.NotFound"
    assert states(cloud) == {}
    assert states(cloud) == {old[0]: "running"}
    cloud.slow(hidden_calls=0, hidden_s=1)
    new = launch(cloud)
    assert states(cloud, Filters=[{"Name": "tag:mlperf-fleet:lease", "Values": ["lease-1"]}]) == {old[0]: "running"}
    time.sleep(1)
    assert set(states(cloud)) == {*old, *new}


def test_starting_and_ending_take_their_time(cloud: Cloud) -> None:
    cloud.slow(pending_s=1, ending_s=1)
    made = launch(cloud)
    pending = [{"Name": "instance-state-name", "Values": ["pending"]}]
    assert states(cloud, Filters=pending) == {made[0]: "pending"}
    time.sleep(1)
    assert states(cloud) == {made[0]: "running"}
    cloud.client("ec2").terminate_instances(InstanceIds=made)
    assert states(cloud) == {made[0]: "shutting-down"}
    assert cloud.counts()["instances"] == 1
    time.sleep(1)
    assert states(cloud) == {made[0]: "terminated"}
    assert cloud.counts() == {"instances": 0, "key_pairs": 0, "groups": 0, "volumes": 0}


def test_starting_and_ending_may_take_looks(cloud: Cloud) -> None:
    cloud.slow(pending_calls=1, ending_calls=2)
    made = launch(cloud)
    assert [states(cloud)[made[0]] for _ in range(2)] == ["pending", "running"]
    cloud.client("ec2").terminate_instances(InstanceIds=made)
    assert [states(cloud)[made[0]] for _ in range(3)] == ["shutting-down", "shutting-down", "terminated"]


def test_terminating_fails_for_a_while(cloud: Cloud) -> None:
    made = launch(cloud)
    cloud.fault("TerminateInstances", "InternalError", times=None, seconds=1)
    ec2 = cloud.client("ec2")
    with pytest.raises(ClientError):
        ec2.terminate_instances(InstanceIds=made)
    time.sleep(1)
    ec2.terminate_instances(InstanceIds=made)
    assert states(cloud) == {made[0]: "terminated"}


def test_a_call_may_take_long(cloud: Cloud) -> None:
    cloud.delay("DescribeVpcs", 0.3)
    begun = time.monotonic()
    cloud.client("ec2").describe_vpcs()
    assert time.monotonic() - begun >= 0.3


def test_as_many_come_as_there_are(cloud: Cloud) -> None:
    cloud.capacity("g5.xlarge", 2, zone="us-east-1a")
    here: dict[str, Any] = {"Placement": {"AvailabilityZone": "us-east-1a"}}
    with pytest.raises(ClientError) as refused:
        launch(cloud, 3, MinCount=3, **here)
    assert code(refused) == "InsufficientInstanceCapacity"
    assert len(launch(cloud, 3, **here)) == 2
    with pytest.raises(ClientError):
        launch(cloud, **here)
    assert len(launch(cloud, 3, Placement={"AvailabilityZone": "us-east-1b"})) == 3


def test_a_quota_is_told_and_kept(cloud: Cloud) -> None:
    cloud.limit(8, "g")
    cloud.limit(4, "g", "spot")
    quotas = cloud.client("service-quotas")
    told = quotas.get_service_quota(ServiceCode="ec2", QuotaCode="L-DB2E81BA")["Quota"]
    assert (told["Value"], told["QuotaName"]) == (8.0, "Running On-Demand G and VT instances")
    listed = [quota for page in quotas.get_paginator("list_service_quotas").paginate(ServiceCode="ec2")
              for quota in page["Quotas"]]  # fmt: skip
    assert {quota["QuotaCode"] for quota in listed} >= {"L-1216C47A", "L-3819A6DF", "L-417A185B"}
    with pytest.raises(ClientError) as unknown:
        quotas.get_service_quota(ServiceCode="ec2", QuotaCode="L-00000000")
    assert code(unknown) == "NoSuchResourceException"
    assert len(launch(cloud, 5)) == 2
    with pytest.raises(ClientError) as refused:
        launch(cloud)
    assert code(refused) == "VcpuLimitExceeded"
    spot: dict[str, Any] = {"InstanceMarketOptions": {"MarketType": "spot"}}
    assert len(launch(cloud, **spot)) == 1
    with pytest.raises(ClientError) as refused:
        launch(cloud, **spot)
    assert code(refused) == "MaxSpotInstanceCountExceeded"


def test_prices_are_those_of_the_price_list(cloud: Cloud) -> None:
    wanted = {
        "instanceType": "g5.xlarge", "regionCode": "eu-west-1", "operatingSystem": "Linux", "tenancy": "Shared",
        "capacitystatus": "Used", "preInstalledSw": "NA",
    }  # fmt: skip
    filters = [{"Type": "TERM_MATCH", "Field": name, "Value": value} for name, value in wanted.items()]
    pricing = cloud.client("pricing")
    offers = pricing.get_products(ServiceCode="AmazonEC2", Filters=filters)["PriceList"]
    assert len(offers) == 1
    terms = json.loads(offers[0])["terms"]["OnDemand"]
    rate = next(iter(next(iter(terms.values()))["priceDimensions"].values()))
    assert rate["unit"] == "Hrs"
    assert float(rate["pricePerUnit"]["USD"]) == pytest.approx(1.006 * 1.1)
    # less said, more found: Windows, dedicated, reservations, pages of a hundred
    pages = pricing.get_paginator("get_products").paginate(ServiceCode="AmazonEC2", Filters=filters[1:2])
    assert sum(len(page["PriceList"]) for page in pages) == 6 * len(supplied.ON_DEMAND)
    assert not pricing.get_products(ServiceCode="AmazonEC2", Filters=[{**filters[0], "Value": "x9.huge"}])["PriceList"]


def test_spot_prices_differ_by_zone(cloud: Cloud) -> None:
    pages = cloud.client("ec2").get_paginator("describe_spot_price_history").paginate(
        InstanceTypes=["g5.xlarge", "g6.xlarge"], ProductDescriptions=["Linux/UNIX"]
    )  # fmt: skip
    found = {
        (item["InstanceType"], item["AvailabilityZone"]): float(item["SpotPrice"])
        for page in pages
        for item in page["SpotPriceHistory"]
    }
    assert found["g5.xlarge", "us-east-1a"] == pytest.approx(1.006 * 0.35)
    assert found["g5.xlarge", "us-east-1b"] > found["g5.xlarge", "us-east-1a"]
    assert {sort for sort, _ in found} == {"g5.xlarge", "g6.xlarge"}


def test_parameters_lead_to_images_that_can_be_launched(cloud: Cloud) -> None:
    ssm = cloud.client("ssm", "eu-west-1")
    names = [PARAMETER, PARAMETER.replace("x86_64", "arm64"), "/aws/service/deeplearning/ami/x86_64/none/latest/ami-id"]
    answer = ssm.get_parameters(Names=names)
    assert answer["InvalidParameters"] == names[2:]
    ids = [found["Value"] for found in answer["Parameters"]]
    images = {one["ImageId"]: one for one in cloud.client("ec2", "eu-west-1").describe_images(ImageIds=ids)["Images"]}
    assert [images[one]["Architecture"] for one in ids] == ["x86_64", "arm64"]
    assert {one["RootDeviceName"] for one in images.values()} == {"/dev/sda1"}
    with pytest.raises(ClientError) as refused:
        ssm.get_parameter(Name=names[2])
    assert code(refused) == "ParameterNotFound"
    # an image of another region is none here
    with pytest.raises(ClientError) as refused:
        launch(cloud, ImageId=ids[0])
    assert code(refused) == "InvalidAMIID.NotFound"


def test_spot_instances_say_so_and_ec2_can_end_them(cloud: Cloud) -> None:
    made = launch(cloud, InstanceMarketOptions={"MarketType": "spot"})
    ec2 = cloud.client("ec2")
    described = ec2.describe_instances(InstanceIds=made)["Reservations"][0]["Instances"][0]
    assert described["InstanceLifecycle"] == "spot"
    cloud.end(made[0])
    described = ec2.describe_instances(InstanceIds=made)["Reservations"][0]["Instances"][0]
    assert described["State"]["Name"] == "terminated"
    assert described["StateReason"]["Code"] == "Server.SpotInstanceTermination"


def test_a_group_in_use_cannot_go(cloud: Cloud) -> None:
    ec2 = cloud.client("ec2")
    group = ec2.create_security_group(
        GroupName="mlperf-fleet-1", Description="-", TagSpecifications=[{"ResourceType": "security-group", "Tags": TAGS}]
    )["GroupId"]  # fmt: skip
    ec2.create_key_pair(KeyName="not-ours")
    made = launch(cloud, SecurityGroupIds=[group])
    with pytest.raises(ClientError) as refused:
        ec2.delete_security_group(GroupId=group)
    assert code(refused) == "DependencyViolation"
    assert cloud.counts() == {"instances": 1, "key_pairs": 0, "groups": 1, "volumes": 1}
    assert cloud.standing()["groups"] == [group]
    ec2.terminate_instances(InstanceIds=made)
    ec2.delete_security_group(GroupId=group)
    assert cloud.counts() == {"instances": 0, "key_pairs": 0, "groups": 0, "volumes": 0}
    assert cloud.counts(ours=False)["key_pairs"] == 1


def test_an_account_may_have_no_default_vpc(cloud: Cloud) -> None:
    wanted = [{"Name": "is-default", "Values": ["true"]}]
    ec2 = cloud.client("ec2")
    assert len(ec2.describe_vpcs(Filters=wanted)["Vpcs"]) == 1
    cloud.no_default_vpc()
    assert ec2.describe_vpcs(Filters=wanted)["Vpcs"] == []
    assert ec2.describe_subnets(Filters=[{"Name": "default-for-az", "Values": ["true"]}])["Subnets"] == []


def test_ones_own_address_can_be_asked_for(cloud: Cloud) -> None:
    cloud.come_from("198.51.100.9")
    with urllib.request.urlopen(cloud.checkip, timeout=5) as answer:
        assert answer.read().decode().strip() == "198.51.100.9"


def test_fleets_own_door_leads_here(cloud: Cloud, make_session: MakeSession) -> None:
    session, campaign = make_session()
    assert campaign.cloud is not None
    assert session.root.is_dir()
    assert aws.client("sts", "us-east-1").call("get_caller_identity")["Account"] == "123456789012"
    assert cloud.counted() == {"GetCallerIdentity": 1}
