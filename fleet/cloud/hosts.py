"""Instances that fleet launches, as hosts: every one that the campaign asks for, there or not. Asks nobody.

What the ledger says becomes an address, or the cause why there is none: no host disappears.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from fleet import handoff
from fleet.campaign import Campaign
from fleet.cloud import keys, leases
from fleet.cloud.leases import Lease, Leased, LeaseState
from fleet.cloud_settings import CloudSettings
from fleet.inventory.hosts import Host, Instance
from fleet.session import Session
from fleet.terms import HostKind

BOOT_S = 600.0
"""So long after its launch an instance may take to answer ssh; with eight GPUs it takes minutes."""


LATE_S = 120.0
"""So long after the end of its lease an instance may take to end itself, by a clock of its own."""


def planned(session: Session, campaign: Campaign) -> tuple[Host, ...]:
    """One host for each of `cloud.instances`, in their order; those without an instance say why in `instance.cause`.

    Raises SessionError when a file of the session cannot be read.
    """
    if campaign.cloud is None:
        return ()
    ledger, lacked = leases.read(session), lacking(session)
    there, home = leases.live(ledger), finished(session)
    settings, token = campaign.cloud, session.token
    found = []
    for name, entry in settings.hosts():
        address, instance = "", _gone(name, ledger, lacked.get(name, ""), home=name in home)
        if now := there.get(name):
            address, instance = _address(settings, now[1]), _running(session, *now)
        if now and time.time() > leases.latest_end(now[0]) + LATE_S:
            ended = _text(leases.latest_end(now[0]))
            instance = replace(instance, home=name in home, cause=f"the lease of {instance.id} ended at {ended}")
        elif now and not address:
            instance = replace(instance, cause=f"{instance.id} has no {_words(settings)}")
        found.append(
            Host(
                name=name,
                kind=HostKind.EC2,
                connection="ssh",
                address=address,
                user=settings.user,
                identity_file=login_key(token),
                python=settings.python,
                notes={**campaign.notes, **entry.notes},
                entry=settings.instances.index(entry),
                usd_per_hour=now[0].usd_per_hour if now else None,
                instance=instance,
            )
        )
    return tuple(found)


def lack(session: Session, asked: Iterable[str], causes: Mapping[str, str]) -> None:
    """Keep why hosts that were asked for got no instance: cloud/lacking.json, host to cause."""
    known = lacking(session)
    found = {name: cause for name, cause in known.items() if name not in asked} | dict(causes)
    if found != known:
        session.write(_lacking_file(session), found)


def lacking(session: Session) -> dict[str, str]:
    """What `lack` kept."""
    path = _lacking_file(session)
    return session.read(path, dict[str, str]) if path.is_file() else {}


def _lacking_file(session: Session) -> Path:
    return session.cloud / "lacking.json"


def login_key(token: str) -> str:
    """Path of the private key that instances of a session let in."""
    return str(keys.folder(token) / "login")


def trusted(session: Session) -> tuple[str, str]:
    """Path of the file with the host key of the session's instances, and its name there."""
    return str(keys.known_hosts(session).resolve()), keys.alias(session.token)


def finished(session: Session) -> frozenset[str]:
    """Hosts whose units are all done and verified at home: they need no instance any more."""
    if not handoff.planned(session):
        return frozenset()
    return frozenset(spec.host for spec in handoff.plan(session).units) - handoff.lacking(session)


def _address(settings: CloudSettings, leased: Leased) -> str:
    """Where to reach an instance; empty when it has no such address."""
    if settings.address == "public":
        return leased.public_address
    # Those that are launched from within their VPC are given no public one.
    return leased.private_address if settings.address == "private" else leased.public_address or leased.private_address


def _words(settings: CloudSettings) -> str:
    if settings.address == "public":
        return "public address: a subnet that gives one under cloud.subnets, or cloud.address: private"
    return "address yet"


def _running(session: Session, lease: Lease, leased: Leased) -> Instance:
    """An instance that is there, as far as is known."""
    known_hosts, alias = trusted(session)
    return replace(
        _of(lease, leased),
        known_hosts=known_hosts,
        key_alias=alias,
        patience_s=max(0.0, min(BOOT_S, leased.launched_at + BOOT_S - time.time())),
    )


def _of(lease: Lease, leased: Leased | None) -> Instance:
    return Instance(
        id=leased.id if leased else "",
        lease=lease.id,
        type=lease.type,
        region=lease.region,
        zone=(leased.zone if leased else "") or lease.zone,
        market=lease.market,
        gpu=lease.gpu,
        image=lease.image,
    )


def _gone(name: str, ledger: Sequence[Lease], lacked: str, *, home: bool) -> Instance:
    """A host without an instance: what the last one was, and why there is none, as its leases tell it, oldest first.

    `lacked` is why it got none where no lease says so: what EC2 refused others was not asked again for it.
    """
    tried = [lease for lease in ledger if name in lease.hosts]
    last, ended = Instance(), ""
    refused: list[str] = []
    for lease in tried:
        leased = next((item for item in lease.instances if item.host == name), None)
        if leased is not None:
            last, ended, refused = _of(lease, leased), _end(leased), []
        elif said := _refusal(lease):
            refused.append(said)
    causes = [*([ended] if ended else []), *(dict.fromkeys(refused) or filter(None, [lacked]))]
    if home:
        return replace(last, home=True, cause="; ".join(["finished: all its units are home", *causes[:1]]))
    return replace(last, cause="; ".join(causes) or "not launched yet")


def _end(leased: Leased) -> str:
    when = f" at {_text(leased.ended_at)}" if leased.ended_at else ""
    return f"{leased.id} ended{when}" + (f": {leased.cause}" if leased.cause else "")


def _text(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _refusal(lease: Lease) -> str:
    """Why a lease brought a host no instance; empty where that is not known."""
    what = f"{lease.type}, {lease.market}, {lease.zone or lease.region}"
    match lease.state:
        case LeaseState.REFUSED:
            return f"{lease.code or lease.cause or 'refused'} ({what})"
        case LeaseState.INTENDED:
            return f"its launch was not seen to end ({what})"
        case _:
            return f"EC2 gave {len(lease.instances)} of {len(lease.hosts)} ({what})"
