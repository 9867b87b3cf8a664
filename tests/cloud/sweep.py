"""The controller killed at every point of `fleet up` and `fleet down`, and what then becomes of its session."""

import importlib
import json
import os
import re
import shutil
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fleet.cli.main import cli
from fleet.cloud import aws, keys, leases
from fleet.cloud.leases import LeaseState
from fleet.session import Session
from tests.cloud.cloud import Cloud, Server
from tests.cloud.conftest import CAMPAIGN
from tests.cloud.dying import DIED, Ended, live
from tests.cloud.launching import HOSTS

REGION = "us-east-1"
LATER_S = 5 * 3600.0
"""When leases have long ended."""
VERBS = ("up", "down")


@dataclass
class Row:
    """One death and what came of it."""

    verb: str
    at: int
    point: str
    idempotent: bool
    intended: bool = False
    """Whether it left a lease whose call was not answered."""
    then: dict[str, int] = field(default_factory=dict)
    """What stood at EC2 when the controller was dead."""
    ended_by: str = ""
    """What took it down when nobody came back: `reap`, `timer, reap`."""
    reaped: dict[str, int] = field(default_factory=dict)
    resumed: int = 0
    """Instances after `up` again."""
    after: dict[str, int] = field(default_factory=dict)
    """What stood after `down`."""
    problems: list[str] = field(default_factory=list)


@dataclass
class Sweep:
    """One account and one folder, for one life after another."""

    cloud: Cloud
    folder: Path

    @property
    def roots(self) -> tuple[Path, Path]:
        """Where sessions and secrets lie."""
        return self.folder / "sessions", keys.root()

    @property
    def session(self) -> Session:
        """The only session."""
        return Session(self.folder / "sessions" / "s1")

    def prepare(self) -> None:
        """This process becomes a user's who has never typed `fleet`; forked ones find modules and clients ready."""
        for name, place in {"HOME": "home", "XDG_STATE_HOME": "state", "XDG_CACHE_HOME": "cache"}.items():
            os.environ[name] = str(self.folder / place)
        os.environ.update(self.cloud.environment())
        for name in ("cloud.up", "cloud.down", "cloud.reap", "cli.up", "cli.down", "cli.reap", "cli.cloud_tables"):
            importlib.import_module(f"fleet.{name}")
        aws.client.cache_clear()
        aws._session.cache_clear()
        for service in ("ec2", "ssm", "pricing", "service-quotas", "sts"):
            assert aws.client(service, REGION)._impatient is not None

    def anew(self) -> None:
        """Nothing on disk, nothing at EC2, and EC2 slow to tell."""
        if any(self.cloud.counts(ours=False).values()):
            self.cloud.reset()
        self.cloud.slow(hidden_calls=1, pending_calls=1, ending_calls=1)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        os.chdir(self.folder)
        (self.folder / "fleet.yml").write_text(CAMPAIGN, encoding="utf-8")

    def fleet(self, *words: str, die_at: int | None = None, later_s: float = 0.0) -> Ended:
        """Type `fleet …` in a process of its own."""
        return live(
            lambda: int(cli.main(list(words), standalone_mode=False) or 0), self.roots, die_at=die_at, later_s=later_s
        )

    def verb(self, verb: str, die_at: int | None = None) -> Ended:
        """`fleet up` or `fleet down` for the session."""
        return self.fleet(verb, "--session", "s1", die_at=die_at)

    def points(self) -> list[tuple[str, int, str]]:
        """Every point of a session that nobody disturbs: verb, number, what it is."""
        self.anew()
        found = []
        for verb in VERBS:
            ended = self.verb(verb)
            assert ended.code == 0, ended.said
            found += [(verb, number, point) for number, point in enumerate(ended.points)]
        return found

    def die(self, row: Row) -> None:
        """A session whose controller dies there."""
        self.anew()
        self.cloud.tokens(idempotent=row.idempotent)
        for verb in VERBS[: VERBS.index(row.verb)]:
            assert self.verb(verb).code == 0
        ended = self.verb(row.verb, die_at=row.at)
        assert ended.code == DIED, ended.said
        row.point = ended.points[-1]
        row.intended = any(lease.state is LeaseState.INTENDED for lease in self._leases())
        row.then = self.cloud.counts(ours=False)

    def _leases(self) -> Sequence[leases.Lease]:
        return leases.read(self.session) if (self.session.root / "session.json").is_file() else ()

    def nobody_comes_back(self, row: Row) -> None:
        """The leases end; `fleet reap` is typed then, with or without the timers' help."""
        by_timer = row.at % 2 == 1
        for one in self.cloud.standing()["instances"] if by_timer else ():
            self.cloud.end(one, "Client.InstanceInitiatedShutdown", "Instance initiated shutdown")
        row.ended_by = "timer, reap" if by_timer else "reap"
        for _ in range(2):
            # Hours later EC2 knows what it has.
            self.cloud.client("ec2").describe_instances()
        ended = self.fleet("reap", "--yes", "--region", REGION, later_s=LATER_S)
        if ended.code:
            row.problems.append(f"reap: exit {ended.code}: {ended.said}")
        row.reaped = self.cloud.counts(ours=False)
        if any(row.reaped.values()):
            row.problems.append(f"reap left {row.reaped}")

    def go_on(self, row: Row) -> None:
        """`fleet up` again brings exactly what is wanted, and `fleet down` takes all of it."""
        ended = self.verb("up")
        if ended.code:
            row.problems.append(f"up again: exit {ended.code}: {ended.said}")
        there = leases.live(leases.read(self.session))
        if there.keys() != set(HOSTS):
            row.problems.append(f"hosts with an instance: {sorted(there)}")
        known = {leased.id for _, leased in there.values()}
        alive = {one["id"] for one in self.cloud.instances() if one["state"] in {"pending", "running"}}
        row.resumed = len(alive)
        if alive != known:
            row.problems.append(f"running {sorted(alive)}, and the ledger says {sorted(known)}")
        ended = self.verb("down")
        if ended.code:
            row.problems.append(f"down: exit {ended.code}: {ended.said}")
        row.after = self.cloud.counts(ours=False)
        if any(row.after.values()):
            row.problems.append(f"down left {row.after}")
        open_ = [lease for lease in self._leases() if lease.state not in {LeaseState.ENDED, LeaseState.REFUSED}]
        if open_:
            row.problems.append(f"leases that did not end: {[(lease.id, lease.state.value) for lease in open_]}")
        if secrets := list(keys.root().glob("*")):
            row.problems.append(f"secrets left: {secrets}")

    def try_(self, verb: str, at: int, *, idempotent: bool) -> Row:
        """Both ends of one death."""
        row = Row(verb, at, "", idempotent)
        self.die(row)
        if any(row.then.values()):
            self.nobody_comes_back(row)
            self.die(row)
        self.go_on(row)
        return row


