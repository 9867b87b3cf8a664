"""What EC2 says is there, by our tags: instances, and what is left of a session beside them. Asks, and changes nothing."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fleet.cloud import aws
from fleet.cloud.leases import EXPIRY_TAG, LEASE_TAG, OWNER_TAG, SESSION_TAG, TAKEN_BACK, Lease, expiry

VALUES = 200
"""EC2 takes no more values in one filter."""
GONE = "terminated"
ENDING = frozenset({"shutting-down", GONE})
SPOT = frozenset({"Server.SpotInstanceTermination", "Server.SpotInstanceShutdown"})
"""State reasons of spot instances that EC2 took back."""
KINDS = ("security-group", "key-pair", "volume")
"""What a session may have beside instances, in the order in which it is removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tagged:
    """Anything in EC2 that carries our tags."""

    id: str
    region: str
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def session(self) -> str:
        """The token of the session that it belongs to."""
        return self.tags.get(SESSION_TAG, "")

    @property
    def owner(self) -> str:
        """Whose it is."""
        return self.tags.get(OWNER_TAG, "")

    @property
    def lease(self) -> str:
        """The lease that it was launched under."""
        return self.tags.get(LEASE_TAG, "")

    @property
    def expires_at(self) -> float | None:
        """Unix seconds; None when the tag is missing or says no time."""
        return expiry(self.tags.get(EXPIRY_TAG, ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class Described(Tagged):
    """An instance, as DescribeInstances has it."""

    state: str
    type: str = ""
    zone: str = ""
    market: str = "on-demand"
    index: int = 0
    """AmiLaunchIndex: the how manyth of its call."""
    private_address: str = ""
    public_address: str = ""
    launched_at: float = 0.0
    """Unix seconds, by EC2's clock."""
    reason_code: str = ""
    reason: str = ""
    """StateReason's code and StateTransitionReason: why it is in its state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover(Tagged):
    """A security group, key pair or volume."""

    kind: str
    """One of KINDS."""
    state: str = ""
    """Of a volume: `available`, `in-use` and so on."""
    name: str = ""
    """Of a key pair: there is one of a name in a region."""


def instances(region: str, tag: str = SESSION_TAG, values: Sequence[str] = ()) -> list[Described]:
    """Every instance of a region, terminated ones too, whose tag has one of the values; or any, where there are none.

    Raises CloudError.
    """
    if not values:
        return _instances(region, {"Name": "tag-key", "Values": [tag]})
    return [
        found
        for some in _batches(values, VALUES)
        for found in _instances(region, {"Name": f"tag:{tag}", "Values": some})
        # A filter that EC2 did not apply must not become a termination.
        if found.tags.get(tag) in some
    ]


def by_id(region: str, ids: Sequence[str]) -> list[Described]:
    """Instances by their ids, whatever their tags; those that EC2 does not know are not in it.

    Raises CloudError.
    """
    # As a filter: as InstanceIds, one that is unknown would be an error, and none would be found.
    return [
        found for some in _batches(ids, VALUES) for found in _instances(region, {"Name": "instance-id", "Values": some})
    ]


def untagged(region: str, ledger: Iterable[Lease], found: Iterable[Described]) -> list[Described]:
    """Instances that leases of a region know, that have no end, and that are not among what was found by the tag.

    Raises CloudError.
    """
    known = {item.id for item in found}
    lacking = [
        leased.id
        for lease in ledger
        for leased in lease.instances
        if leased.ended_at is None and leased.id not in known
    ]
    return by_id(region, lacking) if lacking else []


def leftovers(region: str, session: str = "") -> list[Leftover]:
    """Security groups, key pairs and volumes of a region with our tag: one session's, or all; in the order of KINDS.

    Raises CloudError.
    """
    ec2 = aws.client("ec2", region)
    wanted = {"Name": f"tag:{SESSION_TAG}", "Values": [session]} if session else _ANY
    found = [
        Leftover(kind="security-group", id=item["GroupId"], region=region, tags=_tags(item))
        for item in ec2.every("describe_security_groups", "SecurityGroups", Filters=[wanted])
    ]
    found += [
        Leftover(kind="key-pair", id=item["KeyPairId"], region=region, tags=_tags(item), name=item["KeyName"])
        for item in ec2.call("describe_key_pairs", Filters=[wanted]).get("KeyPairs", ())
    ]
    found += [
        Leftover(kind="volume", id=item["VolumeId"], region=region, tags=_tags(item), state=str(item.get("State", "")))
        for item in ec2.every("describe_volumes", "Volumes", Filters=[wanted])
    ]
    return [item for item in found if item.session and (not session or item.session == session)]


def why_ended(instance: Described, expires_at: float | None) -> str:
    """Why an instance ended that nobody took down, in a few words; its timer ended it when it lived to its expiry."""
    if instance.reason_code in SPOT:
        return TAKEN_BACK
    ended = ended_at(instance)
    if "InstanceInitiatedShutdown" in instance.reason_code:
        # The timer looks at the clock now and then, and a clock may be a minute off.
        early = expires_at is not None and ended is not None and ended < expires_at - 120
        return "shut itself down" if early else "lease expired"
    if "UserInitiatedShutdown" in instance.reason_code:
        late = expires_at is not None and ended is not None and ended >= expires_at
        return "lease expired, terminated through EC2" if late else "terminated through EC2"
    return instance.reason_code or instance.reason or "terminated, EC2 does not say why"


def ended_at(instance: Described) -> float | None:
    """Unix seconds by EC2's clock: when it began to end; None when EC2 does not say."""
    said = re.search(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)", instance.reason)
    return datetime.fromisoformat(said[1]).replace(tzinfo=UTC).timestamp() if said else None


_ANY = {"Name": "tag-key", "Values": [SESSION_TAG]}


def _instances(region: str, wanted: dict[str, Any]) -> list[Described]:
    reservations = aws.client("ec2", region).every("describe_instances", "Reservations", Filters=[wanted])
    return [described(region, item) for reservation in reservations for item in reservation.get("Instances", ())]


def described(region: str, item: Mapping[str, Any]) -> Described:
    """An instance as RunInstances and DescribeInstances tell it."""
    launched = item.get("LaunchTime")
    return Described(
        id=item["InstanceId"],
        region=region,
        tags=_tags(item),
        state=item.get("State", {}).get("Name", ""),
        type=item.get("InstanceType", ""),
        zone=item.get("Placement", {}).get("AvailabilityZone", ""),
        market="spot" if item.get("InstanceLifecycle") == "spot" else "on-demand",
        index=int(item.get("AmiLaunchIndex", 0)),
        private_address=item.get("PrivateIpAddress", ""),
        public_address=item.get("PublicIpAddress", ""),
        launched_at=launched.timestamp() if launched else 0.0,
        reason_code=(item.get("StateReason") or {}).get("Code", ""),
        reason=item.get("StateTransitionReason", ""),
    )


def _tags(item: Mapping[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in item.get("Tags") or ()}


def _batches(values: Iterable[str], size: int) -> Iterator[list[str]]:
    listed = sorted(set(values))
    return (listed[first : first + size] for first in range(0, len(listed), size))
