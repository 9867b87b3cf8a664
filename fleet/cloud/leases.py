"""The ledger of a session: one lease per RunInstances call, on disk before the call is made.

A lease says everything that the call needs but the secrets, so that a call whose answer was lost is made again word for
word: its id is the client token. Files: sessions/<id>/cloud/leases/<lease id>.json.
"""

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

import filelock

from fleet.session import Session

TAG = "mlperf-fleet"
"""Tag keys of ours begin so. Nothing without the lease tag is ever touched."""
LEASE_TAG, SESSION_TAG, OWNER_TAG, EXPIRY_TAG = (f"{TAG}:{name}" for name in ("lease", "session", "owner", "expires"))


TAKEN_BACK = "spot interruption"
"""Leased.cause of an instance that EC2 took back."""


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
    """Of one that is reached by it; empty where fleet runs in the instance's network."""
    launched_at: float = 0.0
    """Unix seconds, by EC2's clock."""
    ended_at: float | None = None
    """Unix seconds: when it ended, by EC2's clock where it says so, else when it was seen to be terminated."""
    cause: str = ""
    """Why it ended before it was taken down: `spot interruption`, `lease expired`."""
    expires_at: float = 0.0
    """Its own end where its timer was moved and another one of its lease was not; 0 is the lease's."""


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
    public: bool = False
    """Whether it asks for public addresses, by which its instances are reached."""
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
    """Unix seconds; `fleet extend` moves it. No instance's timer is earlier, so that it is there until then."""
    may_expire_at: float = 0.0
    """The latest end that any timer may have, where that is later: an extension is under way, or was not answered."""
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


def change(session: Session, lease: str, how: Callable[[Lease], Lease]) -> Lease:
    """Read one lease, write what `how` makes of it, and return that when it is on disk.

    Beside a controller that holds the session `fleet extend` writes leases too: whoever changes one does it here.
    Raises SessionError when it cannot be read.
    """
    with filelock.FileLock(session.cloud / "leases.lock"):
        before = session.read(session.cloud / "leases" / f"{lease}.json", Lease)
        after = how(before)
        if after != before:
            write(session, after)
    return after


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


def end_of(lease: Lease, leased: Leased) -> float:
    """When the timer of an instance ends it, as far as is known for sure: Unix seconds."""
    return leased.expires_at or lease.expires_at


def latest_end(lease: Lease) -> float:
    """Until when instances of a lease may run at most: Unix seconds."""
    return max([lease.expires_at, lease.may_expire_at, *(leased.expires_at for leased in lease.instances)])


def end_unseen(lease: Lease, leased: Leased, now: float) -> float:
    """When an instance ended that is gone by `now`, and nobody says when: its timer did it at the latest. Unix seconds."""
    return max(leased.launched_at, min(now, latest_end(lease)))


def expiry_text(at: float) -> str:
    """The value of the expiry tag: `2026-11-25T12:00:00Z`."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def expiry(text: str) -> float | None:
    """Unix seconds of an expiry tag; None when it says no time."""
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None
