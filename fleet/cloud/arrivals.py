"""Instances between their launch and their end, as EC2 tells it: entered into the ledger, awaited, and ended where too many.

One DescribeInstances, page after page, for all instances of a session in a region.
"""

import functools
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from fleet.cloud import described, ending, leases
from fleet.cloud.described import Described
from fleet.cloud.launch import CONSISTENT_AFTER_S, entered
from fleet.cloud.leases import SESSION_TAG, Lease, Leased, LeaseState
from fleet.session import Session
from fleet.watch import Watch

ARRIVE_S = 600.0
"""So long instances may take until they run and have their address."""
PAUSE_S, PAUSE_AT_MOST_S = 1.0, 10.0
"""Between two looks: doubling, and no more than that."""
FORGOTTEN_AFTER_S = 3600.0
"""EC2 forgets terminated instances about then."""


def reconcile(session: Session) -> dict[str, Described]:
    """Bring the ledger to what EC2 says, end what is no host's, and return every instance of the session by its id.

    Instances of a lease that it does not know (an answer that was lost) become those of its hosts that lack one; an
    instance too many is entered without a host, and terminated. Leases that are INTENDED are left alone.

    Raises CloudError.
    """
    now = time.time()
    ledger = [lease for lease in leases.read(session) if _may_change(lease, now)]
    found = {
        instance.id: instance
        for region in dict.fromkeys(lease.region for lease in ledger)
        for instance in _there(session, region, [lease for lease in ledger if lease.region == region])
    }
    for lease in ledger:
        mine = [each for each in found.values() if each.lease == lease.id and each.state not in described.ENDING]
        elsewhere = {
            host: leased.id
            for host, (other, leased) in leases.live(leases.read(session)).items()
            if other.id != lease.id
        }
        leases.change(session, lease.id, functools.partial(_brought, more=mine, taken=elsewhere, found=found, now=now))
    _end_leftovers(session, found)
    return found


def wait(session: Session, watch: Watch, hosts: Collection[str]) -> dict[str, str]:
    """Wait until the instances of these hosts run and have the address to reach them at.

    Returns the cause for each whose instance ended instead, or did not come in time; that is terminated. Raises CloudError.
    """
    awaited = {host: leased.id for host, (_, leased) in leases.live(leases.read(session)).items() if host in hosts}
    last, pause = time.monotonic() + ARRIVE_S, PAUSE_S
    while True:
        seen = reconcile(session)
        there = leases.live(leases.read(session))
        late = [host for host, id_ in awaited.items() if host in there and not _arrived(*there[host], seen.get(id_))]
        if not late and not _over(session, seen):
            break
        for host in late:
            state = seen[awaited[host]].state if awaited[host] in seen else "not seen yet"
            watch.host(host, f"{there[host][0].type} {awaited[host]}: {state or 'pending'}")
        if time.monotonic() > last:
            for host in late:
                _give_up(session, *there[host])
            reconcile(session)
            there = leases.live(leases.read(session))
            break
        time.sleep(pause)
        pause = min(pause * 2, PAUSE_AT_MOST_S)
    for host in awaited.keys() & there.keys():
        lease, leased = there[host]
        watch.host(host, f"{lease.type} {leased.id} runs in {leased.zone}", ended=True)
    causes = _causes(session)
    return {host: causes.get(id_, "it ended") for host, id_ in awaited.items() if host not in there}


def _there(session: Session, region: str, ledger: Sequence[Lease]) -> list[Described]:
    """What carries the session's tag, and what its leases know besides: EC2 takes tags off what has been terminated."""
    tagged = described.instances(region, SESSION_TAG, [session.token])
    return tagged + described.untagged(region, ledger, tagged)


def _may_change(lease: Lease, now: float) -> bool:
    if lease.state is LeaseState.REFUSED:
        # What was called refused for want of an answer may still show itself.
        return now - lease.written_at < CONSISTENT_AFTER_S
    return lease.state is LeaseState.LAUNCHED


def _brought(
    lease: Lease, *, more: Sequence[Described], taken: Mapping[str, str], found: Mapping[str, Described], now: float
) -> Lease:
    """The lease as its instances are."""
    lease = entered(lease, more, taken)
    instances = tuple(_as_seen(lease, leased, found.get(leased.id), now) for leased in lease.instances)
    over = lease.state is LeaseState.LAUNCHED and all(leased.ended_at is not None for leased in instances)
    return replace(lease, instances=instances, state=LeaseState.ENDED if over else lease.state)


def _as_seen(lease: Lease, leased: Leased, seen: Described | None, now: float) -> Leased:
    if leased.ended_at is not None:
        return leased
    if seen is None:
        if now - max(leased.launched_at, lease.written_at) < FORGOTTEN_AFTER_S:
            return leased
        at = leases.end_unseen(lease, leased, now)
        return replace(leased, ended_at=at, cause=leased.cause or "EC2 does not know it any more")
    if seen.state == described.GONE:
        cause = leased.cause or described.why_ended(seen, leases.end_of(lease, leased))
        at = described.ended_at(seen) or leases.end_unseen(lease, leased, now)
        return replace(leased, ended_at=at, cause=cause)
    return replace(
        leased,
        zone=seen.zone or leased.zone,
        private_address=seen.private_address or leased.private_address,
        public_address=(seen.public_address if lease.public else "") or leased.public_address,
        launched_at=seen.launched_at or leased.launched_at,
    )


def _arrived(lease: Lease, leased: Leased, seen: Described | None) -> bool:
    address = leased.public_address if lease.public else leased.private_address
    return seen is not None and seen.state == "running" and bool(address)


def _give_up(session: Session, lease: Lease, late: Leased) -> None:
    """Let an instance that did not come in time be no host's, so that it is ended."""
    cause = f"it did not run with an address within {ARRIVE_S:g} s"

    def without(known: Lease) -> Lease:
        return replace(
            known,
            instances=tuple(
                replace(leased, host="", cause=cause) if leased.id == late.id else leased for leased in known.instances
            ),
        )

    leases.change(session, lease.id, without)


def _end_leftovers(session: Session, found: dict[str, Described]) -> None:
    """Terminate what is entered without a host."""
    for region, ids in _over(session, found).items():
        # What cannot be ended now is tried again at the next look, and by `down`.
        ended = set(ids) - set(ending.terminate(region, ids))
        found.update({id_: replace(found[id_], state="shutting-down") for id_ in ended & found.keys()})


def _over(session: Session, found: Mapping[str, Described]) -> dict[str, list[str]]:
    """Instances of no host that do not end yet, by region."""
    over: dict[str, list[str]] = {}
    for lease in leases.read(session):
        for leased in lease.instances:
            is_ending = leased.id in found and found[leased.id].state in described.ENDING
            if not leased.host and leased.ended_at is None and not is_ending:
                over.setdefault(lease.region, []).append(leased.id)
    return over


def _causes(session: Session) -> dict[str, str]:
    return {leased.id: leased.cause for lease in leases.read(session) for leased in lease.instances if leased.cause}
