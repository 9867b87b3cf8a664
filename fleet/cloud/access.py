"""How instances are reached: the network they are in, and the key pair and the security group of the session there."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Any, TypeVar

import tenacity

from fleet.cloud import aws, caller
from fleet.cloud.keys import Keys, alias
from fleet.cloud.leases import EXPIRY_TAG, SESSION_TAG
from fleet.cloud_settings import CloudSettings
from fleet.errors import CloudError

SSH = 22
LOOKS, LOOK_S, LOOK_AT_MOST_S = 8, 0.25, 8.0
"""How often something that was just made is looked for, and how long is waited between: doubling, and no more than that."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Where instances of a region are put."""

    region: str
    vpc: str
    subnets: Mapping[str, str]
    """Availability zone to subnet."""
    blocks: tuple[str, ...]
    """The subnets' addresses, `172.31.0.0/20`."""
    public: bool
    """Whether instances get a public address and are reached by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What RunInstances is told, so that instances can be reached."""

    key_name: str
    security_group: str


def network(settings: CloudSettings, region: str) -> Network:
    """The campaign's subnets of a region, else the default VPC's; asks and makes nothing.

    Raises CloudError where there are none.
    """
    ec2 = aws.client("ec2", region)
    named = {zone: subnet for zone, subnet in settings.subnets.items() if zone.startswith(region)}
    if named:
        found = _named(ec2, region, named)
    else:
        vpcs = ec2.call("describe_vpcs", Filters=[{"Name": "is-default", "Values": ["true"]}]).get("Vpcs", [])
        if not vpcs:
            raise CloudError(
                f"no default VPC in {region}",
                hint=f"name a subnet per zone in fleet.yml, cloud.subnets: {{{region}a: subnet-…}}",
                code="NoDefaultVpc",
            )
        mine = [{"Name": "vpc-id", "Values": [vpcs[0]["VpcId"]]}, {"Name": "default-for-az", "Values": ["true"]}]
        found = list(ec2.every("describe_subnets", "Subnets", Filters=mine))
        if not found:
            raise CloudError(
                f"the default VPC of {region} has no default subnet",
                hint=f"name one per zone in fleet.yml, cloud.subnets: {{{region}a: subnet-…}}",
                code="NoDefaultVpc",
            )
    vpc = str(found[0]["VpcId"])
    return Network(
        region=region,
        vpc=vpc,
        subnets={str(subnet["AvailabilityZone"]): str(subnet["SubnetId"]) for subnet in found},
        blocks=tuple(str(subnet["CidrBlock"]) for subnet in found),
        public=settings.address == "public" or (settings.address == "auto" and not _inside(vpc)),
    )


def _named(ec2: aws.Client, region: str, named: Mapping[str, str]) -> list[dict[str, Any]]:
    hint = "look at cloud.subnets in fleet.yml: availability zone to subnet id"
    wanted = [{"Name": "subnet-id", "Values": sorted(named.values())}]
    # By filter: as SubnetIds, an unknown one is an error that does not name the zone.
    found = {str(subnet["SubnetId"]): subnet for subnet in ec2.every("describe_subnets", "Subnets", Filters=wanted)}
    for zone, subnet in named.items():
        if subnet not in found:
            raise CloudError(f"there is no subnet {subnet} in {region}", hint=hint, code="InvalidSubnetID.NotFound")
        if (really := found[subnet]["AvailabilityZone"]) != zone:
            raise CloudError(f"subnet {subnet} is in {really}, not in {zone}", hint=hint)
    if len(vpcs := sorted({str(subnet["VpcId"]) for subnet in found.values()})) > 1:
        raise CloudError(f"cloud.subnets of {region} are in several VPCs: {', '.join(vpcs)}", hint=hint)
    return list(found.values())


def ensure(token: str, keys: Keys, settings: CloudSettings, where: Network, tags: Mapping[str, str]) -> Access:
    """The session's key pair and security group in a region, made or found; ssh is let in from one place only.

    Raises CloudError, also when something of that name is there that is not this session's.
    """
    name, ec2 = alias(token), aws.client("ec2", where.region)
    source = _source(settings, where)
    pair = _key_pair(ec2, name, keys, tags)
    group = _group(ec2, name, where.vpc, tags)
    _let_in(ec2, group, source)
    late = [found["Id"] for found in (pair, group) if _tag(found, EXPIRY_TAG) < tags[EXPIRY_TAG]]
    if late:
        # Something of an outing that goes on: nobody may take it for a leftover.
        ec2.call("create_tags", Resources=late, Tags=tag_list({EXPIRY_TAG: tags[EXPIRY_TAG]}))
    return Access(key_name=name, security_group=group["Id"])


def tag_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    """Tags as EC2 takes them."""
    return [{"Key": key, "Value": value} for key, value in sorted(tags.items())]


def _key_pair(ec2: aws.Client, name: str, keys: Keys, tags: Mapping[str, str]) -> dict[str, Any]:
    for _ in range(2):
        try:
            made = ec2.call(
                "import_key_pair",
                KeyName=name,
                PublicKeyMaterial=keys.login_public.encode(),
                TagSpecifications=[{"ResourceType": "key-pair", "Tags": tag_list(tags)}],
            )
            return {"Id": made["KeyPairId"], "Tags": tag_list(tags)}
        except CloudError as error:
            if error.code != "InvalidKeyPair.Duplicate":
                raise
        named = [{"Name": "key-name", "Values": [name]}]
        asked = functools.partial(ec2.call, "describe_key_pairs", Filters=named, IncludePublicKey=True)
        found = _until_seen(asked, "KeyPairs", f"key pair {name} in {ec2.region}")
        _is_ours(found, f"key pair {name} in {ec2.region}", tags)
        if found.get("PublicKey", "").split()[:2] == keys.login_public.split()[:2]:
            return {"Id": found["KeyPairId"], "Tags": found.get("Tags", [])}
        # Ours, of a key that is lost: nobody can log in with it any more.
        ec2.call("delete_key_pair", KeyName=name)
    raise CloudError(f"key pair {name} in {ec2.region} comes back when it is replaced", hint="the same command again")


