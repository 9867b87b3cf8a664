"""The end of a session's instances, and of everything that was made for them. Nothing without its tag is touched."""

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import tenacity

from fleet import campaign as campaigns
from fleet.cloud import described, ending, keys, leases
from fleet.cloud.described import Described, Leftover
from fleet.cloud.launch import entered
from fleet.cloud.leases import Lease, Leased, LeaseState
from fleet.errors import CampaignError, CloudError, LeakError
from fleet.session import Session
from fleet.watch import Silent, Watch

BOUND_S = 600.0
"""So long everything may take, until what is not confirmed gone counts as a leak."""
UNSEEN_S = 120.0
"""So long after a launch DescribeInstances may not know an instance; later, what it does not know is not there."""
LOOK_S = 10.0
"""So long at least a call is looked after whose answer nobody noted: a resumed `up` may just have made it again."""
PACE_S, SLOWEST_S = 1.0, 10.0
"""Between two looks, at first and at last."""
_IN_USE = frozenset({"DependencyViolation", "InvalidGroup.InUse", "VolumeInUse"})
_NO_SUCH_PLACE = frozenset({"NoRegion", "OptInRequired"})


def down(
    session: Session, watch: Watch, *, hosts: Collection[str] | None = None, bound_s: float = BOUND_S
) -> tuple[str, ...]:
    """End the session's instances, or those of some hosts only, and return when EC2 says that they are terminated.

    With the last of them go security groups, key pairs, volumes and the secrets. The ids of those that ended are
    returned, whoever ended them. Raises LeakError with every id of which that is not sure after `bound_s` seconds;
    the same call again goes on. Raises CloudError when there is no instance, but something else could not be removed.
    """
    known = leases.read(session)
    if not known and not keys.folder(session.token).is_dir():
        return ()
    end = _End(session, watch, hosts)
    deadline = time.monotonic() + bound_s
    if known:
        end.instances(deadline)
    if hosts is None:
        end.leftovers(deadline)
        keys.forget(session)
    return tuple(end.ended)


def note(session: Session, region: str) -> None:
    """Bring the session's leases of a region up to what EC2 says; ends nothing.

    Raises CloudError.
    """
    _End(session, Silent(), None).look(region)


