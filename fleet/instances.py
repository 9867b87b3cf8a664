"""Which instances a session needs now: those whose units are missing, and no others. fleet.cloud launches and ends them."""

import time
from collections.abc import Sequence
from dataclasses import replace

from fleet import handoff, retries
from fleet.campaign import Campaign
from fleet.cloud import leases
from fleet.errors import CloudError, LeakError
from fleet.session import Session
from fleet.subset import Subset
from fleet.terms import Reason, UnitState
from fleet.watch import Watch

FINISHED = "its units are done and home; its instance has ended"
NOT_AGAIN = "not asked again: only what was interrupted is"


def wanted(session: Session, campaign: Campaign, subset: Subset) -> list[str]:
    """Cloud hosts that need an instance: all of them before there is a plan, else those whose units are missing."""
    names = campaign.cloud.names() if campaign.cloud else []
    if handoff.planned(session):
        lacking = handoff.lacking(session)
        names = [name for name in names if name in lacking]
    return [name for name in names if not subset.left_out(name)]


def asked(session: Session, campaign: Campaign, subset: Subset) -> Subset:
    """The subset without cloud hosts that are finished with: nobody can ask them, and nobody needs to."""
    if campaign.cloud is None or not handoff.planned(session):
        return subset
    alive, lacking = leases.live(leases.read(session)), handoff.lacking(session)
    over = {name: FINISHED for name in campaign.cloud.names() if name not in alive and name not in lacking}
    return replace(subset, spared={**subset.spared, **over})


def interrupted(session: Session, campaign: Campaign) -> list[str]:
    """Cloud hosts that EC2 took back, with units that another instance may run."""
    if campaign.cloud is None or not handoff.planned(session):
        return []
    found = {unit.host for unit in handoff.records(session).values() if unit.reason is Reason.INTERRUPTED}
    # A host may vanish before anybody heard its notice; EC2 says why all the same.
    last = {leased.host: leased for lease in leases.read(session) for leased in lease.instances}
    found |= {host for host, leased in last.items() if leased.cause == leases.TAKEN_BACK}
    found &= handoff.lacking(session)
    return [name for name in campaign.cloud.names() if name in found]


def look(session: Session, watch: Watch) -> None:
    """Let the ledger know which instances have ended, where units of spot instances are missing."""
    from fleet.cloud import arrivals

    alive = leases.live(leases.read(session))
    if any(host in alive and alive[host][0].market == "spot" for host in handoff.lacking(session)):
        try:
            arrivals.reconcile(session)
        except CloudError as error:
            watch.note(f"EC2 did not say whether instances were taken back: {error.message}")


def tries(campaign: Campaign) -> int:
    """How often interrupted units are run on another instance in one outing."""
    return retries.policy(campaign, Reason.INTERRUPTED).times


def only(hosts: list[str], session: Session, subset: Subset) -> Subset:
    """The subset that asks these hosts alone."""
    others = {spec.host: NOT_AGAIN for spec in handoff.plan(session).units if spec.host not in hosts}
    return replace(subset, spared={**others, **subset.spared})


def may_run(session: Session) -> bool:
    """Whether instances of the session may run, as far as its ledger knows: for some that EC2 was asked for nobody does."""
    known = leases.read(session)
    return bool(leases.live(known)) or any(lease.state is leases.LeaseState.INTENDED for lease in known)


def left_running(session: Session) -> LeakError | None:
    """What to say when fleet stops and leaves instances to their lease; None when there are none."""
    if not may_run(session):
        return None
    alive = leases.live(leases.read(session))
    unsure = [lease for lease in leases.read(session) if lease.state is leases.LeaseState.INTENDED]
    ids = sorted(leased.id for _, leased in alive.values()) or ["ids not known yet"]
    last = max(leases.latest_end(lease) for lease in [*unsure, *(lease for lease, _ in alive.values())])
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(last))
    return LeakError(
        f"interrupted; instances go on, and end themselves by {when}: {', '.join(ids)}",
        hint=f"fleet bench --session {session.id} to go on, fleet down --session {session.id} to end them now",
    )


def explain(session: Session) -> None:
    """Let units that were lost with their instance say that its lease had ended; the network alone says `no answer`."""
    now = time.time()
    ended = {
        leased.host: leases.end_of(lease, leased)
        for lease in leases.read(session)
        for leased in lease.instances
        if leased.host and leases.end_of(lease, leased) <= now
    }
    for record in handoff.records(session).values():
        if record.host in ended and record.state in {UnitState.UNREACHABLE, UnitState.NOT_READY}:
            when = time.strftime("%H:%M:%S", time.localtime(ended[record.host]))
            cause = f"its lease ended at {when}, and its instance with it; more time: cloud.lease_hours, fleet extend"
            session.write(session.run / "units" / f"{record.unit}.json", replace(record, cause=cause))


def up(session: Session, campaign: Campaign, watch: Watch, subset: Subset, *, quick: bool) -> dict[str, str]:
    """Launch what is needed; hosts that got no instance, with the cause."""
    from fleet.cloud import up as launching

    hosts = wanted(session, campaign, subset)
    if not hosts:
        return {}
    watch.stage("up", f"{len(hosts)} instances" if len(hosts) > 1 else "an instance")
    try:
        return launching.up(session, campaign, watch, hosts=hosts, quick=quick)
    except LeakError:
        raise
    except CloudError as error:
        if not handoff.planned(session):
            raise
        # Hosts that answer need no word of EC2's, and those that do not are named by the inventory.
        watch.note(f"EC2 did not say how instances stand: {error.message}")
        return {}


def down(session: Session, campaign: Campaign, watch: Watch, hosts: Sequence[str] | None = None) -> tuple[str, ...]:
    """End the instances of these hosts, or every one of the session; their ids.

    Raises LeakError naming those that may still run.
    """
    from fleet.cloud import down as ending

    if campaign.cloud is None and not leases.read(session):
        return ()
    watch.stage("down", "ending instances")
    return ending.down(session, watch, hosts=hosts)
