"""Running instances that somebody else launched, as hosts: found by their tags, never started, changed or ended here."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fleet.campaign import HOST_NAME, HOST_NAME_LIMIT, Campaign
from fleet.cloud import aws, hosts, leases
from fleet.errors import CloudError
from fleet.inventory import files, static
from fleet.inventory.hosts import Host, Instance
from fleet.session import Session
from fleet.terms import HostKind

TYPES_AT_ONCE = 100
"""Instance types that one DescribeInstanceTypes may name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Instances with all of these tags; as in inventory/from_ec2.json."""

    tags: dict[str, str]
    """A value may hold * and ?, as in EC2's own filters."""
    regions: tuple[str, ...] = ()
    """Empty for the campaign's, or else the user's own."""
    entry: int | None = None
    """Index of the campaign's entry that says so."""

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.tags.items())


def sources(session: Session, campaign: Campaign) -> tuple[Source, ...]:
    """What the campaign says by `ec2_tag`, then what `fleet inventory --from-ec2` was told in this session."""
    named = [
        Source(tags=dict(entry.ec2_tag), regions=(entry.region,) if entry.region else (), entry=number)
        for number, entry in enumerate(campaign.hosts)
        if entry.ec2_tag
    ]
    return (*named, *told(session))


def told(session: Session) -> tuple[Source, ...]:
    """What `fleet inventory --from-ec2` was told in this session."""
    path = session.inventory / "from_ec2.json"
    return session.read(path, tuple[Source, ...]) if path.is_file() else ()


def remember(session: Session, source: Source) -> None:
    """Have every later inventory of this session take these instances in."""
    known = told(session)
    if source not in known:
        session.write(session.inventory / "from_ec2.json", [*known, source])


def every(session: Session, campaign: Campaign, *, base: Path, source: str) -> tuple[Host, ...]:
    """Every host that is an instance: those that fleet launches, then those that are found by tags.

    One that was found earlier and is not running any more stays, with the cause. Raises CloudError when EC2 cannot be
    asked, CampaignError as `static.hosts` does.
    """
    launched = hosts.planned(session, campaign)
    asked = sources(session, campaign)
    if not asked:
        return launched
    earlier = [host for host in files.known(session) if host.instance and not host.launched]
    taken = {host.name for host in (*static.hosts(campaign, base=base, source=source), *launched)}
    own = {leased.id for lease in leases.read(session) for leased in lease.instances}
    running: dict[str, tuple[Source, str, dict[str, Any]]] = {}
    for one in asked:
        for region in _regions(one, campaign):
            for instance in _running(one, region):
                if instance["InstanceId"] not in own:
                    running.setdefault(instance["InstanceId"], (one, region, instance))
    gpus = _gpus((region, instance["InstanceType"]) for _, region, instance in running.values())
    names = _names(running, earlier, taken)
    home = hosts.finished(session)
    gone = [_gone(host, asked, home=host.name in home) for host in earlier if _id(host) not in running]
    found = [
        _host(names[number], region, instance, campaign, entry=one.entry, gpu=gpus.get((region, instance["InstanceType"]), ""))
        for number, (one, region, instance) in running.items()
    ]  # fmt: skip
    return (*launched, *sorted([*gone, *found], key=lambda host: host.name))


def _regions(source: Source, campaign: Campaign) -> tuple[str, ...]:
    """Where to look.

    Raises CloudError when nothing says where.
    """
    own = campaign.cloud.regions if campaign.cloud else ()
    if found := source.regions or own or tuple(filter(None, [aws.default_region()])):
        return found
    raise CloudError(
        f"instances with {source}: in which region?", hint="--region, `region:` beside ec2_tag, or AWS_REGION"
    )


def _running(source: Source, region: str) -> Iterator[dict[str, Any]]:
    filters = [{"Name": f"tag:{key}", "Values": [value]} for key, value in source.tags.items()]
    filters.append({"Name": "instance-state-name", "Values": ["running"]})
    for reservation in aws.client("ec2", region).every("describe_instances", "Reservations", Filters=filters):
        yield from reservation["Instances"]


def _gpus(kinds: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Region and type to its GPU, `a10g`; types without one are not in it."""
    wanted: dict[str, set[str]] = {}
    for region, name in kinds:
        wanted.setdefault(region, set()).add(name)
    found = {}
    for region, types in wanted.items():
        listed = sorted(types)
        for start in range(0, len(listed), TYPES_AT_ONCE):
            page = listed[start : start + TYPES_AT_ONCE]
            for kind in aws.client("ec2", region).every("describe_instance_types", "InstanceTypes", InstanceTypes=page):
                for gpu in kind.get("GpuInfo", {}).get("Gpus", ())[:1]:
                    found[region, kind["InstanceType"]] = "-".join(str(gpu.get("Name", "")).lower().split())
    return found


def _names(
    running: Mapping[str, tuple[Source, str, dict[str, Any]]], earlier: Iterable[Host], taken: set[str]
) -> dict[str, str]:
    """Instance to host name: what it was called earlier, else its Name tag where that names it alone, else its id."""
    kept = {_id(host): host.name for host in earlier}
    tags = {number: _tag(instance, "Name") for number, (_, _, instance) in running.items()}
    used = [*taken, *kept.values(), *(name for number, name in tags.items() if number not in kept)]
    return {
        number: kept.get(number) or (name if _is_name(name) and used.count(name) == 1 else number)
        for number, name in tags.items()
    }


def _is_name(text: str) -> bool:
    return len(text) <= HOST_NAME_LIMIT and re.fullmatch(HOST_NAME, text) is not None


def _tag(instance: Mapping[str, Any], key: str) -> str:
    return next((str(tag["Value"]) for tag in instance.get("Tags", ()) if tag["Key"] == key), "")


def _id(host: Host) -> str:
    return host.instance.id if host.instance is not None else ""


def _host(
    name: str, region: str, instance: Mapping[str, Any], campaign: Campaign, *, entry: int | None, gpu: str
) -> Host:
    given = campaign.hosts[entry] if entry is not None else None
    public, private = str(instance.get("PublicIpAddress", "")), str(instance.get("PrivateIpAddress", ""))
    number = str(instance["InstanceId"])
    addresses = {"public": public, "private": private, "id": number}
    address = addresses[given.address] if given is not None and given.address else public or private
    found = Instance(
        id=number,
        type=str(instance["InstanceType"]),
        region=region,
        zone=str(instance.get("Placement", {}).get("AvailabilityZone", "")),
        market="spot" if instance.get("InstanceLifecycle") == "spot" else "on-demand",
        gpu=gpu,
        image=str(instance.get("ImageId", "")),
        cause="" if address else f"{number} has no {given.address if given and given.address else ''} address",
    )
    return Host(
        name=name,
        kind=HostKind.EC2,
        connection="ssh",
        address=address,
        user=given.user if given else None,
        port=given.port if given else None,
        identity_file=given.identity_file if given else None,
        python=given.python if given else None,
        notes={**campaign.notes, **(given.notes if given else {})},
        entry=entry,
        usd_per_hour=given.usd_per_hour if given else None,
        instance=found,
    )


def _gone(host: Host, asked: Iterable[Source], *, home: bool) -> Host:
    """A host that an earlier inventory found, and this one did not."""
    assert host.instance is not None  # noqa: S101 - only such are asked about
    cause = f"{host.instance.id} is not among the running instances with {' or '.join(map(str, asked))} any more"
    if home:
        cause = f"finished: all its units are home; {cause}"
    return replace(host, address="", instance=replace(host.instance, cause=cause, home=home))
