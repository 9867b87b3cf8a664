"""Instances as `up` leaves them, without `up`: a group, a key pair, volumes, a lease, and everything tagged."""

import time
from dataclasses import replace
from typing import Any

from fleet.cloud import keys, leases
from fleet.cloud.leases import EXPIRY_TAG, LEASE_TAG, OWNER_TAG, SESSION_TAG, Lease, Leased, LeaseState
from fleet.session import Session
from tests.cloud.cloud import Cloud

HOUR = 3600.0


def launched(
    cloud: Cloud,
    session: Session,
    count: int = 2,
    *,
    region: str = "us-east-1",
    owner: str = "moto",
    age_s: float = HOUR,
    left_s: float = HOUR,
    known: bool = True,
) -> Lease:
    """`count` instances under a new lease, g5-1 and so on; the lease knows them where `known`."""
    keys.ensure(session)
    ec2, token, now = cloud.client("ec2", region), session.token, time.time()
    lease = Lease(
        id=leases.new_id(), hosts=tuple(f"g5-{number}" for number in range(1, count + 1)), region=region, zone="",
        subnet="", type="g5.xlarge", market="on-demand", image=_image(ec2), root_device="/dev/sda1", volume_gib=100,
        key_name=f"fleet-{token}", security_group="", owner=owner, usd_per_hour=1.006,
        price_source="table 2026-11-01", written_at=now - age_s, first_expires_at=now + left_s, expires_at=now + left_s,
    )  # fmt: skip
    tags = {SESSION_TAG: token, OWNER_TAG: owner, EXPIRY_TAG: leases.expiry_text(lease.expires_at)}
    lease = replace(lease, security_group=_access(ec2, lease, tags))
    leases.write(session, lease)
    named = _listed({**tags, LEASE_TAG: lease.id})
    made = ec2.run_instances(
        ImageId=lease.image, InstanceType=lease.type, MinCount=count, MaxCount=count, KeyName=lease.key_name,
        SecurityGroupIds=[lease.security_group], ClientToken=lease.id,
        BlockDeviceMappings=[{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 100, "DeleteOnTermination": True}}],
        TagSpecifications=[{"ResourceType": kind, "Tags": named} for kind in ("instance", "volume")],
    )["Instances"]  # fmt: skip
    if known:
        found = tuple(
            Leased(
                id=item["InstanceId"],
                host=host,
                zone=item["Placement"]["AvailabilityZone"],
                private_address=item["PrivateIpAddress"],
                launched_at=now - age_s,
            )
            for item, host in zip(made, lease.hosts, strict=True)
        )
        lease = replace(lease, state=LeaseState.LAUNCHED, instances=found)
        leases.write(session, lease)
    return lease


def stranger(cloud: Cloud, *, tags: dict[str, str] | None = None, region: str = "us-east-1") -> str:
    """Somebody else's instance; its id."""
    ec2 = cloud.client("ec2", region)
    made = ec2.run_instances(
        ImageId=_image(ec2), InstanceType="m7i.large", MinCount=1, MaxCount=1,
        TagSpecifications=[{"ResourceType": "instance", "Tags": _listed(tags or {"Name": "database"})}],
    )  # fmt: skip
    return str(made["Instances"][0]["InstanceId"])


def ids(*of: Lease) -> list[str]:
    """Instances of leases."""
    return sorted(leased.id for lease in of for leased in lease.instances)


def _image(ec2: Any) -> str:
    return str(ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"])


def _access(ec2: Any, lease: Lease, tags: dict[str, str]) -> str:
    """Group and key pair of the session, made once."""
    token = tags[SESSION_TAG]
    there = ec2.describe_security_groups(Filters=[{"Name": f"tag:{SESSION_TAG}", "Values": [token]}])["SecurityGroups"]
    if there:
        return str(there[0]["GroupId"])
    ec2.create_key_pair(KeyName=lease.key_name, TagSpecifications=[{"ResourceType": "key-pair", "Tags": _listed(tags)}])
    return str(
        ec2.create_security_group(
            GroupName=f"fleet-{token}",
            Description="mlperf-fleet",
            TagSpecifications=[{"ResourceType": "security-group", "Tags": _listed(tags)}],
        )["GroupId"]
    )


def _listed(tags: dict[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in tags.items()]