class _End:
    """One call of `down`."""

    def __init__(self, session: Session, watch: Watch, hosts: Collection[str] | None) -> None:
        self._session, self._watch, self._hosts = session, watch, hosts
        self._token = session.token
        self._begun = time.time()
        self._asked: set[str] = set()
        """Ids that EC2 was asked to end, and said yes."""
        self._error: CloudError | None = None
        self._said: set[str] = set()
        self.ended: list[str] = []

    # -- instances

    def instances(self, deadline: float) -> None:
        """Raises LeakError."""
        known = self._concerned()
        regions = sorted({lease.region for lease in known})
        count = sum(leased.ended_at is None for lease in known for leased in lease.instances)
        if count:
            self._watch.stage("down", f"ending {count} instances of session {self._session.id}")
        pending: list[_Pending] = []

        def looked() -> bool:
            self._error = None
            pending[:] = [item for region in regions for item in self._region(region)]
            return any(not item.is_stuck for item in pending)

        try:
            until(deadline, looked)
        except KeyboardInterrupt as error:
            raise self._leak(self._alive(), "interrupted") from error
        if pending:
            raise self._leak(pending, "")
        if self.ended:
            self._watch.note(f"{len(self.ended)} instances of session {self._session.id} are terminated")

    def _concerned(self) -> list[Lease]:
        """Leases that may have an instance to end. One that EC2 refused, or that has ended, may have one after all."""
        return [
            lease
            for lease in leases.read(self._session)
            if self._hosts is None or set(lease.hosts) & set(self._hosts) or not lease.hosts
        ]

    def _alive(self, region: str = "", *, is_stuck: bool = False) -> list["_Pending"]:
        """What the leases alone say."""
        concerned = [lease for lease in self._concerned() if region in {"", lease.region}]
        known = [
            _Pending(leased.id, lease.region, is_stuck=is_stuck)
            for lease in concerned
            for leased in lease.instances
            if leased.ended_at is None and self._wants(leased.host)
        ]
        return known + _unanswered(concerned, is_stuck=is_stuck)

    def _wants(self, host: str) -> bool:
        return self._hosts is None or host in self._hosts

    def _region(self, region: str) -> list["_Pending"]:
        """Look, end, note; what is not confirmed gone."""
        try:
            concerned, there, hosts = self.look(region)
        except CloudError as error:
            self._failed(error)
            return self._alive(region, is_stuck=error.code in ending.HOPELESS)
        wanted = [item for item in there if item.state != described.GONE and self._wants(hosts.get(item.id, ""))]
        # What lost its tag is somebody else's now, for all we know.
        ours = [item.id for item in wanted if item.state not in described.ENDING and item.session == self._token]
        failed = ending.terminate(region, ours)
        self._asked |= set(ours) - set(failed)
        for refusal in failed.values():
            self._failed(refusal)
        return [
            _Pending(
                item.id,
                region,
                "" if item.session == self._token else "it carries our tag no more",
                is_stuck=item.session != self._token or (item.id in failed and failed[item.id].code in ending.HOPELESS),
            )
            for item in wanted
        ] + self._unsettled(concerned, {item.id for item in there})

    def look(self, region: str) -> tuple[list[Lease], list[Described], dict[str, str]]:
        """Note in the leases what EC2 says; those leases, what is there of the session, and whose host it is by id.

        Raises CloudError.
        """
        concerned = [lease for lease in self._concerned() if lease.region == region]
        there = described.instances(region, values=[self._token])
        there += described.untagged(region, concerned, there)
        return concerned, there, self._note(concerned, there)

    def _note(self, concerned: Iterable[Lease], there: Iterable[Described]) -> dict[str, str]:
        """Bring the leases up to what EC2 says; id to host."""
        hosts: dict[str, str] = {}
        for lease in concerned:
            own = {item.id: item for item in there if item.lease == lease.id}
            own |= {item.id: item for item in there for leased in lease.instances if leased.id == item.id}
            before = {leased.id for leased in lease.instances if leased.ended_at is not None}
            noted = leases.change(self._session, lease.id, lambda fresh, own=own: self._as_seen(fresh, own))  # type: ignore[misc]
            hosts |= {leased.id: leased.host for leased in noted.instances}
            self.ended += [
                leased.id for leased in noted.instances if leased.ended_at is not None and leased.id not in before
            ]
        return hosts

    def _as_seen(self, lease: Lease, own: dict[str, Described]) -> Lease:
        """The lease with the instances that are there, and when and why those ended that are not."""
        # It stays INTENDED until it is settled: nobody knows before whether these are all that its call launched.
        lease = replace(entered(lease, list(own.values())), state=lease.state)
        ended = []
        for leased in lease.instances:
            item = own.get(leased.id)
            if leased.ended_at is not None or (item is not None and item.state != described.GONE):
                ended.append(leased)
            elif item is not None:
                ended.append(self._gone(lease, leased, item))
            elif self._is_settled(lease, leased):
                # EC2 forgets what has been terminated for about an hour.
                at = leases.end_unseen(lease, leased, time.time())
                ended.append(replace(leased, ended_at=at, cause=leased.cause or "EC2 does not know it any more"))
            else:
                ended.append(leased)
        lease = replace(lease, instances=tuple(ended))
        if lease.state is LeaseState.REFUSED or not self._is_settled(lease):
            return lease
        if all(leased.ended_at is not None for leased in ended):
            cause = lease.cause or ("" if ended else "no instance came of it")
            return replace(lease, state=LeaseState.ENDED, cause=cause)
        return replace(lease, state=LeaseState.LAUNCHED)

    def _gone(self, lease: Lease, leased: Leased, item: Described) -> Leased:
        cause = leased.cause
        if item.id not in self._asked:
            cause = cause or described.why_ended(item, leases.end_of(lease, leased))
        now = time.time()
        at = min(described.ended_at(item) or leases.end_unseen(lease, leased, now), now)
        return replace(leased, ended_at=max(at, leased.launched_at), cause=cause)

    def _is_settled(self, lease: Lease, leased: Leased | None = None) -> bool:
        """Whether an instance that EC2 does not know is not there, rather than not known yet."""
        now = time.time()
        if leased is not None:
            return now >= max(lease.written_at, leased.launched_at) + UNSEEN_S
        if lease.state is not LeaseState.INTENDED:
            return True
        return now >= max(lease.written_at + UNSEEN_S, self._begun + LOOK_S)

    def _unsettled(self, concerned: Iterable[Lease], there: Collection[str]) -> list["_Pending"]:
        """What is not to be seen, and may be there all the same."""
        fresh = [lease for lease in self._concerned() if lease.id in {known.id for known in concerned}]
        unseen = [
            _Pending(leased.id, lease.region, "EC2 does not know it yet")
            for lease in fresh
            for leased in lease.instances
            if leased.ended_at is None and leased.id not in there and self._wants(leased.host)
        ]
        return unseen + _unanswered(fresh)

    # -- what else was made

    def leftovers(self, deadline: float) -> None:
        """Raises LeakError where a volume may be left, CloudError where only a group or a key pair is."""
        left: list[Leftover] = []
        unasked: list[str] = []
        late: list[_Pending] = []
        # Regions where something is held: by an instance that nobody had seen until now, perhaps.
        in_use: set[str] = set()

        def looked() -> bool:
            left.clear()
            unasked.clear()
            late.clear()
            self._error = None
            for region, is_sure in sorted(regions(self._session).items()):
                try:
                    found = described.leftovers(region, self._token)
                except CloudError as error:
                    if is_sure or error.code not in _NO_SUCH_PLACE:
                        self._failed(error)
                        unasked.append(region)
                    continue
                left.extend(found)
                refused = [failed for item in found if (failed := ending.remove(item)) is not None]
                for failed in refused:
                    self._failed(failed)
                if any(failed.code in _IN_USE for failed in refused):
                    in_use.add(region)
                if region in in_use:
                    late.extend(self._region(region))
            return bool(left or unasked or late) and not self._is_hopeless()

        # A group can go only when the interfaces of terminated instances have, some time after them.
        until(deadline, looked)
        if late:
            raise self._leak(late, "")
        if left or unasked:
            told = [f"{item.kind} {item.id} in {item.region}" for item in left]
            told += [f"what is in {region}, which could not be asked" for region in unasked]
            kind = LeakError if any(item.kind == "volume" for item in left) else CloudError
            raise kind(
                f"session {self._session.id} has no instance any more, and there is left: {'; '.join(told)}"
                + self._last(),
                hint=self._next(),
                code=self._error.code if self._error else "",
            )

    # -- words

    def _failed(self, error: CloudError) -> None:
        self._error = error if self._error is None or error.code in ending.HOPELESS else self._error
        # With the ids that it names a message is another one every time.
        if (error.code or error.message) not in self._said:
            self._said.add(error.code or error.message)
            self._watch.note(f"down: {error.message}")

    def _is_hopeless(self) -> bool:
        return self._error is not None and self._error.code in ending.HOPELESS

    def _leak(self, pending: Iterable["_Pending"], why: str) -> LeakError:
        ends = [leases.latest_end(lease) for lease in self._concerned() if lease.state is not LeaseState.ENDED]
        at = datetime.fromtimestamp(max(ends), UTC).strftime("%Y-%m-%d %H:%M UTC") if ends else ""
        return LeakError(
            f"{why + ': ' if why else ''}session {self._session.id}: may still be running: {'; '.join(map(str, pending))}"
            + self._last()
            + (f". Its own timer ends an instance by {at}" if at else ""),
            hint=self._next(),
            code=self._error.code if self._error else "",
        )

    def _last(self) -> str:
        return f" ({self._error.message})" if self._error else ""

    def _next(self) -> str:
        again = command(self._session)
        return f"{self._error.hint}: {again}" if self._error and self._error.hint else again


