"""A later end for a session's instances: in the ledger, in their tags, and in the timer of each.

What must never be wrong, wherever it breaks off: the ledger's `expires_at` is not later than any timer, and its
`may_expire_at` not earlier. So the ledger first says what may be, then tags and timers move, then it says what is.
"""

import shlex
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from fleet import threads
from fleet.campaign import Campaign
from fleet.cloud import aws, described, hosts, leases, spend, user_data
from fleet.cloud.leases import EXPIRY_TAG, Lease, Leased
from fleet.errors import CloudError
from fleet.inventory import reach
from fleet.inventory.hosts import Host
from fleet.session import Session
from fleet.watch import Watch

TELL_S = 30.0
"""So long a host may take to have its timer moved."""
TAGGED = 500
"""Resources of one CreateTags call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extended:
    """What became of one host."""

    host: str
    id: str
    region: str
    expires_at: float
    """Unix seconds: when its timer ends it, for all that is known."""
    cause: str = ""
    """Why that is not later; empty when it is."""
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Move:
    """One instance that is to live longer."""

    lease: Lease
    leased: Leased
    until: float

    @property
    def before(self) -> float:
        """When it ends now."""
        return leases.end_of(self.lease, self.leased)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What a timer said."""

    cause: str = ""
    hint: str = ""
    is_sure: bool = True
    """Whether it is known that the timer is as it was, where there is a cause."""


def extend(
    session: Session,
    campaign: Campaign,
    watch: Watch,
    later: Callable[[float], float],
    *,
    only: Collection[str] | None = None,
    max_cost: float | None = None,
) -> tuple[Extended, ...]:
    """Move the end of every live instance, or of some hosts', from what it is to `later` of that; one answer per host.

    May run beside a controller that holds the session. An instance is never moved to an earlier end. Raises CloudError,
    with nothing moved, when none is live, or when the session could then cost more than `max_cost` US dollars (the
    campaign's).
    """
    ledger = leases.read(session)
    live = {host: pair for host, pair in leases.live(ledger).items() if only is None or host in only}
    if not live:
        raise CloudError(f"no instance of session {session.id} is running", hint=f"fleet up --session {session.id}")
    states = _states(session, {lease.region for lease, _ in live.values()})
    moves, ended = {}, []
    for host, (lease, leased) in live.items():
        at = leases.end_of(lease, leased)
        if cause := _why_not(states.get(leased.id), at):
            again = f"fleet up --session {session.id}"
            ended.append(Extended(host=host, id=leased.id, region=lease.region, expires_at=at, cause=cause, hint=again))
        else:
            moves[host] = _Move(lease=lease, leased=leased, until=max(at, float(int(later(at)))))
    _check_cost(session, campaign, ledger, moves, max_cost)
    if moves:
        watch.stage("extend", f"telling {len(moves)} instances of session {session.id}")
    _intend(session, moves)
    _tag(session, moves, lambda move: move.until)
    targets = {host.name: host for host in hosts.planned(session, campaign)}
    told = {host: said for host, said in threads.each(lambda host: _tell(targets.get(host), moves[host]), moves)}  # noqa: C416 - pairs
    _settle(session, moves, told)
    _tag_back(moves, told, watch)
    answers = [*ended, *(_answer(session, host, move, told[host]) for host, move in moves.items())]
    order = {host: number for number, host in enumerate(live)}
    return tuple(sorted(answers, key=lambda answer: order[answer.host]))


