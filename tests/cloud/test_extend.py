"""Extend: ledger, tags and timers move together, and the ledger never promises more than a timer keeps."""

import time
from pathlib import Path
from typing import Any

import pytest

from fleet.cli.main import cli
from fleet.cloud import extend, leases, user_data
from fleet.cloud.leases import EXPIRY_TAG, Lease
from fleet.errors import CampaignError, CloudError, ExitCode
from fleet.inventory import reach
from fleet.inventory.hosts import Host
from fleet.session import Session
from fleet.terms import HostState
from tests.cloud.cloud import Cloud
from tests.cloud.conftest import MakeSession
from tests.cloud.launched import HOUR, ids, launched

LOST, REFUSED, READ_ONLY = "lost", "refused", "read-only"


class Timers:
    """The instances' own files, in one folder; a host may be broken in some way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broken: dict[str, str] = {}

    def connect(self, host: Host) -> reach.Connection:
        """What reach.connect would give."""
        if self.broken.get(host.name) == REFUSED:
            raise reach.Unreachable(HostState.UNREACHABLE, "no answer from 10.0.0.1 port 22 in 10 s", "ssh 10.0.0.1")
        return _There(self, host)

    def said(self, host: str) -> str:
        """What the timer of a host reads."""
        path = self.folder / host / "expires-at"
        return path.read_text(encoding="ascii").strip() if path.exists() else ""


class _There(reach.LocalConnection):
    def __init__(self, timers: Timers, host: Host) -> None:
        self._timers, self._host = timers, host.name

    def run(self, command: str, *, timeout: float, stdin: bytes = b"", stalled: float | None = None) -> reach.Answer:
        """In the host's folder; an answer that is lost is lost after the command was carried out."""
        how = self._timers.broken.get(self._host)
        folder = self._timers.folder / self._host
        if how != READ_ONLY:
            folder.mkdir(exist_ok=True)
        answer = super().run(
            command.replace(user_data.EXPIRES_AT, str(folder / "expires-at")), timeout=timeout, stdin=stdin
        )
        if how == LOST:
            raise reach.Unreachable(HostState.UNREACHABLE, "no answer in 30 s", f"ssh {self._host}")
        del stalled
        return answer


@pytest.fixture
def timers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Timers:
    made = Timers(tmp_path / "timers")
    made.folder.mkdir()
    monkeypatch.setattr(reach, "connect", made.connect)
    return made


def fleet(session: Session, *arguments: str) -> ExitCode:
    code: ExitCode = cli.main(
        ["extend", "--session", session.id, "--sessions", str(session.root.parent), *arguments], standalone_mode=False
    )
    return code


def ledger(session: Session) -> Lease:
    (lease,) = leases.read(session)
    return lease


def tags(cloud: Cloud, lease: Lease) -> dict[str, str]:
    """Host to its expiry tag."""
    made: Any = cloud.client("ec2", lease.region).describe_instances(InstanceIds=ids(lease))["Reservations"]
    found = {
        item["InstanceId"]: {tag["Key"]: tag["Value"] for tag in item["Tags"]}[EXPIRY_TAG]
        for reservation in made
        for item in reservation["Instances"]
    }
    return {leased.host: found[leased.id] for leased in lease.instances}


def test_ledger_tags_and_timers_move(cloud: Cloud, make_session: MakeSession, timers: Timers) -> None:
    session, _ = make_session()
    before = launched(cloud, session, 3)
    assert fleet(session, "--hours", "2") is ExitCode.OK
    lease = ledger(session)
    assert lease.expires_at == int(before.expires_at + 2 * HOUR)
    assert (lease.may_expire_at, {leased.expires_at for leased in lease.instances}) == (0.0, {0.0})
    assert lease.first_expires_at == before.first_expires_at
    assert set(tags(cloud, lease).values()) == {leases.expiry_text(lease.expires_at)}
    assert {timers.said(host) for host in lease.hosts} == {str(int(lease.expires_at))}
    group: Any = cloud.client("ec2").describe_security_groups(GroupIds=[lease.security_group])["SecurityGroups"][0]
    assert {"Key": EXPIRY_TAG, "Value": leases.expiry_text(lease.expires_at)} in group["Tags"]


def test_a_controller_at_work_does_not_stand_in_the_way(
    cloud: Cloud, make_session: MakeSession, timers: Timers
) -> None:
    session, _ = make_session()
    launched(cloud, session, 1)
    with session.locked():
        assert fleet(session, "--hours", "1") is ExitCode.OK
    assert timers.said("g5-1")


