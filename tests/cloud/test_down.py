"""Down: everything of a session ends, whoever noted it; what is not sure to be gone is a leak, with ids."""

import time
from dataclasses import replace

import pytest

from fleet.cloud import aws, down, keys, leases
from fleet.cloud.leases import LeaseState
from fleet.errors import CloudError, ExitCode, LeakError
from fleet.watch import Silent
from tests.cloud.cloud import Cloud
from tests.cloud.conftest import MakeSession
from tests.cloud.launched import ids, launched, stranger

NOTHING = {"instances": 0, "key_pairs": 0, "groups": 0, "volumes": 0}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(down, "PACE_S", 0.05)
    monkeypatch.setattr(down, "SLOWEST_S", 0.2)
    monkeypatch.setattr(down, "LOOK_S", 0.5)


class Notes(Silent):
    """What was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Kept."""
        self.notes.append(text)


def test_everything_of_the_session_goes_and_nothing_else(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    other, _ = make_session(name="s2")
    lease, beside = launched(cloud, session, 3), launched(cloud, other, 1)
    others = stranger(cloud)
    asked = time.time()
    assert sorted(down.down(session, Silent())) == ids(lease)
    assert cloud.standing(ours=False)["instances"] == [*ids(beside), others]
    assert cloud.counts() == {"instances": 1, "key_pairs": 1, "groups": 1, "volumes": 1}
    (noted,) = leases.read(session)
    assert noted.state is LeaseState.ENDED
    assert [leased.cause for leased in noted.instances] == [""] * 3
    assert all(asked - 2 < leased.ended_at < time.time() + 1 for leased in noted.instances if leased.ended_at)
    assert [token for token, _ in keys.known()] == [other.token]
    down.down(other, Silent())
    assert cloud.counts() == NOTHING


def test_five_hundred_take_one_call_and_one_look_sees_them_all(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    for _ in range(5):
        launched(cloud, session, 100)
    cloud.forget_calls()
    began, cpu = time.monotonic(), time.process_time()
    assert len(down.down(session, Silent())) == 500
    wall, cpu, counted = time.monotonic() - began, time.process_time() - cpu, cloud.counted()
    print(f"500 instances: {counted.total()} calls, {wall:.1f} s, {cpu:.1f} s of CPU: {dict(counted)}")
    assert counted["TerminateInstances"] == 1
    assert counted["DescribeInstances"] <= 3
    assert counted.total() <= 15
    assert cloud.counts() == NOTHING


def test_a_session_that_launched_nothing_asks_nobody(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    assert down.down(session, Silent()) == ()
    assert not cloud.calls()


def test_group_and_key_pair_without_any_lease_go_too(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    lease = launched(cloud, session, 1)
    down.down(session, Silent())
    keys.ensure(session)
    (session.cloud / "leases" / f"{lease.id}.json").unlink()
    tags = [{"Key": leases.SESSION_TAG, "Value": session.token}]
    cloud.client("ec2").create_security_group(
        GroupName="g", Description="g", TagSpecifications=[{"ResourceType": "security-group", "Tags": tags}]
    )
    assert cloud.counts()["groups"] == 1
    assert down.down(session, Silent()) == ()
    assert cloud.counts() == NOTHING
    assert not keys.known()


def test_without_secrets_the_leases_are_enough(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    lease = launched(cloud, session)
    keys.forget(session)
    assert sorted(down.down(session, Silent())) == ids(lease)
    assert cloud.counts() == NOTHING


def test_instances_that_nobody_noted_are_found_noted_and_ended(
    cloud: Cloud, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(down, "UNSEEN_S", 5.0)
    session, _ = make_session()
    cloud.slow(hidden_s=1.0)
    launched(cloud, session, 2, known=False, age_s=0)
    found = down.down(session, Silent())
    (noted,) = leases.read(session)
    assert (noted.state, sorted(found)) == (LeaseState.ENDED, ids(noted))
    assert [leased.host for leased in noted.instances] == ["g5-1", "g5-2"]
    assert cloud.counts() == NOTHING


def test_a_call_that_was_never_made_ends_its_lease(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    lease = launched(cloud, session, 1)
    down.down(session, Silent())
    leases.write(session, replace(lease, state=LeaseState.INTENDED, instances=()))
    cloud.reset()
    assert down.down(session, Silent()) == ()
    (noted,) = leases.read(session)
    assert (noted.state, noted.cause) == (LeaseState.ENDED, "no instance came of it")


def test_one_that_is_seen_only_when_its_group_cannot_go_is_ended(
    cloud: Cloud, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(down, "LOOK_S", 0.0)
    session, _ = make_session()
    cloud.slow(hidden_calls=2)
    launched(cloud, session, 1, known=False, age_s=7200)
    (found,) = down.down(session, Silent())
    (noted,) = leases.read(session)
    assert (noted.state, ids(noted)) == (LeaseState.ENDED, [found])
    assert cloud.counts() == NOTHING


def test_an_instance_that_ec2_does_not_know_yet_is_waited_for(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    cloud.slow(hidden_s=1.0)
    lease = launched(cloud, session, 2, age_s=0)
    assert sorted(down.down(session, Silent())) == ids(lease)
    assert cloud.counts() == NOTHING


def test_one_that_stays_unknown_so_soon_after_its_launch_is_a_leak(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    cloud.slow(hidden_s=60)
    lease = launched(cloud, session, 1, age_s=0)
    with pytest.raises(LeakError, match=rf"{ids(lease)[0]} in us-east-1 \(EC2 does not know it yet\)"):
        down.down(session, Silent(), bound_s=0.5)


def test_one_that_ec2_forgot_long_ago_is_gone(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    launched(cloud, session, 1, age_s=7200, left_s=-3600)
    cloud.reset()
    down.down(session, Silent())
    (noted,) = leases.read(session)
    assert noted.instances[0].ended_at == noted.expires_at
    assert noted.instances[0].cause == "EC2 does not know it any more"


def test_a_terminate_that_fails_for_a_while_is_repeated(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    lease = launched(cloud, session)
    cloud.fault("TerminateInstances", "OperationAborted", times=4, status=400)
    watch = Notes()
    assert sorted(down.down(session, watch)) == ids(lease)
    assert [note for note in watch.notes if "OperationAborted" in note] == watch.notes[:1]
    assert cloud.counts() == NOTHING


def test_a_terminate_that_fails_for_good_is_a_leak_with_every_id(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    here, there = launched(cloud, session), launched(cloud, session, 1, region="eu-west-1")
    cloud.fault("TerminateInstances", "OperationAborted", times=None, region="us-east-1", status=400)
    with pytest.raises(LeakError) as caught:
        down.down(session, Silent(), bound_s=1)
    assert caught.value.exit_code is ExitCode.LEAK
    assert all(f"{one} in us-east-1" in caught.value.message for one in ids(here))
    assert ids(there)[0] not in caught.value.message
    assert "OperationAborted" in caught.value.message
    assert "Its own timer ends an instance by " in caught.value.message
    assert caught.value.hint == f"fleet down --session s1 --sessions {session.root.parent}"
    assert keys.known(), "with the secrets the session would be forgotten"
    cloud.heal()
    assert sorted(down.down(session, Silent())) == ids(here)
    assert cloud.counts() == NOTHING


def test_one_that_nobody_may_end_holds_no_other_up(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    lease = launched(cloud, session, 9)
    kept = ids(lease)[4]
    cloud.client("ec2").modify_instance_attribute(InstanceId=kept, DisableApiTermination={"Value": True})
    with pytest.raises(LeakError, match=f"may still be running: {kept} in us-east-1 "):
        down.down(session, Silent(), bound_s=1)
    assert cloud.standing()["instances"] == [kept]


@pytest.mark.parametrize("action", ["DescribeInstances", "TerminateInstances", "DescribeSecurityGroups"])
def test_credentials_that_expire_in_the_middle(cloud: Cloud, make_session: MakeSession, action: str) -> None:
    session, _ = make_session()
    lease = launched(cloud, session)
    cloud.fault(action, "RequestExpired", times=None, status=400)
    began = time.monotonic()
    with pytest.raises(CloudError) as caught:
        down.down(session, Silent())
    assert time.monotonic() - began < 30, "waiting helps nobody"
    assert "RequestExpired" in caught.value.message
    assert "renew your credentials" in caught.value.hint
    assert "fleet down --session s1" in caught.value.hint
    if action != "DescribeSecurityGroups":
        assert caught.value.exit_code is ExitCode.LEAK
        assert all(one in caught.value.message for one in ids(lease))
    cloud.heal()
    down.down(session, Silent())
    assert cloud.counts() == NOTHING
    assert not keys.known()


def test_without_credentials_the_leases_still_name_the_ids(
    cloud: Cloud, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, _ = make_session()
    lease = launched(cloud, session)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    aws.client.cache_clear()
    aws._session.cache_clear()
    with pytest.raises(LeakError) as caught:
        down.down(session, Silent())
    assert all(one in caught.value.message for one in ids(lease))
    assert "no AWS credentials" in caught.value.message


def test_a_group_in_use_is_waited_for(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    launched(cloud, session)
    cloud.fault("DeleteSecurityGroup", "DependencyViolation", times=3, status=400)
    down.down(session, Silent())
    assert cloud.counts() == NOTHING


def test_a_group_in_use_for_good_is_said_and_the_secrets_stay(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    lease = launched(cloud, session)
    cloud.fault("DeleteSecurityGroup", "DependencyViolation", times=None, status=400)
    with pytest.raises(CloudError, match=f"security-group {lease.security_group} in us-east-1") as caught:
        down.down(session, Silent(), bound_s=4)
    assert caught.value.exit_code is ExitCode.ERROR
    assert keys.known()
    assert leases.read(session)[0].state is LeaseState.ENDED


def test_a_volume_that_stayed_goes(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    launched(cloud, session, 1)
    tags = [{"Key": leases.SESSION_TAG, "Value": session.token}]
    cloud.client("ec2").create_volume(
        AvailabilityZone="us-east-1a", Size=1, TagSpecifications=[{"ResourceType": "volume", "Tags": tags}]
    )
    down.down(session, Silent())
    assert cloud.counts() == NOTHING


def test_some_hosts_only(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    lease = launched(cloud, session, 3)
    assert down.down(session, Silent(), hosts={"g5-2"}) == (lease.instances[1].id,)
    assert sorted(cloud.standing()["instances"]) == sorted([lease.instances[0].id, lease.instances[2].id])
    (noted,) = leases.read(session)
    assert noted.state is LeaseState.LAUNCHED
    assert sorted(leases.live((noted,))) == ["g5-1", "g5-3"]
    assert cloud.counts()["groups"] == 1
    assert keys.known()


def test_a_call_whose_answer_was_lost_is_settled_by_those_that_are_left(
    cloud: Cloud, make_session: MakeSession
) -> None:
    session, _ = make_session()
    lease = launched(cloud, session, 3)
    leases.write(session, replace(lease, state=LeaseState.INTENDED, instances=()))
    assert down.down(session, Silent(), hosts={"g5-2"}) == (lease.instances[1].id,)
    (noted,) = leases.read(session)
    assert noted.state is LeaseState.LAUNCHED
    assert {host: leased.id for host, (_, leased) in leases.live((noted,)).items()} == {
        "g5-1": lease.instances[0].id,
        "g5-3": lease.instances[2].id,
    }
    # It is reached as the lease says, whatever other addresses it has.
    assert {leased.public_address for leased in noted.instances} == {""}


@pytest.mark.parametrize(
    ("code", "left_s", "cause"),
    [
        ("Server.SpotInstanceTermination", 3600, "spot interruption"),
        ("Client.InstanceInitiatedShutdown", -10, "lease expired"),
        ("Client.UserInitiatedShutdown", 3600, "terminated through EC2"),
    ],
)
def test_one_that_ended_by_itself_is_noted_with_its_cause(
    cloud: Cloud, make_session: MakeSession, code: str, left_s: float, cause: str
) -> None:
    session, _ = make_session()
    lease = launched(cloud, session, 2, left_s=left_s)
    ended, alive = (leased.id for leased in lease.instances)
    cloud.end(ended, code)
    cloud.forget_calls()
    assert sorted(down.down(session, Silent())) == ids(lease)
    (noted,) = leases.read(session)
    assert [leased.cause for leased in noted.instances] == [cause, ""]
    (call,) = cloud.calls("TerminateInstances")
    assert [value for key, value in call["parameters"].items() if key.startswith("InstanceId")] == [alive]


def test_one_that_lost_our_tag_is_not_touched_and_named(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    lease = launched(cloud, session)
    kept, other = ids(lease)
    cloud.client("ec2").delete_tags(Resources=[kept], Tags=[{"Key": leases.SESSION_TAG}])
    with pytest.raises(LeakError, match=rf"running: {kept} in us-east-1 \(it carries our tag no more\)"):
        down.down(session, Silent(), bound_s=1)
    assert cloud.standing()["instances"] == [kept]
    assert other not in cloud.standing()["instances"]
