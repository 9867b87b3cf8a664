"""Leases for tests: of two hours, at one dollar an hour, until NOW."""

from typing import Any

from fleet.cloud.leases import Lease, Leased, LeaseState

NOW = 1_800_000_000.0
LAUNCHED = NOW - 7200


def leased(host: str, **changes: Any) -> Leased:
    values: dict[str, Any] = {"id": f"i-{host}", "host": host, "zone": "us-east-1a", "launched_at": LAUNCHED}
    return Leased(**(values | changes))


def lease(**changes: Any) -> Lease:
    values: dict[str, Any] = {
        "id": "lease-1",
        "hosts": ("a-1", "a-2"),
        "region": "us-east-1",
        "zone": "",
        "subnet": "",
        "type": "g5.xlarge",
        "market": "on-demand",
        "image": "ami-1",
        "root_device": "/dev/sda1",
        "volume_gib": 150,
        "key_name": "k",
        "security_group": "sg-1",
        "owner": "o",
        "usd_per_hour": 1.0,
        "price_source": "pricing-api 2026-11-25",
        "written_at": LAUNCHED,
        "first_expires_at": NOW + 3600,
        "expires_at": NOW + 3600,
        "state": LeaseState.LAUNCHED,
    }
    return Lease(**(values | changes))
