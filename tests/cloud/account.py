"""moto's own memory, looked at and nudged from within its process: what the API would not let a test do."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moto.core import DEFAULT_ACCOUNT_ID
from moto.ec2.models import ec2_backends
from moto.ec2.models.amis import Ami

OURS = "mlperf-fleet:"
"""Tag keys of ours begin so."""
_CODES = {"pending": 0, "running": 16, "shutting-down": 32, "terminated": 48}
Found = dict[str, list[str]]


def regions() -> Iterator[tuple[str, Any]]:
    """Every region that anybody has asked so far, with what moto keeps of it."""
    yield from list(ec2_backends[DEFAULT_ACCOUNT_ID].items())


def backend(region: str) -> Any:
    """What moto keeps of a region."""
    return ec2_backends[DEFAULT_ACCOUNT_ID][region]


def instances(region: str | None = None) -> Iterator[Any]:
    """Every instance, ended ones too."""
    for name, kept in regions():
        if region in {None, name}:
            yield from kept.all_instances()


def find(instance: str) -> Any:
    """One instance by its id."""
    return next((found for found in instances() if found.id == instance), None)


def put(instance: Any, state: str) -> None:
    """Set its state, whatever it was."""
    instance._state.name, instance._state.code = state, _CODES[state]


def tags(kept: Any, resource: str) -> dict[str, str]:
    """Tags of a resource."""
    return dict(kept.tags.get(resource, {}))


def standing(*, ours: bool = True) -> Found:
    """Ids of what costs money or could be left behind, in all regions; only with our tags, or all that is not EC2's own."""
    found: Found = {"instances": [], "key_pairs": [], "groups": [], "volumes": []}
    for _, kept in regions():
        named = {
            "instances": [item.id for item in kept.all_instances() if item.state != "terminated"],
            "key_pairs": [item.id for item in kept.key_pairs.values()],
            "groups": [
                item.id for vpc in kept.groups.values() for item in list(vpc.values()) if item.name != "default"
            ],
            "volumes": list(kept.volumes),
        }
        for sort, ids in named.items():
            found[sort] += [one for one in ids if not ours or any(key.startswith(OURS) for key in tags(kept, one))]
    return found


def deep_learning_image(region: str, name: str, architecture: str) -> str:
    """The id of a Deep Learning AMI: registered when first asked for."""
    kept = backend(region)
    image = f"ami-{hashlib.sha256(f'{region} {name} {architecture}'.encode()).hexdigest()[:17]}"
    if image not in kept.amis:
        kept.amis[image] = Ami(
            kept,
            image,
            name=f"Deep Learning {name} ({architecture}) 20251121",
            owner_alias="amazon",
            public=True,
            virtualization_type="hvm",
            architecture=architecture,
            image_location=f"amazon/{name}",
            hypervisor="xen",
            root_device_type="ebs",
            root_device_name="/dev/sda1",
            region_name=f"{region}a",
        )
    return image


def end(instance: Any, code: str, message: str) -> None:
    """EC2 ends it, not its owner: `Server.SpotInstanceTermination`, `Client.InstanceInitiatedShutdown`."""
    if instance.state in {"pending", "running"}:
        instance.ec2_backend.terminate_instances([instance.id])
    put(instance, "terminated")
    instance.state_reason.code, instance.state_reason.message = code, f"{code}: {message}"


def forget_default_vpc(region: str) -> None:
    """An account whose owner has deleted the default VPC."""
    kept = backend(region)
    for vpc in kept.vpcs.values():
        vpc.is_default = "false"
    for zone in kept.subnets.values():
        for subnet in zone.values():
            subnet.default_for_az = "false"


@dataclass
class Change:
    """A state that is about to become another one: after a time, and so many looks at instances."""

    before: str
    after: str
    when: float
    looks: int


@dataclass
class Slowness:
    """How long things take that moto has at once; for instances made, or ended, while it is set."""

    pending_s: float = 0.0
    pending_calls: int = 0
    ending_s: float = 0.0
    ending_calls: int = 0
    hidden_s: float = 0.0
    hidden_calls: int = 0
    due: dict[str, Change] = field(default_factory=dict)
    """By instance."""
    hidden: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Instance to until when, and for how many more looks, nobody can see it."""

    def made(self, ids: list[str]) -> None:
        """These were just launched."""
        now = time.monotonic()
        for one in ids:
            if self.pending_s or self.pending_calls:
                put(find(one), "pending")
                self.due[one] = Change("pending", "running", now + self.pending_s, self.pending_calls)
            if self.hidden_s or self.hidden_calls:
                self.hidden[one] = (now + self.hidden_s, self.hidden_calls)

    def ended(self, ids: list[str]) -> None:
        """These were just terminated."""
        for one in ids if self.ending_s or self.ending_calls else ():
            known = self.due.get(one)
            if (instance := find(one)) is not None and (known is None or known.before != "shutting-down"):
                put(instance, "shutting-down")
                when = time.monotonic() + self.ending_s
                self.due[one] = Change("shutting-down", "terminated", when, self.ending_calls)

    def settle(self, *, looking: bool = False) -> None:
        """Let happen what is due; a look counts."""
        now = time.monotonic()
        for one, change in list(self.due.items()):
            instance = find(one)
            if instance is None or instance.state != change.before:
                del self.due[one]
            elif now >= change.when and change.looks <= 0:
                put(instance, change.after)
                del self.due[one]
            elif looking:
                change.looks -= 1

    def unseen(self, *, looking: bool) -> set[str]:
        """Instances that EC2 does not show yet; a look counts."""
        now = time.monotonic()
        found = {one for one, (until, left) in self.hidden.items() if now < until or left > 0}
        for one in found if looking else ():
            until, left = self.hidden[one]
            self.hidden[one] = (until, left - 1)
        return found
