"""The `cloud:` section of fleet.yml: which instances to launch, for how long, and what they may cost. Values only."""

from ipaddress import IPv4Network
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

HOSTS_LIMIT = 1000
"""Instances of one campaign: a slip of the finger must not buy a data centre."""
REGION = r"^[a-z]{2}(-[a-z]+)+-\d{1,2}$"
INSTANCE_TYPE = r"^[a-z][a-z0-9-]*\.[a-z0-9-]+$"


class Strict(BaseModel):
    """Unknown keys are errors; values cannot be changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _once(listed: tuple[str, ...]) -> tuple[str, ...]:
    if twice := [name for name in listed if listed.count(name) > 1]:
        raise ValueError(f"{twice[0]} is listed twice")
    return listed


class InstanceEntry(Strict):
    """Some instances of one sort: they become the hosts NAME-1, NAME-2 and so on."""

    name: str = Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9-]{0,60}[A-Za-z0-9])?$", description="g5: hosts g5-1, g5-2, …")
    count: int = Field(1, ge=1, le=HOSTS_LIMIT)
    types: Annotated[tuple[Annotated[str, Field(pattern=INSTANCE_TYPE)], ...], AfterValidator(_once)] = Field(
        min_length=1,
        description="instance types, the best first: the next is tried when none of the first is to be had",
    )
    regions: Annotated[tuple[Annotated[str, Field(pattern=REGION)], ...], AfterValidator(_once)] = Field(
        (), description="over the section's regions"
    )
    zones: Annotated[tuple[Annotated[str, Field(pattern=r"^[a-z0-9-]+[a-z]$")], ...], AfterValidator(_once)] = Field(
        (), description="availability zones, the best first; all that offer the type when left out"
    )
    market: Literal["on-demand", "spot", "spot-then-on-demand"] = "on-demand"
    image_parameter: str | None = Field(None, pattern="^/", description="over the section's")
    volume_gib: int | None = Field(None, ge=8, le=16384)
    notes: dict[str, str] = Field({})


class ResultsBucket(Strict):
    """Where hosts put verified unit folders, for fleets too large to pull from."""

    bucket: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    prefix: str = Field("", pattern=r"^[A-Za-z0-9!_.*'()/-]{0,200}$")
    region: str | None = Field(None, pattern=REGION)


class CloudSettings(Strict):
    """EC2 instances that `fleet bench` launches, and ends when their results are home."""

    instances: tuple[InstanceEntry, ...] = Field(min_length=1)
    max_cost: float = Field(
        gt=0, description="US dollars: nothing is launched that could cost more until its lease ends"
    )
    prices: dict[
        Annotated[str, Field(pattern=INSTANCE_TYPE)], Annotated[float, Field(gt=0, lt=10_000, allow_inf_nan=False)]
    ] = Field(
        {}, description="US dollars an hour on demand, by type, over AWS's: your discount, or a type without a price"
    )
    lease_hours: float = Field(4.0, ge=0.01, le=168, description="after so long an instance ends itself")
    regions: Annotated[tuple[Annotated[str, Field(pattern=REGION)], ...], AfterValidator(_once)] = Field(
        ("us-east-1",), min_length=1, description="the best first"
    )
    owner: str | None = Field(
        None, pattern=r"^[A-Za-z0-9@._/:+=-]{1,200}$", description="a tag; your AWS identity if none"
    )
    partial: bool = Field(default=False, description="go on with fewer instances when no more are to be had")
    user: str = Field("ubuntu", pattern=r"^[a-z_][a-z0-9_-]{0,31}$", description="login user of the image")
    python: str | None = Field(None, description="path of Python 3.11 or newer on the image")
    image_parameter: str | None = Field(
        None,
        pattern="^/",
        description="SSM parameter that holds the AMI id; AWS's Deep Learning Base AMI (Ubuntu) if none",
    )
    volume_gib: int = Field(150, ge=8, le=16384)
    subnets: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]+[a-z]$")], str] = Field(
        {}, description="availability zone to subnet id; the default VPC's when left out"
    )
    address: Literal["auto", "public", "private"] = Field(
        "auto", description="which address to reach instances at; auto: private when fleet runs in their VPC"
    )
    ssh_from: IPv4Network | None = Field(None, description="who may ssh in; this machine's own address when left out")
    results: ResultsBucket | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "CloudSettings":
        names = [entry.name for entry in self.instances]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"instances {twice[0]} is listed twice")
        if (total := sum(entry.count for entry in self.instances)) > HOSTS_LIMIT:
            raise ValueError(f"{total} instances; at most {HOSTS_LIMIT}")
        return self

    def hosts(self) -> tuple[tuple[str, InstanceEntry], ...]:
        """Every host to be, by name, with its entry."""
        return tuple(
            (f"{entry.name}-{number}", entry) for entry in self.instances for number in range(1, entry.count + 1)
        )

    def names(self) -> list[str]:
        """The names of these hosts, in order."""
        return [name for name, _ in self.hosts()]
