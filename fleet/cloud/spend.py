"""What instances have cost and can still cost, from lease times and the prices that were recorded with them.

Linux instances are billed by the second, a minute at least. Volumes and public addresses are counted by the table's
prices; traffic out of AWS is in none of these numbers. Asks nobody: it works on a session folder that was mailed.
"""

import time
from collections.abc import Collection, Iterable

from fleet.cloud import leases
from fleet.cloud.leases import Lease, Leased, LeaseState
from fleet.cloud.price_table import table
from fleet.handoff import InstanceSpend, Spend, spend_file
from fleet.session import Session

LEAST_S = 60.0
"""What EC2 bills at least."""


def write(session: Session) -> Spend | None:
    """Write cloud/spend.json, which results, submission and report read; None when nothing was ever leased.

    Raises SessionError when a lease cannot be read.
    """
    known = leases.read(session)
    if not known:
        return None
    found = of(known, time.time())
    session.write(spend_file(session), found)
    return found


def usd(usd_per_hour: float, seconds: float) -> float:
    """US dollars for so many seconds of an instance."""
    return usd_per_hour * max(LEAST_S, seconds) / 3600


def of(known: Iterable[Lease], now: float) -> Spend:
    """Every instance that was launched, from its launch until it ended.

    One that was not seen to be gone is counted until `now`, or until its timer must have ended it.
    """
    found = [_instance(lease, leased, now) for lease in known for leased in lease.instances]
    return Spend(at=now, instances=tuple(found), besides_source=table().cited)


def most(known: Iterable[Lease], now: float, without: Collection[str] = ()) -> float:
    """US dollars that these leases have cost or can still cost until they end, volumes and addresses too.

    Of a lease whose call may or may not have been carried out, hosts that are in `without` are not counted.
    """
    total = 0.0
    for lease in known:
        each = lease.usd_per_hour + table().besides(lease.volume_gib, public=lease.public)
        for leased in lease.instances:
            until = max(now, _latest(lease, leased)) if leased.ended_at is None else leased.ended_at
            total += usd(each, until - _from(lease, leased))
        if lease.state is LeaseState.INTENDED:
            there = {leased.host for leased in lease.instances}
            maybe = [host for host in lease.hosts if host not in there and host not in without]
            total += len(maybe) * usd(each, max(now, leases.latest_end(lease)) - lease.written_at)
    return total


def _instance(lease: Lease, leased: Leased, now: float) -> InstanceSpend:
    until = min(now, _latest(lease, leased)) if leased.ended_at is None else leased.ended_at
    seconds = until - _from(lease, leased)
    return InstanceSpend(
        id=leased.id,
        host=leased.host,
        lease=lease.id,
        type=lease.type,
        region=lease.region,
        zone=leased.zone or lease.zone,
        market=lease.market,
        usd_per_hour=lease.usd_per_hour,
        price_source=lease.price_source,
        launched_at=_from(lease, leased),
        ended_at=leased.ended_at,
        usd=usd(lease.usd_per_hour, seconds),
        besides_usd=usd(table().besides(lease.volume_gib, public=lease.public), seconds),
    )


def _latest(lease: Lease, leased: Leased) -> float:
    """When the timer of one instance ends it at the latest."""
    return max(lease.may_expire_at, leases.end_of(lease, leased))


def _from(lease: Lease, leased: Leased) -> float:
    return leased.launched_at or lease.written_at
