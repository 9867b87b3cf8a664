"""One RunInstances call from one lease, and what becomes of a lease whose call was not answered.

A lease is on disk before its call is made. Between the two, and until the answer is on disk too, nobody knows whether there
are instances: the lease is INTENDED, and is settled when the session goes on.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import tenacity

from fleet.cloud import aws, described, leases
from fleet.cloud.access import tag_list
from fleet.cloud.described import Described
from fleet.cloud.leases import EXPIRY_TAG, LEASE_TAG, OWNER_TAG, SESSION_TAG, Lease, Leased, LeaseState
from fleet.cloud.pools import Rule, rule
from fleet.cloud.price_table import SPOT
from fleet.errors import CloudError
from fleet.session import Session

BATCH = 100
"""Hosts of one call at most."""
WAITS, WAIT_S, WAIT_AT_MOST_S = 8, 2.0, 60.0
"""How often a call is made that comes too soon or is not answered, and how long is waited between: up to twice as long
each time, and no more than that."""
LOOKS, LOOK_S, LOOK_AT_MOST_S = 6, 1.0, 10.0
"""The same for instances that DescribeInstances may not know yet."""
CONSISTENT_AFTER_S = 600.0
"""So long after a call EC2 knows everywhere what came of it."""
_UNKNOWN = frozenset(
    {
        aws.NO_ANSWER,
        "InternalError",
        "InternalFailure",
        "ServiceUnavailable",
        "Unavailable",
        "RequestTimeout",
        "RequestTimeoutException",
        "500",
        "502",
        "503",
        "504",
    }
)
"""Codes that do not say whether the call was carried out."""
_MISMATCH = "IdempotentParameterMismatch"
"""The token is known: an earlier call was heard, in other words."""
_TERMINATED = "IdempotentInstanceTerminated"
"""What this token has launched has ended already."""


def tags(token: str, owner: str, expires_at: float, lease: str = "") -> dict[str, str]:
    """What everything of a session carries; instances carry their lease beside it."""
    found = {
        "Name": f"fleet-{token}",
        SESSION_TAG: token,
        OWNER_TAG: owner,
        EXPIRY_TAG: leases.expiry_text(expires_at),
    }
    return {**found, LEASE_TAG: lease} if lease else found


def request(lease: Lease, data: bytes) -> dict[str, Any]:
    """The arguments of the lease's call, the same for the same lease; `data` is the user data."""
    kinds = ["instance", "volume", "network-interface", *(["spot-instances-request"] if lease.market == SPOT else [])]
    interface: dict[str, Any] = {
        "DeviceIndex": 0,
        "SubnetId": lease.subnet,
        "Groups": [lease.security_group],
        "DeleteOnTermination": True,
    }
    if lease.public:
        # Else it is as the subnet has it: instances of a default VPC get out by a public address.
        interface["AssociatePublicIpAddress"] = True
    asked: dict[str, Any] = {
        "ClientToken": lease.id,
        "ImageId": lease.image,
        "InstanceType": lease.type,
        "MinCount": 1,
        "MaxCount": len(lease.hosts),
        "KeyName": lease.key_name,
        "UserData": data.decode("ascii"),
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled", "HttpPutResponseHopLimit": 1},
        "NetworkInterfaces": [interface],
        "Placement": {"AvailabilityZone": lease.zone},
        "BlockDeviceMappings": [
            {
                "DeviceName": lease.root_device,
                "Ebs": {
                    "Encrypted": True,
                    "DeleteOnTermination": True,
                    "VolumeSize": lease.volume_gib,
                    "VolumeType": "gp3",
                },
            }
        ],
        "TagSpecifications": [{"ResourceType": kind, "Tags": tag_list(lease.tags)} for kind in kinds],
    }
    if lease.market == SPOT:
        asked["InstanceMarketOptions"] = {
            "MarketType": "spot",
            "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
        }
    return asked


def launch(session: Session, lease: Lease, data: bytes) -> Lease:
    """Write the lease, make its call, and return it with what came: LAUNCHED, or REFUSED with AWS's code.

    Raises CloudError for a refusal that is to stop everything, and when it is not known what came: the lease then stays
    INTENDED.
    """
    leases.write(session, lease)
    return call(session, lease, data)