def test_over_max_cost_nothing_moves(cloud: Cloud, make_session: MakeSession, timers: Timers) -> None:
    session, _ = make_session()
    before = launched(cloud, session, 3)
    cloud.forget_calls()
    with pytest.raises(CloudError, match=r"can cost \d+\.\d\d US dollars, more than max_cost, which is 100") as caught:
        fleet(session, "--hours", "100")
    assert ledger(session) == before
    assert not timers.said("g5-1")
    assert "CreateTags" not in cloud.counted()
    allowed = caught.value.hint.split("--max-cost ")[1]
    assert fleet(session, "--hours", "100", "--max-cost", allowed) is ExitCode.OK


@pytest.mark.parametrize("how", [REFUSED, READ_ONLY, LOST])
def test_a_host_that_cannot_be_told_keeps_its_earlier_end(
    cloud: Cloud, make_session: MakeSession, timers: Timers, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    session, _ = make_session()
    before = launched(cloud, session, 3)
    timers.broken["g5-2"] = how
    assert fleet(session, "--hours", "2") is ExitCode.MISSING
    lease, end = ledger(session), int(before.expires_at + 2 * HOUR)
    one, two, _ = lease.instances
    assert (lease.expires_at, two.expires_at, one.expires_at) == (before.expires_at, 0.0, end)
    assert leases.end_of(lease, two) == before.expires_at
    assert lease.may_expire_at == (end if how == LOST else 0.0), "a lost answer may have moved the timer"
    assert leases.latest_end(lease) == end
    assert tags(cloud, lease) == {
        "g5-1": leases.expiry_text(end), "g5-2": leases.expiry_text(before.expires_at), "g5-3": leases.expiry_text(end),
    }  # fmt: skip
    said = capsys.readouterr()
    assert "2 of 3 instances live longer" in said.out
    again = f"fleet extend --session s1 --until {extend.text(end)} --limit g5-2"
    assert again in said.err
    timers.broken.clear()
    (timers.folder / "g5-2").mkdir(exist_ok=True)
    assert fleet(session, *again.split()[4:]) is ExitCode.OK
    lease = ledger(session)
    assert (lease.expires_at, lease.may_expire_at, {leased.expires_at for leased in lease.instances}) == (
        end,
        0.0,
        {0.0},
    )


def test_an_instance_that_has_ended_is_named_and_no_other_suffers(
    cloud: Cloud, make_session: MakeSession, timers: Timers, capsys: pytest.CaptureFixture[str]
) -> None:
    session, _ = make_session()
    lease = launched(cloud, session, 2)
    cloud.end(lease.instances[0].id)
    assert fleet(session, "--hours", "1") is ExitCode.MISSING
    assert "it has ended: spot interruption" in capsys.readouterr().out
    assert not timers.said("g5-1")
    assert timers.said("g5-2")


def test_tags_that_cannot_be_written_leave_every_timer_as_it_was(
    cloud: Cloud, make_session: MakeSession, timers: Timers
) -> None:
    session, _ = make_session()
    before = launched(cloud, session, 1)
    cloud.fault("CreateTags", "UnauthorizedOperation", times=None, status=403)
    with pytest.raises(CloudError, match="UnauthorizedOperation"):
        fleet(session, "--hours", "1")
    assert ledger(session).expires_at == before.expires_at
    assert not timers.said("g5-1")
    cloud.heal()
    assert fleet(session, "--hours", "1") is ExitCode.OK
    assert ledger(session).expires_at == int(before.expires_at + HOUR)


def test_nothing_that_runs(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    with pytest.raises(CloudError, match="no instance of session s1 is running"):
        fleet(session, "--hours", "1")
    assert not cloud.calls()


@pytest.mark.parametrize(
    ("given", "said"), [(["--until", "soon"], "no time"), (["--until", "2020-01-01T00:00:00Z"], "that has been")]
)
def test_a_time_that_is_none(make_session: MakeSession, given: list[str], said: str) -> None:
    with pytest.raises(CampaignError, match=said):
        fleet(make_session()[0], *given)


def test_until_is_never_earlier_than_planned(cloud: Cloud, make_session: MakeSession, timers: Timers) -> None:
    session, _ = make_session()
    before = launched(cloud, session, 1, left_s=5 * HOUR)
    assert fleet(session, "--until", extend.text(time.time() + HOUR)) is ExitCode.OK
    assert ledger(session).expires_at == before.expires_at
    assert float(timers.said("g5-1")) <= before.expires_at
