"""What is ours by its tags and should be gone, in every region, whoever has forgotten it: found, and ended.

The tags alone say so: no session folder is needed. What has no tag of ours is never seen, and what has an expiry that
says no time is shown and left alone.
"""

import contextlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fleet import threads
from fleet.cloud import aws, described, down, ending, keys, leases
from fleet.cloud.described import Described, Leftover, Tagged
from fleet.cloud.leases import EXPIRY_TAG
from fleet.errors import CloudError, LeakError, SessionError
from fleet.session import Session
from fleet.watch import Watch

INSTANCE = "instance"
NO_TIME = "its expiry tag says no time"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expired:
    """Something that should be gone."""

    id: str
    kind: str
    """`instance`, or one of described.KINDS."""
    region: str
    type: str = ""
    """Of an instance."""
    session: str
    """The session's token."""
    owner: str
    expires: str
    """The tag's text."""
    expires_at: float | None
    """Unix seconds; None when the tag says no time."""
    usd_per_hour: float | None = None
    """Of an instance whose session is on this machine."""
    kept: str = ""
    """Why it would not be ended; empty when it would."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found, and where nobody could look."""

    items: tuple[Expired, ...]
    regions: tuple[str, ...]
    """Those that were asked."""
    unasked: dict[str, str] = field(default_factory=dict)
    """Region to why it could not be asked."""

    @property
    def instances(self) -> tuple[Expired, ...]:
        """Instances that would be ended."""
        return tuple(item for item in self.items if item.kind == INSTANCE and not item.kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Whose:
    """What is to be ended: of which session and of whom."""

    session: str = ""
    """Id or token; empty for all."""
    owners: frozenset[str] | None
    """Values of the owner tag; None for everybody."""
    tokens: frozenset[str] = frozenset()
    """Sessions that are ours, whatever owner they name."""

    def fits(self, token: str) -> bool:
        """Whether a session is asked for."""
        return self.session in {"", token} or bool(re.fullmatch(re.escape(self.session) + "-[0-9a-f]{6}", token))

    def kept(self, item: Tagged) -> str:
        """Why something is left alone; empty when it is not."""
        if item.expires_at is None:
            return NO_TIME
        if self.owners is None or item.owner in self.owners or item.session in self.tokens:
            return ""
        return f"it is {item.owner}'s: --owner {item.owner}" if item.owner else "it names no owner: --all-owners"


def own(session: str = "") -> Whose:
    """What is ours: by AWS's word of who we are, and by the secrets that lie on this machine.

    Raises CloudError.
    """
    tokens = frozenset(token for token, _ in keys.known())
    return Whose(session=session, owners=frozenset({aws.identity()}), tokens=tokens)


def everywhere() -> tuple[str, ...]:
    """Every region that the account may use.

    Raises CloudError.
    """
    answer = aws.client("ec2", aws.home_region()).call("describe_regions")
    return tuple(sorted(item["RegionName"] for item in answer["Regions"]))


def find(
    whose: Whose, *, regions: Sequence[str] = (), here: Iterable[Session] = (), at: float | None = None
) -> Finding:
    """Everything with our tags that was to be gone at `at` (now), in these regions, or in all.

    A group, key pair or volume is, when its expiry is past and its session has no instance there that may stay.
    Sessions in `here` say what their instances cost. Raises CloudError when no region can be asked.
    """
    at = time.time() if at is None else at
    prices = _prices(here)
    items: list[Expired] = []
    asked: list[str] = []
    unasked: dict[str, CloudError] = {}
    for region, found in threads.each(_look, regions or everywhere()):
        if isinstance(found, CloudError):
            # DescribeRegions may list what is another partition's, or newer than boto3: nothing is launched there.
            if regions or found.code != "NoRegion":
                unasked[region] = found
            continue
        asked.append(region)
        items += [_expired(thing, whose, prices) for thing in _due(*found, at) if whose.fits(thing.session)]
    if unasked and not asked:
        raise next(iter(unasked.values()))
    order = [INSTANCE, *described.KINDS]
    return Finding(
        items=tuple(sorted(items, key=lambda item: (order.index(item.kind), item.region, item.session, item.id))),
        regions=tuple(sorted(asked)),
        unasked={region: unasked[region].message for region in sorted(unasked)},
    )


def reap(
    finding: Finding, watch: Watch, *, here: Iterable[Session] = (), bound_s: float = down.BOUND_S
) -> tuple[str, ...]:
    """End what was found and is not kept, instances first, and return their ids when EC2 says that they are gone.

    What was extended meanwhile stays. Leases of sessions in `here` say what became of their instances. Raises LeakError
    with every id of which that is not sure after `bound_s` seconds, CloudError when only groups or key pairs are left.
    """
    todo = [item for item in finding.items if not item.kept]
    work = _Reap(watch, {session.token: session for session in here})
    deadline = time.monotonic() + bound_s
    for region in sorted({item.region for item in todo}):
        watch.note(f"reap: {region}: ending {sum(item.region == region for item in todo)}")
    work.until(deadline, todo)
    return tuple(work.ended)


class _Reap:
    """One call of `reap`."""

    def __init__(self, watch: Watch, here: Mapping[str, Session]) -> None:
        self._watch, self._here = watch, here
        self._errors: dict[str, CloudError] = {}
        """What stands in the way, by id or region."""
        self._left: list[Expired] = []
        self.ended: list[str] = []

    def until(self, deadline: float, todo: Sequence[Expired]) -> None:
        """Raises LeakError or CloudError."""
        self._left = list(todo)

        def looked() -> bool:
            self._errors.clear()
            self._left = [
                item for region in sorted({item.region for item in self._left}) for item in self._region(region)
            ]
            return not all(self._is_stuck(item) for item in self._left)

        down.until(deadline, looked)
        if not self._left:
            return
        kind = CloudError if all(item.kind in {"security-group", "key-pair"} for item in self._left) else LeakError
        error = next(iter(self._errors.values()), None)
        told = "; ".join(f"{item.kind} {item.id} in {item.region}" for item in self._left)
        raise kind(
            f"not confirmed gone: {told}" + (f" ({error.message})" if error else ""),
            hint=f"{error.hint}: fleet reap --yes" if error and error.hint else "fleet reap --yes",
            code=error.code if error else "",
        )

    def _is_stuck(self, item: Expired) -> bool:
        """Whether waiting does not help; what was made for an instance waits for its end."""
        concerned = [item.region, item.id]
        if item.kind != INSTANCE:
            concerned += [other.id for other in self._left if other.kind == INSTANCE and _of(other) == _of(item)]
        met = [self._errors[key] for key in concerned if key in self._errors]
        return any(error.code in ending.HOPELESS for error in met)

    def _region(self, region: str) -> list[Expired]:
        """Look, end; what is not confirmed gone."""
        todo = [item for item in self._left if item.region == region]
        try:
            there = described.instances(region, values=sorted({item.session for item in todo}))
            going = self._instances(region, [item for item in todo if item.kind == INSTANCE], there)
            rest = [item for item in todo if item.kind != INSTANCE]
            return going + (self._beside(region, rest, going, there) if rest else [])
        except CloudError as error:
            self._errors[region] = error
            return todo

    def _instances(self, region: str, todo: Sequence[Expired], there: Iterable[Described]) -> list[Expired]:
        now = {item.id: item for item in there}
        gone = [item for item in todo if item.id in now and now[item.id].state == described.GONE]
        # Extended since it was found, or without our tag now, which EC2 would not show then: not ours to end.
        left = [item for item in todo if item not in gone and item.id in now and _is_over(now[item.id], time.time())]
        failed = ending.terminate(region, [item.id for item in left if now[item.id].state not in described.ENDING])
        self._errors |= failed
        self.ended += [item.id for item in gone]
        for token in sorted({item.session for item in gone} & set(self._here)):
            try:
                down.note(self._here[token], region)
            except (CloudError, SessionError) as error:
                self._watch.note(f"reap: the leases of session {self._here[token].id}: {error.message}")
        return left

    def _beside(
        self, region: str, todo: Sequence[Expired], going: Iterable[Expired], there: Iterable[Described]
    ) -> list[Expired]:
        """Groups, key pairs and volumes, of sessions without an instance."""
        present = {item.id: item for item in described.leftovers(region) if _is_over(item, time.time())}
        waiting = {item.session for item in going}
        busy = {item.session for item in there if item.state != described.GONE}
        # A session that has an instance again keeps what is its own.
        left = [item for item in todo if item.id in present and (item.session in waiting or item.session not in busy)]
        for item in left:
            if item.session not in busy and (error := ending.remove(present[item.id])) is not None:
                self._errors[item.id] = error
        self.ended += [item.id for item in todo if item.id not in present]
        return left


def _of(item: Expired) -> tuple[str, str]:
    return item.session, item.region


def _look(region: str) -> tuple[list[Described], list[Leftover]] | CloudError:
    try:
        return described.instances(region), described.leftovers(region)
    except CloudError as error:
        return error


def _is_over(item: Tagged, at: float) -> bool:
    return item.expires_at is not None and item.expires_at < at


def _due(instances: Iterable[Described], leftovers: Iterable[Leftover], at: float) -> list[Tagged]:
    """What should be gone, or says no time, which somebody should look at."""
    alive = [item for item in instances if item.state not in described.ENDING]
    due: list[Tagged] = [item for item in alive if item.expires_at is None or item.expires_at < at]
    busy = {item.session for item in alive if not _is_over(item, at)}
    return due + [
        item for item in leftovers if item.session not in busy and (item.expires_at is None or _is_over(item, at))
    ]


def _expired(item: Tagged, whose: Whose, prices: Mapping[str, float]) -> Expired:
    return Expired(
        id=item.id,
        kind=item.kind if isinstance(item, Leftover) else INSTANCE,
        region=item.region,
        type=item.type if isinstance(item, Described) else "",
        session=item.session,
        owner=item.owner,
        expires=item.tags.get(EXPIRY_TAG, ""),
        expires_at=item.expires_at,
        usd_per_hour=prices.get(item.lease) if isinstance(item, Described) else None,
        kept=whose.kept(item),
    )


def _prices(here: Iterable[Session]) -> dict[str, float]:
    """Lease to dollars an hour of one instance, of sessions that can be read."""
    found: dict[str, float] = {}
    for session in here:
        with contextlib.suppress(SessionError):
            found |= {lease.id: lease.usd_per_hour for lease in leases.read(session)}
    return found