def work(folder: Path, share: int, shares: int, step: int) -> list[Row]:
    """One process's share of every `step`-th point and of all around instances, each with tokens as EC2 has them; where an answer is owed, with moto's too."""
    with Server() as server:
        sweep = Sweep(Cloud(server.url), folder / "user")
        sweep.prepare()
        rows = []
        points = [each for each in sweep.points() if each[1] % step == 0 or "Instances" in each[2]]
        for verb, number, _ in points[share::shares]:
            rows.append(sweep.try_(verb, number, idempotent=True))
            if rows[-1].intended:
                rows.append(sweep.try_(verb, number, idempotent=False))
        return rows


def swept(folder: Path, shares: int, step: int) -> list[Row]:
    """Every `step`-th point, by as many processes."""
    children = {}
    for share in range(shares):
        place = folder / str(share)
        place.mkdir()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                rows = [asdict(row) for row in work(place, share, shares, step)]
                (place / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
                code = 0
            except BaseException:  # noqa: BLE001 - the parent reads it
                (place / "failed").write_text(traceback.format_exc(), encoding="utf-8")
            finally:
                os._exit(code)
        children[child] = place
    found: list[Row] = []
    for child, place in children.items():
        _, status = os.waitpid(child, 0)
        assert status == 0, (place / "failed").read_text(encoding="utf-8")
        found += [Row(**row) for row in json.loads((place / "rows.json").read_text(encoding="utf-8"))]
    return sorted(found, key=lambda row: (VERBS.index(row.verb), row.at, not row.idempotent))


def table(rows: Sequence[Row]) -> str:
    """What is printed: the point, what stood then, and what after each of the two ends."""
    head = f"{'verb':5}{'at':>4}  {'killed at':54}{'tokens':11}{'then':>10}  {'nobody comes back':19}{'up again':>9}{'after down':>12}"
    lines = [head]
    for row in rows:
        tokens = "as EC2's" if row.idempotent else "as moto's"
        back = f"{row.ended_by}: {_short(row.reaped)}" if row.ended_by else "nothing to end"
        lines.append(
            f"{row.verb:5}{row.at:>4}  {_plain(row.point):54}{tokens:11}{_short(row.then):>10}  {back:19}"
            f"{row.resumed:>9}{_short(row.after):>12}" + ("  " + "; ".join(row.problems) if row.problems else "")
        )
    return "\n".join(lines)


def _short(counts: dict[str, int]) -> str:
    """Instances, key pairs, groups, volumes."""
    return "/".join(str(number) for number in counts.values())


def _plain(point: str) -> str:
    """Without what is another one each time."""
    return re.sub(r"lease-[0-9a-f]+", "lease-…", re.sub(r"s1([.-])[0-9a-f]{6}", r"s1\1…", point))