def text(at: float) -> str:
    """A time as it is shown, and as --until takes it."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _states(session: Session, regions: Iterable[str]) -> dict[str, described.Described]:
    return {item.id: item for region in regions for item in described.instances(region, values=[session.token])}


def _why_not(item: described.Described | None, at: float) -> str:
    if item is None:
        return "EC2 does not know it" if time.time() < at else "its lease has ended"
    return f"it has ended: {described.why_ended(item, at)}" if item.state in described.ENDING else ""


def _check_cost(
    session: Session, campaign: Campaign, ledger: Iterable[Lease], moves: Mapping[str, _Move], max_cost: float | None
) -> None:
    limit = max_cost if max_cost is not None else campaign.cloud.max_cost if campaign.cloud else 0.0
    until = {move.leased.id: move.until for move in moves.values()}
    then = [
        replace(
            lease,
            instances=tuple(
                replace(leased, expires_at=until.get(leased.id, leased.expires_at)) for leased in lease.instances
            ),
        )
        for lease in ledger
    ]
    if (most := spend.most(then, time.time())) > limit:
        ends = text(max(until.values(), default=0.0))
        raise CloudError(
            f"until {ends} session {session.id} can cost {most:.2f} US dollars, more than max_cost, which is {limit:.2f}: nothing was moved",
            hint=f"fewer --hours, or --max-cost {most + 0.005:.2f}",
        )


def _intend(session: Session, moves: Mapping[str, _Move]) -> None:
    """From here on instances may live until their new end."""
    for lease, until in _latest(moves).items():
        leases.change(
            session,
            lease,
            lambda fresh, until=until: replace(fresh, may_expire_at=max(until, leases.latest_end(fresh))),  # type: ignore[misc]
        )


def _latest(moves: Mapping[str, _Move]) -> dict[str, float]:
    found: dict[str, float] = {}
    for move in moves.values():
        found[move.lease.id] = max(move.until, found.get(move.lease.id, 0.0))
    return found


def _tag(session: Session, moves: Mapping[str, _Move], end: Callable[[_Move], float]) -> None:
    """Instances by their own end; what else the session has by the last of all.

    Raises CloudError; some may have been tagged then, and no timer has been told.
    """
    _write_tags(moves.values(), end)
    for region in sorted({move.lease.region for move in moves.values()}):
        there = described.leftovers(region, session.token)
        last = max(end(move) for move in moves.values() if move.lease.region == region)
        behind = [item.id for item in there if item.expires_at is not None and item.expires_at < last]
        _create_tags(region, behind, last)


def _write_tags(moves: Iterable[_Move], end: Callable[[_Move], float]) -> None:
    grouped: dict[tuple[str, float], list[str]] = {}
    for move in moves:
        grouped.setdefault((move.lease.region, end(move)), []).append(move.leased.id)
    for (region, at), ids in sorted(grouped.items()):
        _create_tags(region, ids, at)


def _create_tags(region: str, ids: list[str], at: float) -> None:
    for first in range(0, len(ids), TAGGED):
        tags = [{"Key": EXPIRY_TAG, "Value": leases.expiry_text(at)}]
        aws.client("ec2", region).call("create_tags", Resources=ids[first : first + TAGGED], Tags=tags)


def _tag_back(moves: Mapping[str, _Move], told: Mapping[str, _Told], watch: Watch) -> None:
    """A tag must not promise what the timer does not keep."""
    try:
        _write_tags([moves[host] for host, said in told.items() if said.cause], lambda move: move.before)
    except CloudError as error:
        watch.note(f"extend: tags say the later end, timers end earlier: {error.message}")


def _tell(host: Host | None, move: _Move) -> _Told:
    """Have an instance's timer read another end."""
    if host is None or not host.address:
        why = host.instance.cause if host and host.instance else "the campaign does not name it"
        return _Told(cause=f"its timer could not be told: {why}")
    file, end = shlex.quote(user_data.EXPIRES_AT), str(int(move.until))
    # By rename: the timer never reads half a number.
    command = f"umask 022; printf '%s\\n' {end} >{file}.later && mv -f {file}.later {file} && cat {file}"
    is_asked = False
    try:
        connection = reach.connect(host)
        try:
            is_asked = True
            answer = connection.run(command, timeout=TELL_S)
        finally:
            connection.close()
    except reach.Unreachable as error:
        return _Told(cause=f"its timer could not be told: {error.cause}", hint=error.hint, is_sure=not is_asked)
    if answer.rc or answer.out.strip() != end:
        said = " ".join((answer.err or answer.out).split())[:200]
        return _Told(cause=f"its timer could not be moved: {said or f'exit code {answer.rc}'}")
    return _Told()


def _settle(session: Session, moves: Mapping[str, _Move], told: Mapping[str, _Told]) -> None:
    """Say in the ledger what each timer does now."""
    until = {moves[host].leased.id: moves[host].until for host, said in told.items() if not said.cause}
    unsure = {moves[host].lease.id for host, said in told.items() if not said.is_sure}
    for lease in sorted(_latest(moves)):
        leases.change(session, lease, lambda fresh: _settled(fresh, until, is_sure=fresh.id not in unsure))


def _settled(lease: Lease, until: Mapping[str, float], *, is_sure: bool) -> Lease:
    ends = {leased.id: until.get(leased.id, leases.end_of(lease, leased)) for leased in lease.instances}
    alive = [ends[leased.id] for leased in lease.instances if leased.ended_at is None]
    # No timer is earlier than the lease's own end: who lives longer says so.
    common = min(alive, default=lease.expires_at)
    instances = tuple(
        replace(leased, expires_at=0.0 if ends[leased.id] == common else ends[leased.id]) for leased in lease.instances
    )
    may = 0.0 if is_sure else lease.may_expire_at
    return replace(lease, expires_at=common, instances=instances, may_expire_at=may)


def _answer(session: Session, host: str, move: _Move, said: _Told) -> Extended:
    at = move.before if said.cause else move.until
    again = f"fleet extend --session {session.id} --until {text(move.until)} --limit {host}"
    hint = (f"{said.hint}, then: {again}" if said.hint else again) if said.cause else ""
    return Extended(host=host, id=move.leased.id, region=move.lease.region, expires_at=at, cause=said.cause, hint=hint)
