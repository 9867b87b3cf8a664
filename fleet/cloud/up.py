"""From hosts that want an instance to instances that run: settle what a crash left, plan, launch, wait. Read this first.

Whatever goes wrong, nothing is left half done: what was launched is taken back, or named where it cannot be.
"""

import time
from collections.abc import Collection, Iterable, Sequence

from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet

from fleet import handoff
from fleet.campaign import Campaign
from fleet.cloud import access, arrivals, aws, bucket, down, image, keys, launch, leases, plan, pools, user_data
from fleet.cloud import hosts as cloud_hosts
from fleet.cloud.access import Access, Network
from fleet.cloud.image import Image
from fleet.cloud.keys import Keys
from fleet.cloud.leases import Lease, LeaseState
from fleet.cloud.plan import Plan, Row
from fleet.cloud.pools import Openings, Pool
from fleet.cloud_settings import CloudSettings, InstanceEntry
from fleet.errors import CloudError, FleetError, LeakError
from fleet.session import Session
from fleet.watch import Watch

ROUNDS = 3
"""How often hosts whose instances ended at once get others."""
_FEWER = "set cloud.partial: true to go on with fewer, or name more types, zones or regions under cloud.instances"


def up(
    session: Session, campaign: Campaign, watch: Watch, *, hosts: Collection[str], quick: bool = False
) -> dict[str, str]:
    """Give each of these hosts of `cloud.instances` an instance that runs and has its address; those that have one keep it.

    Returns the cause for each host that got none, and keeps it for the inventory. Only a campaign with `cloud.partial`
    lets that be, or a session whose units were handed out already: what was measured, or is being measured, is worth
    more than a whole fleet. A plan is made first, always, and when it is refused nothing is launched. Whatever else goes
    wrong, everything that the session has at EC2 is taken back; once units were handed out, what these hosts got now.

    Only for who holds the session. Raises CloudError, LeakError where an instance may be left, and what is wrong with files.
    """
    settings = campaign.cloud
    wanted = [name for name in settings.names() if name in hosts] if settings else []
    if settings is None or not wanted:
        return {}
    watch.stage("up", f"instances for {len(wanted)} host{'' if len(wanted) == 1 else 's'}")
    begun = handoff.planned(session)
    lacking = _lacking(session, wanted)
    try:
        causes = _Up(session, campaign, settings, watch, begun=begun).bring(wanted, quick=quick)
    except (FleetError, OSError) as error:
        if begun and not lacking:
            # EC2 could not be asked how they stand: what they run goes on.
            raise
        _take_back(session, watch, error, hosts=lacking if begun else None)
        if not begun:
            raise
        causes = dict.fromkeys(lacking, _words(error))
    cloud_hosts.lack(session, wanted, causes)
    return causes


def may_run(session: Session) -> tuple[str, ...]:
    """Ids of instances of the session that may be running, as far as the ledger knows; a lease without an answer by its id."""
    return tuple(
        name
        for lease in leases.read(session)
        for name in (
            [lease.id]
            if lease.state is LeaseState.INTENDED
            else [leased.id for leased in lease.instances if leased.ended_at is None]
        )
    )


def _lacking(session: Session, wanted: Iterable[str]) -> list[str]:
    there = leases.live(leases.read(session))
    return [name for name in wanted if name not in there]


def _take_back(
    session: Session, watch: Watch, error: FleetError | OSError, *, hosts: Collection[str] | None = None
) -> None:
    """End everything of the session at EC2, or what these hosts have there, because of `error`.

    Raises LeakError when something may be left.
    """
    if not leases.read(session) and not keys.folder(session.token).is_dir():
        return
    watch.note(f"up: {error}; " + ("taking everything back" if hosts is None else "going on with the others"))
    try:
        down.down(session, watch, hosts=hosts)
    except LeakError as leak:
        raise LeakError(f"{error}; then: {leak.message}", hint=leak.hint, code=leak.code) from error
    except FleetError as second:
        if not (left := may_run(session)):
            # Nothing that costs: what the user must know is what came first.
            watch.note(f"up: {second.message}")
            return
        text = f"{error}; these may still be running: {', '.join(left)} ({second.message})"
        raise LeakError(text, hint=down.command(session)) from error