def command(session: Session) -> str:
    """What is typed to end everything of a session."""
    base = session.root.parent
    usual = base.resolve() == base.cwd() / "sessions"
    return f"fleet down --session {session.id}" + ("" if usual else f" --sessions {base}")


def regions(session: Session) -> dict[str, bool]:
    """Where something of the session may be, and whether its leases say so: access is made before the first lease.

    Raises SessionError when a lease cannot be read.
    """
    return dict.fromkeys(_planned(session), False) | {lease.region: True for lease in leases.read(session)}


def _planned(session: Session) -> set[str]:
    try:
        cloud = campaigns.load(session.campaign_file).cloud
    except CampaignError:
        return set()
    return {*cloud.regions, *(region for entry in cloud.instances for region in entry.regions)} if cloud else set()


@dataclass(frozen=True, slots=True)
class _Pending:
    """Something that is not confirmed gone."""

    what: str
    region: str
    remark: str = ""
    is_stuck: bool = False
    """Waiting does not help: somebody has to do something first."""

    def __str__(self) -> str:
        return f"{self.what} in {self.region}" + (f" ({self.remark})" if self.remark else "")


def _unanswered(of: Iterable[Lease], *, is_stuck: bool = False) -> list[_Pending]:
    return [
        _Pending(f"what {lease.id} launched", lease.region, "its answer was lost", is_stuck=is_stuck)
        for lease in of
        if lease.state is LeaseState.INTENDED
    ]


def until(deadline: float, is_pending: Callable[[], bool]) -> None:
    """Ask again and again, ever more slowly, until nothing is pending or the time is over."""
    tenacity.Retrying(
        stop=tenacity.stop_after_delay(max(0.0, deadline - time.monotonic())),
        wait=tenacity.wait_exponential(multiplier=PACE_S, max=SLOWEST_S),
        retry=tenacity.retry_if_result(bool),
        retry_error_callback=lambda _: None,
    )(is_pending)