def call(session: Session, lease: Lease, data: bytes) -> Lease:
    """The call of a lease that is on disk; the rest as with `launch`."""
    asked = request(lease, data)
    unheard: list[str] = []

    def passes(error: BaseException) -> bool:
        if isinstance(error, CloudError) and error.code in _UNKNOWN:
            unheard.append(error.code)
        return _passes(error)

    # Repeated here and not by botocore, which takes want of capacity for something that passes. The same token each time.
    heard = tenacity.Retrying(
        retry=tenacity.retry_if_exception(passes),
        stop=tenacity.stop_after_attempt(WAITS),
        wait=tenacity.wait_random_exponential(multiplier=WAIT_S, max=WAIT_AT_MOST_S),
        reraise=True,
    )
    try:
        answer = heard(aws.client("ec2", lease.region).once, "run_instances", **asked)
    except CloudError as error:
        # Of several attempts an earlier one may have been carried out, whatever the last one was told.
        if unheard or error.code in aws.EXPIRED | {_MISMATCH} or _passes(error):
            raise
        refused = refuse(session, lease, code=error.code, cause=error.message)
        if rule(error.code) is Rule.STOP and error.code != _TERMINATED:
            raise
        return refused
    found = [described.described(lease.region, item) for item in answer.get("Instances", ())]
    return adopt(session, lease, found)


def _passes(error: BaseException) -> bool:
    return isinstance(error, CloudError) and (error.code in _UNKNOWN or rule(error.code) is Rule.WAIT)


def refuse(session: Session, lease: Lease, *, code: str, cause: str) -> Lease:
    """The lease came to nothing."""
    return leases.change(
        session, lease.id, lambda found: replace(found, state=LeaseState.REFUSED, code=code, cause=cause)
    )


def settle(session: Session, lease: Lease, data: bytes, *, wanted: bool) -> Lease:
    """Find out what came of a lease that is INTENDED.

    What carries its tag is adopted. Where nothing is seen the same call is made again, with the same token: if it was
    carried out before, that launches nothing new. An instance too many of a call that was made twice is ended by whoever
    looks next (arrivals.py). Not `wanted` any more, or expired, nothing is called again.

    Raises CloudError when it still cannot be known.
    """
    found = _seen(lease)
    if found:
        return adopt(session, lease, found)
    if not wanted or lease.first_expires_at <= time.time():
        return refuse(session, lease, code="NotSeen", cause="its call was not answered, and no instance of it was seen")
    try:
        return call(session, lease, data)
    except CloudError as error:
        if error.code != _MISMATCH:
            raise
        # Heard, in other words than now (another version of fleet): the tag alone can tell.
        if found := _seen(lease):
            return adopt(session, lease, found)
        return refuse(session, lease, code=error.code, cause=error.message)


def adopt(session: Session, lease: Lease, found: Sequence[Described]) -> Lease:
    """Enter instances of a lease into the ledger: each host the one with its launch index, and who is left over no host."""
    return leases.change(session, lease.id, lambda known: entered(known, found))


def entered(lease: Lease, found: Sequence[Described], taken: Mapping[str, str] = {}) -> Lease:
    """The lease with instances that it did not know; `taken` are hosts that have an instance under another lease.

    Pure. The oldest of two for one host is the host's.
    """
    known = {leased.id for leased in lease.instances}
    hosts = {leased.host for leased in lease.instances} | set(taken)
    new = []
    for instance in sorted(found, key=lambda each: (each.index, each.launched_at, each.id)):
        if instance.id in known or instance.lease not in {"", lease.id}:
            continue
        host = lease.hosts[instance.index] if instance.index < len(lease.hosts) else ""
        host = "" if host in hosts else host
        hosts.add(host)
        new.append(
            Leased(
                id=instance.id,
                host=host,
                zone=instance.zone,
                private_address=instance.private_address,
                public_address=instance.public_address if lease.public else "",
                launched_at=instance.launched_at,
            )
        )
    instances = (*lease.instances, *new)
    # Who looked before (down, which was cut off) may have entered them and left open whether these are all.
    is_open = lease.state in {LeaseState.INTENDED, LeaseState.REFUSED}
    return replace(lease, state=LeaseState.LAUNCHED, instances=instances) if new or (instances and is_open) else lease


def _seen(lease: Lease) -> list[Described]:
    """What carries the lease's tag, looked for as long as EC2 may need to know it."""
    if time.time() - lease.written_at > CONSISTENT_AFTER_S:
        return described.instances(lease.region, LEASE_TAG, [lease.id])
    look = tenacity.Retrying(
        retry=tenacity.retry_if_not_result(bool),
        stop=tenacity.stop_after_attempt(LOOKS),
        wait=tenacity.wait_exponential(multiplier=LOOK_S, max=LOOK_AT_MOST_S),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else [],
    )
    found: list[Described] = look(described.instances, lease.region, LEASE_TAG, [lease.id])
    return found
