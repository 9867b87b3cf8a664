"""A session with leases, as `up` leaves them, without any EC2."""

import time
from pathlib import Path
from typing import Any

from fleet import campaign as campaigns
from fleet import session as sessions
from fleet.campaign import Campaign
from fleet.cloud import leases
from fleet.cloud.leases import Lease, Leased, LeaseState
from fleet.session import Session

CAMPAIGN = """\
submitter: ExampleLab
benchmarks: [{name: tiny-bert, scenarios: [Offline], modes: [performance]}]
notes: {cooling: air}
cloud:
  max_cost: 100
  instances:
    - {name: g5, count: 3, types: [g5.xlarge], notes: {hw_notes: rented}}
    - {name: big, types: [g6.12xlarge]}
"""
"""Three instances and one."""
NOW = time.time()


def session(base: Path, text: str = CAMPAIGN) -> tuple[Session, Campaign]:
    """A new one."""
    return sessions.create(base, text, name="s1"), campaigns.load_text(text, "fleet.yml")


def lease(number: int, *hosts: str, **changes: Any) -> Lease:
    """The how manyth lease of a session; its instances are all there unless `instances` says otherwise."""
    given = tuple(leased(number, index, host) for index, host in enumerate(hosts))
    values: dict[str, Any] = {
        "id": f"lease-{number:024}",
        "hosts": hosts,
        "region": "us-east-1",
        "zone": "us-east-1a",
        "subnet": "subnet-1",
        "type": "g5.xlarge",
        "market": "on-demand",
        "image": "ami-1",
        "root_device": "/dev/sda1",
        "volume_gib": 150,
        "key_name": "k",
        "security_group": "sg-1",
        "owner": "me",
        "usd_per_hour": 1.006,
        "price_source": "table",
        "gpu": "a10g",
        "written_at": NOW - 1000 + number,
        "first_expires_at": NOW + 3600,
        "expires_at": NOW + 3600,
        "state": LeaseState.LAUNCHED,
        "instances": given,
    }
    return Lease(**{**values, **changes})


def leased(number: int, index: int, host: str, **changes: Any) -> Leased:
    """One instance of it."""
    values: dict[str, Any] = {
        "id": f"i-{number}{index}",
        "host": host,
        "zone": "us-east-1a",
        "private_address": f"10.0.{number}.{index}",
        "public_address": f"203.0.113.{index}",
        "launched_at": NOW - 60,
    }
    return Leased(**{**values, **changes})


def write(made: Session, *listed: Lease) -> None:
    """Put them into the session."""
    for item in listed:
        leases.write(made, item)
