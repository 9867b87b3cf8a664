"""What instances have cost and can still cost: arithmetic over lease times and the prices that were recorded. No IO.

Linux instances are billed by the second, a minute at least. Volumes and public addresses are counted by the table's
prices; traffic out of AWS is in none of these numbers.
"""

from collections.abc import Collection, Iterable

from fleet.cloud.leases import Lease, Leased, LeaseState, end_of
from fleet.cloud.prices import table
from fleet.handoff import InstanceSpend, Spend

LEAST_S = 60.0
"""What EC2 bills at least."""


def usd(usd_per_hour: float, seconds: float) -> float:
    """US dollars for so many seconds of an instance."""
    return usd_per_hour * max(LEAST_S, seconds) / 3600


def of(leases: Iterable[Lease], now: float) -> Spend:
    """Every instance that was launched, from its launch until it was seen to be gone, or until `now`."""
    found = [_instance(lease, leased, now) for lease in leases for leased in lease.instances]
    return Spend(at=now, instances=tuple(found), besides_source=table().cited)


def most(leases: Iterable[Lease], now: float, without: Collection[str] = ()) -> float:
    """US dollars that these leases have cost or can still cost until they end, volumes and addresses too.

    Of a lease whose call may or may not have been carried out, hosts that are in `without` are not counted.
    """
    total = 0.0
    for lease in leases:
        besides = table().besides(lease.volume_gib, public=True)
        for leased in lease.instances:
            latest = max(lease.may_expire_at, end_of(lease, leased))
            until = latest if leased.ended_at is None else leased.ended_at
            total += usd(
                lease.usd_per_hour + besides, max(until, now if leased.ended_at is None else 0) - _from(lease, leased)
            )
        if lease.state is LeaseState.INTENDED:
            known = {leased.host for leased in lease.instances}
            open_ = [host for host in lease.hosts if host not in known and host not in without]
            total += len(open_) * usd(lease.usd_per_hour + besides, lease.expires_at - lease.written_at)
    return total


def _instance(lease: Lease, leased: Leased, now: float) -> InstanceSpend:
    seconds = (now if leased.ended_at is None else leased.ended_at) - _from(lease, leased)
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
        besides_usd=usd(table().besides(lease.volume_gib, public=bool(leased.public_address)), seconds),
    )


def _from(lease: Lease, leased: Leased) -> float:
    return leased.launched_at or lease.written_at
