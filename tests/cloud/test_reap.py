"""Reap: what outlived its lease is found by its tags in every region, shown, and ended when asked; nothing else is."""

import json
import time
from pathlib import Path

import pytest

from fleet.cli.main import cli
from fleet.cloud import down, keys, leases, reap
from fleet.cloud.leases import EXPIRY_TAG, OWNER_TAG, SESSION_TAG
from fleet.errors import CloudError, ExitCode, LeakError
from tests.cloud.cloud import Cloud
from tests.cloud.conftest import MakeSession
from tests.cloud.launched import ids, launched, stranger

EVERYWHERE = reap.everywhere
NOTHING = {"instances": 0, "key_pairs": 0, "groups": 0, "volumes": 0}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(down, "PACE_S", 0.05)
    monkeypatch.setattr(down, "SLOWEST_S", 0.2)
    # moto knows 34: asked in one test.
    monkeypatch.setattr(reap, "everywhere", lambda: ("eu-west-1", "us-east-1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def fleet(*arguments: str) -> ExitCode:
    code: ExitCode = cli.main(["reap", *arguments], standalone_mode=False)
    return code


def test_a_dry_run_shows_and_touches_nothing(
    cloud: Cloud, make_session: MakeSession, capsys: pytest.CaptureFixture[str]
) -> None:
    old, fresh = make_session(name="old")[0], make_session(name="fresh")[0]
    gone = launched(cloud, old, 2, region="eu-west-1", left_s=-3600)
    launched(cloud, fresh, 1)
    before = cloud.counts()
    assert fleet() is ExitCode.LEAK
    said = capsys.readouterr()
    assert "2 expired instances would be ended" in said.out
    rows = [line for line in said.out.splitlines() if line.startswith("i-")]
    assert [row.split()[0] for row in rows] == ids(gone)
    since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(gone.expires_at))
    assert all(word in rows[0] for word in ("g5.xlarge", "eu-west-1", old.token, "moto", since, "1.006"))
    assert fresh.token not in said.out
    assert "fleet reap --yes" in said.err
    assert cloud.counts() == before
    assert not [call for call in cloud.calls() if call["action"].startswith(("Terminate", "Delete"))]


def test_yes_ends_what_expired_in_every_region_with_all_that_was_made_for_it(
    cloud: Cloud, make_session: MakeSession, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reap, "everywhere", EVERYWHERE)
    old, fresh = make_session(name="old")[0], make_session(name="fresh")[0]
    gone = [launched(cloud, old, 1, region=region, left_s=-60) for region in ("us-east-1", "ap-south-1")]
    stays, other = launched(cloud, fresh, 1), stranger(cloud)
    assert fleet("--yes") is ExitCode.OK
    assert all(one in capsys.readouterr().err for one in ids(gone[0]))
    assert sorted(cloud.standing(ours=False)["instances"]) == sorted([*ids(stays), other])
    assert cloud.counts() == {"instances": 1, "key_pairs": 1, "groups": 1, "volumes": 1}
    noted = leases.read(old)
    assert all(leased.ended_at for lease in noted for leased in lease.instances)
    assert fleet() is ExitCode.OK


def test_without_session_folder_and_secrets_the_tags_are_enough(
    cloud: Cloud, make_session: MakeSession, capsys: pytest.CaptureFixture[str]
) -> None:
    session, _ = make_session()
    launched(cloud, session, 1, left_s=-60)
    keys.forget(session)
    session.root.rename(session.root.parent / ".elsewhere")
    assert fleet("--json") is ExitCode.LEAK
    (instance, *rest) = json.loads(capsys.readouterr().out)["items"]
    assert (instance["kind"], instance["usd_per_hour"]) == ("instance", None)
    assert {item["kind"] for item in rest} <= {"security-group", "key-pair", "volume"}
    assert fleet("--yes") is ExitCode.OK
    assert cloud.counts() == NOTHING


def test_another_owner_s_are_shown_and_ended_only_when_asked_for(
    cloud: Cloud, make_session: MakeSession, capsys: pytest.CaptureFixture[str]
) -> None:
    session, _ = make_session()
    lease = launched(cloud, session, 1, owner="ann", left_s=-60)
    keys.forget(session)
    assert fleet("--yes") is ExitCode.OK
    assert "it is ann's: --owner ann" in capsys.readouterr().out
    assert cloud.standing()["instances"] == ids(lease)
    assert fleet("--owner", "bob", "--yes") is ExitCode.OK
    assert cloud.standing()["instances"] == ids(lease)
    assert fleet("--owner", "ann") is ExitCode.LEAK
    assert fleet("--all-owners", "--yes") is ExitCode.OK
    assert cloud.counts() == NOTHING


def test_a_session_of_this_machine_is_ours_whatever_owner_it_names(cloud: Cloud, make_session: MakeSession) -> None:
    launched(cloud, make_session()[0], 1, owner="team-x", left_s=-60)
    assert fleet("--yes") is ExitCode.OK
    assert cloud.counts() == NOTHING


def test_an_expiry_that_says_no_time_is_shown_and_left_alone(
    cloud: Cloud, make_session: MakeSession, capsys: pytest.CaptureFixture[str]
) -> None:
    session, _ = make_session()
    lease = launched(cloud, session, 1, left_s=-60)
    cloud.client("ec2").create_tags(Resources=ids(lease), Tags=[{"Key": EXPIRY_TAG, "Value": "tomorrow"}])
    before = cloud.counts()
    assert fleet("--all-owners", "--yes") is ExitCode.OK
    out = capsys.readouterr().out
    assert "its expiry tag says no time" in out
    assert "tomorrow" in out
    assert cloud.counts() == before


@pytest.mark.parametrize("tags", [{"Name": "database"}, {EXPIRY_TAG: "2020-01-01T00:00:00Z"}, {OWNER_TAG: "moto"}])
def test_what_has_no_session_of_ours_is_never_touched(cloud: Cloud, tags: dict[str, str]) -> None:
    one = stranger(cloud, tags=tags)
    assert fleet("--all-owners", "--yes") is ExitCode.OK
    assert cloud.standing(ours=False)["instances"] == [one]


def test_one_session_and_one_region_only(cloud: Cloud, make_session: MakeSession) -> None:
    first, second = make_session(name="s1")[0], make_session(name="s12")[0]
    launched(cloud, first, 1, left_s=-60)
    elsewhere = launched(cloud, first, 1, region="eu-west-1", left_s=-60)
    other = launched(cloud, second, 1, left_s=-60)
    assert fleet("--session", "s1", "--region", "us-east-1", "--yes") is ExitCode.OK
    assert sorted(cloud.standing()["instances"]) == sorted(ids(elsewhere, other))
    assert fleet("--session", first.token, "--yes") is ExitCode.OK
    assert cloud.standing()["instances"] == ids(other)


def test_group_and_key_pair_stay_as_long_as_an_instance_of_the_session_may(
    cloud: Cloud, make_session: MakeSession
) -> None:
    session, _ = make_session()
    launched(cloud, session, 1, left_s=-60)
    later = launched(cloud, session, 1, left_s=3600)
    assert fleet("--yes") is ExitCode.OK
    assert cloud.counts() == {"instances": 1, "key_pairs": 1, "groups": 1, "volumes": 1}
    assert cloud.standing()["instances"] == ids(later)


def test_a_group_alone_goes_when_its_time_is_over(cloud: Cloud) -> None:
    for name, expires in (("over", "2020-01-01T00:00:00Z"), ("not-yet", "2099-01-01T00:00:00Z")):
        tags = [
            {"Key": key, "Value": value}
            for key, value in {SESSION_TAG: name, OWNER_TAG: "moto", EXPIRY_TAG: expires}.items()
        ]
        cloud.client("ec2").create_security_group(
            GroupName=name, Description="g", TagSpecifications=[{"ResourceType": "security-group", "Tags": tags}]
        )
    assert fleet() is ExitCode.OK, "a group runs up no bill"
    assert fleet("--yes") is ExitCode.OK
    assert cloud.counts()["groups"] == 1


def test_what_cannot_be_ended_is_a_leak_with_ids(cloud: Cloud, make_session: MakeSession) -> None:
    lease = launched(cloud, make_session()[0], 2, left_s=-60)
    cloud.fault("TerminateInstances", "UnauthorizedOperation", times=None, status=403)
    with pytest.raises(LeakError) as caught:
        fleet("--yes")
    assert all(one in caught.value.message for one in ids(lease))
    assert caught.value.exit_code is ExitCode.LEAK
    cloud.heal()
    cloud.fault("TerminateInstances", "OperationAborted", times=3, status=400)
    assert fleet("--yes") is ExitCode.OK
    assert cloud.counts() == NOTHING


def test_a_region_that_does_not_answer_is_named(
    cloud: Cloud, make_session: MakeSession, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(cloud, make_session()[0], 1, left_s=-60)
    cloud.fault("DescribeInstances", "UnauthorizedOperation", times=None, region="eu-west-1", status=403)
    assert fleet("--yes") is ExitCode.ERROR
    assert "eu-west-1: could not be asked: " in capsys.readouterr().err
    assert cloud.counts() == NOTHING


def test_without_credentials_nothing_is_said_to_be_clean(cloud: Cloud) -> None:
    cloud.expire()
    with pytest.raises(CloudError, match="Expired"):
        fleet()