def _group(ec2: aws.Client, name: str, vpc: str, tags: Mapping[str, str]) -> dict[str, Any]:
    try:
        made = ec2.call(
            "create_security_group",
            GroupName=name,
            Description="mlperf-fleet: ssh from the controller",
            VpcId=vpc,
            TagSpecifications=[{"ResourceType": "security-group", "Tags": tag_list(tags)}],
        )
        return {"Id": made["GroupId"], "Tags": tag_list(tags), "IpPermissions": []}
    except CloudError as error:
        if error.code != "InvalidGroup.Duplicate":
            raise
    named = [{"Name": "group-name", "Values": [name]}, {"Name": "vpc-id", "Values": [vpc]}]
    found = _until_seen(
        functools.partial(ec2.call, "describe_security_groups", Filters=named),
        "SecurityGroups",
        f"security group {name} in {ec2.region}",
    )
    _is_ours(found, f"security group {name} in {ec2.region}", tags)
    return {**found, "Id": found["GroupId"]}


def _let_in(ec2: aws.Client, group: dict[str, Any], source: IPv4Network) -> None:
    """Ssh from `source`, and nothing else from anywhere: the caller's address may have changed."""
    wanted = {
        "IpProtocol": "tcp",
        "FromPort": SSH,
        "ToPort": SSH,
        "IpRanges": [{"CidrIp": str(source), "Description": "ssh from the controller"}],
    }
    # EC2 shows all sources of a port as one rule, and takes each by itself.
    had = [single for rule in group["IpPermissions"] for single in _singles(rule)]
    right = [rule for rule in had if _plain(rule) == _plain(wanted)]
    if not right:
        try:
            _once_there(
                lambda: ec2.call("authorize_security_group_ingress", GroupId=group["Id"], IpPermissions=[wanted])
            )
        except CloudError as error:
            # A lost answer, and the same again.
            if error.code != "InvalidPermission.Duplicate":
                raise
    others = [rule for rule in had if rule not in right]
    if others:
        ec2.call("revoke_security_group_ingress", GroupId=group["Id"], IpPermissions=others)


_SOURCES = ("IpRanges", "Ipv6Ranges", "PrefixListIds", "UserIdGroupPairs")


def _singles(rule: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One rule for each source of a rule."""
    ports = {key: value for key, value in rule.items() if key not in _SOURCES}
    return [{**ports, kind: [source]} for kind in _SOURCES for source in rule.get(kind) or ()]


def _plain(rule: Mapping[str, Any]) -> tuple[Any, ...]:
    ranges = [found["CidrIp"] for found in rule.get("IpRanges", ())]
    return rule.get("IpProtocol"), rule.get("FromPort"), rule.get("ToPort"), ranges


def _source(settings: CloudSettings, where: Network) -> IPv4Network:
    if settings.ssh_from is not None:
        return settings.ssh_from
    if where.public:
        return IPv4Network(caller.public_address())
    found = caller.here()
    if found is not None and found.vpc == where.vpc:
        return IPv4Network(found.address)
    return IPv4Network(caller.address_towards(IPv4Network(where.blocks[0])))


def _inside(vpc: str) -> bool:
    found = caller.here()
    return found is not None and found.vpc == vpc


def _is_ours(found: Mapping[str, Any], what: str, tags: Mapping[str, str]) -> None:
    if _tag(found, SESSION_TAG) != tags[SESSION_TAG]:
        raise CloudError(
            f"{what} is there and is not this session's: it does not carry the tag {SESSION_TAG}={tags[SESSION_TAG]}",
            hint="remove it if it is yours, or begin a new session: fleet bench --new",
            code="NotOurs",
        )


def _tag(found: Mapping[str, Any], key: str) -> str:
    return next((str(tag["Value"]) for tag in found.get("Tags") or () if tag["Key"] == key), "")


def _until_seen(look: Callable[[], dict[str, Any]], key: str, what: str) -> dict[str, Any]:
    """The first of what is found; EC2 may know for a moment that a name is taken, and not yet by what."""
    try:
        seen: dict[str, Any] = _looks(retry=tenacity.retry_if_not_result(lambda answer: bool(answer.get(key))))(look)[
            key
        ][0]
    except tenacity.RetryError as error:
        raise CloudError(f"{what} is there and cannot be seen", hint="the same command again") from error
    return seen


def _once_there(act: Callable[[], T]) -> T:
    """Do something to what was just made, which may not be known everywhere yet."""
    unknown = tenacity.retry_if_exception(lambda error: getattr(error, "code", "") in NOT_YET)
    return _looks(retry=unknown, reraise=True)(act)


NOT_YET = frozenset({"InvalidGroup.NotFound", "InvalidGroupId.NotFound", "InvalidKeyPair.NotFound"})
"""What EC2 says of something that it has just made, until it knows it everywhere."""


def _looks(**how: Any) -> tenacity.Retrying:
    wait = tenacity.wait_exponential(multiplier=LOOK_S, max=LOOK_AT_MOST_S)
    return tenacity.Retrying(stop=tenacity.stop_after_attempt(LOOKS), wait=wait, **how)