class _Up:
    """One `up`: what it has found out, and what it may still ask."""

    def __init__(
        self, session: Session, campaign: Campaign, settings: CloudSettings, watch: Watch, *, begun: bool
    ) -> None:
        self._session, self._campaign, self._settings, self._watch = session, campaign, settings, watch
        self._begun = begun
        self._openings = Openings()
        self._networks: dict[str, Network] = {}
        self._images: dict[tuple[str, str], Image] = {}
        self._access: dict[str, Access] = {}
        self._owner = settings.owner or ""
        self._rows: dict[tuple[str, str, str], Row] = {}

    def bring(self, wanted: Sequence[str], *, quick: bool) -> dict[str, str]:
        """The whole of it, but for taking back."""
        self._settle(wanted)
        causes: dict[str, str] = {}
        if lacking := _lacking(self._session, wanted):
            made = plan.make(self._session, self._campaign, lacking, quick=quick)
            for line in made.warnings:
                self._watch.note(f"up: {line}")
            made.check()
            self._prepare(made)
            causes = self._launch(made, lacking, wanted, quick=quick)
        elif arrivals.wait(self._session, self._watch, wanted):
            return self.bring(wanted, quick=quick)
        self._judge(causes, wanted)
        return causes

    def _settle(self, wanted: Sequence[str]) -> None:
        """What earlier commands left: leases without an answer, and instances that have ended since."""
        ledger = leases.read(self._session)
        intended = [lease for lease in ledger if lease.state is LeaseState.INTENDED]
        if intended:
            made = keys.ensure(self._session)
            for lease in intended:
                self._watch.note(f"up: the call of {lease.id} was not answered; looking for what came of it")
                needed = bool(set(_lacking(self._session, wanted)) & set(lease.hosts))
                launch.settle(self._session, lease, self._user_data(made, lease), wanted=needed)
        if ledger:
            arrivals.reconcile(self._session)

    def _prepare(self, made: Plan) -> None:
        """Everything that can be asked before anything is made: the bucket, networks, images, whose account it is."""
        bucket.check(self._settings)
        self._rows = {(row.instances, row.type, row.region): row for row in made.rows if not row.cause}
        for row in self._rows.values():
            if row.region not in self._networks:
                self._networks[row.region] = access.network(self._settings, row.region)
            self._image(row)
        if not self._owner:
            self._owner = aws.identity()

    def _image(self, row: Row) -> Image:
        entry = next(each for each in self._settings.instances if each.name == row.instances)
        name = entry.image_parameter or self._settings.image_parameter or image.parameter(row.architecture)
        if (row.region, name) not in self._images:
            self._images[row.region, name] = image.find(row.region, name)
        found = self._images[row.region, name]
        if found.architecture != row.architecture:
            raise CloudError(
                f"image {name} in {row.region} is for {found.architecture}, and {row.type} is {row.architecture}",
                hint=f"give cloud.instances {entry.name} an image_parameter of its own, or none",
            )
        return found

    def _launch(self, made: Plan, lacking: Sequence[str], wanted: Sequence[str], *, quick: bool) -> dict[str, str]:
        """Launch for the hosts that lack one, and wait for all that are wanted; the cause for each that got nothing."""
        causes: dict[str, str] = {}
        left = list(lacking)
        for _ in range(ROUNDS):
            for entry in self._settings.instances:
                mine = [name for name, other in self._settings.hosts() if other is entry and name in left]
                causes.update(self._fill(made, entry, mine))
            if causes and not (self._settings.partial or self._begun):
                return causes
            died = arrivals.wait(self._session, self._watch, wanted)
            for host, cause in died.items():
                self._openings.shut(self._last_pool(host), pools.Rule.NEXT, cause)
            left = list(died)
            if not left:
                break
            # What those have cost that ended counts too.
            made = plan.make(self._session, self._campaign, left, quick=quick)
            made.check()
        return {**causes, **died}

    def _fill(self, made: Plan, entry: InstanceEntry, names: Sequence[str]) -> dict[str, str]:
        """Pool after pool for hosts of one entry."""
        where = pools.ordered(
            entry.types,
            plan.MARKETS[entry.market],
            entry.regions or self._settings.regions,
            lambda kind, region: self._zones(entry, kind, region),
        )
        left = list(names)
        while left:
            pool = self._openings.first(where)
            if pool is None:
                cause = self._openings.why_none(where)
                for name in left:
                    self._watch.host(name, f"no instance: {cause}", ended=True)
                return dict.fromkeys(left, cause)
            lease = self._lease(made, entry, pool, left[: launch.BATCH])
            for name in lease.hosts:
                self._watch.host(name, f"asking for {pool}")
            lease = launch.launch(self._session, lease, self._user_data(keys.ensure(self._session), lease))
            if lease.state is LeaseState.REFUSED:
                self._watch.note(f"up: {pool}: {lease.cause}")
                self._openings.shut(pool, pools.rule(lease.code), lease.cause)
            # Fewer than asked for: the same pool is asked for the rest, and its answer says why.
            left = [name for name in left if name not in {leased.host for leased in lease.instances}]
        return {}

    def _zones(self, entry: InstanceEntry, kind: str, region: str) -> list[str]:
        row = self._rows.get((entry.name, kind, region))
        if row is None:
            return []
        offered = [zone for zone in entry.zones if zone in row.zones] if entry.zones else row.zones
        return [zone for zone in offered if zone in self._networks[region].subnets]

    def _lease(self, made: Plan, entry: InstanceEntry, pool: Pool, hosts: Sequence[str]) -> Lease:
        now = time.time()
        expires = now + self._settings.lease_hours * 3600
        id_ = leases.new_id()
        row = self._rows[entry.name, pool.type, pool.region]
        found, price = self._image(row), made.price(pool.type, pool.region, pool.zone, pool.market)
        reached = self._reached(pool.region, expires)
        return Lease(
            id=id_,
            hosts=tuple(hosts),
            region=pool.region,
            zone=pool.zone,
            subnet=self._networks[pool.region].subnets[pool.zone],
            type=pool.type,
            market=pool.market,
            image=found.id,
            root_device=found.root_device,
            volume_gib=max(entry.volume_gib or self._settings.volume_gib, found.root_gib),
            key_name=reached.key_name,
            security_group=reached.security_group,
            public=self._networks[pool.region].public,
            owner=self._owner,
            usd_per_hour=price.usd_per_hour,
            price_source=price.cited,
            gpu=row.gpu.lower().replace(" ", "-"),
            written_at=now,
            first_expires_at=expires,
            expires_at=expires,
            tags=launch.tags(self._session.token, self._owner, expires, id_),
        )

    def _reached(self, region: str, expires: float) -> Access:
        """Key pair and group of the session in a region, made when the first instance there is launched."""
        if region not in self._access:
            self._access[region] = access.ensure(
                self._session.token,
                keys.ensure(self._session),
                self._settings,
                self._networks[region],
                launch.tags(self._session.token, self._owner, expires),
            )
        return self._access[region]

    def _user_data(self, made: Keys, lease: Lease) -> bytes:
        return user_data.make(
            made, expires_at=lease.first_expires_at, written_at=lease.written_at, user=self._settings.user
        )

    def _last_pool(self, host: str) -> Pool:
        lease = [lease for lease in leases.read(self._session) if host in lease.hosts][-1]
        return Pool(type=lease.type, market=lease.market, region=lease.region, zone=lease.zone)

    def _judge(self, causes: dict[str, str], wanted: Sequence[str]) -> None:
        """Whether to go on without these.

        Raises CloudError when not.
        """
        ever = any(lease.instances for lease in leases.read(self._session))
        if causes and not self._begun and (not self._settings.partial or not (ever or self._campaign.hosts)):
            few = f"{len(causes)} of {len(wanted)} instances cannot be had: {_folded(causes)}"
            raise CloudError(few, hint=_FEWER if ever or not self._settings.partial else _FEWER.partition(", or ")[2])


def _words(error: FleetError | OSError) -> str:
    """What is wrong and what to do, for a table."""
    if isinstance(error, FleetError):
        return f"{error.message} ({error.hint})" if error.hint else error.message
    return str(error)


def _folded(causes: dict[str, str]) -> str:
    """Each cause once, with its hosts: `g5-[1-3]: …`."""
    by_cause: dict[str, list[str]] = {}
    for host, cause in causes.items():
        by_cause.setdefault(cause, []).append(host)
    return "; ".join(
        f"{NodeSet.fromlist(hosts, resolver=RESOLVER_NOGROUP)}: {cause}" for cause, hosts in by_cause.items()
    )
