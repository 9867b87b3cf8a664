"""The ledger of a session: one lease per RunInstances call, on disk before the call is made.

A lease says everything that the call needs but the secrets, so that a call whose answer was lost is made again word for
word: its id is the client token. Files: sessions/<id>/cloud/leases/<lease id>.json.
"""

import os
import secrets
from dataclasses import dataclass, field
from enum import StrEnum

from fleet.session import Session

TAG = "mlperf-fleet"
"""Tag keys of ours begin so. Nothing without the lease tag is ever touched."""
LEASE_TAG, SESSION_TAG, OWNER_TAG, EXPIRY_TAG = (f"{TAG}:{name}" for name in ("lease", "session", "owner", "expires"))


class LeaseState(StrEnum):
    """How far a lease has come."""

    INTENDED = "intended"
    """Written before the call: instances may exist, nobody knows yet."""
    LAUNCHED = "launched"
    """Its instances are known."""
    REFUSED = "refused"
    """EC2 said no: no instance was made."""
    ENDED = "ended"
    """DescribeInstances says that all its instances are terminated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """One instance of a lease."""

    id: str
    """`i-…`"""
    host: str
    """The host that it is in the inventory; empty for one too many, which is ended."""
    zone: str = ""
    private_address: str = ""
    public_address: str = ""
    launched_at: float = 0.0
    """Unix seconds, by EC2's clock."""
    ended_at: float | None = None
    """Unix seconds by the controller's clock: when it was seen to be terminated."""
    cause: str = ""
    """Why it ended before it was taken down: `spot interruption`, `lease expired`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One RunInstances call: what it asks for, until when, and what came of it."""

    id: str
    """Also the client token and the value of the lease tag."""
    hosts: tuple[str, ...]
    """Hosts to be, in the order of AmiLaunchIndex."""
    region: str
    zone: str
    """The availability zone; empty lets EC2 choose."""
    subnet: str
    type: str
    market: str
    """`on-demand` or `spot`."""
    image: str
    root_device: str
    volume_gib: int
    key_name: str
    security_group: str
    owner: str
    usd_per_hour: float
    """Of one instance, as known at launch."""
    price_source: str
    """`pricing-api 2026-11-25`, `spot-history 2026-11-25`, `table 2026-11-01`."""
    gpu: str = ""
    written_at: float
    """Unix seconds."""
    first_expires_at: float
    """What user data was made with: the call cannot be repeated with another."""
    expires_at: float
    """Unix seconds; `fleet extend` moves it."""
    state: LeaseState = LeaseState.INTENDED
    code: str = ""
    """AWS's word for a refusal."""
    cause: str = ""
    instances: tuple[Leased, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)
    schema: int = 1


def new_id() -> str:
    """A client token: at most 64 ASCII characters."""
    return f"lease-{secrets.token_hex(12)}"


def write(session: Session, lease: Lease) -> None:
    """Write a lease and return when it is on disk, folder entry too."""
    folder = session.cloud / "leases"
    path = folder / f"{lease.id}.json"
    session.write(path, lease)
    for place in (path, folder):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(session: Session) -> tuple[Lease, ...]:
    """Every lease of the session, the oldest first.

    Raises SessionError when one cannot be read.
    """
    found = [session.read(path, Lease) for path in sorted((session.cloud / "leases").glob("*.json"))]
    return tuple(sorted(found, key=lambda lease: (lease.written_at, lease.id)))


def live(leases: tuple[Lease, ...]) -> dict[str, tuple[Lease, Leased]]:
    """Host name to the instance it is now, with its lease; hosts without one are not in it."""
    return {
        leased.host: (lease, leased)
        for lease in leases
        for leased in lease.instances
        if leased.host and leased.ended_at is None and lease.state is LeaseState.LAUNCHED
    }
