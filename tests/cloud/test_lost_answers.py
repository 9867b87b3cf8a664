"""RunInstances was carried out and nobody heard the answer: exactly as many instances as were wanted, each somebody's.

Once where client tokens are idempotent, as at EC2, and once where they are not, as in moto.
"""

import time
from dataclasses import replace
from typing import Any

import pytest

from fleet.campaign import Campaign
from fleet.cloud import down, ending, launch, leases
from fleet.cloud.leases import LeaseState
from fleet.cloud.up import up
from fleet.errors import CloudError
from fleet.session import Session
from fleet.watch import Silent
from tests.cloud.cloud import Cloud
from tests.cloud.conftest import MakeSession
from tests.cloud.launching import HOSTS, launched, nothing, quick, running, text

pytestmark = pytest.mark.usefixtures(quick.__name__)


@pytest.fixture(params=[True, False], ids=["idempotent", "not-idempotent"], autouse=True)
def idempotent(cloud: Cloud, request: pytest.FixtureRequest) -> bool:
    cloud.tokens(idempotent=request.param)
    return bool(request.param)


@pytest.fixture(params=[0, 2], ids=["seen", "unseen"], autouse=True)
def hidden(cloud: Cloud, request: pytest.FixtureRequest) -> int:
    """For so many looks DescribeInstances does not know what was launched."""
    cloud.slow(hidden_calls=request.param)
    return int(request.param)


def exactly(cloud: Cloud, session: Session, hosts: tuple[str, ...] = HOSTS) -> None:
    assert launched(session).keys() == set(hosts)
    assert sorted(launched(session).values()) == running(cloud)
    assert len(running(cloud)) == len(hosts)
    assert not [lease for lease in leases.read(session) if lease.state is LeaseState.INTENDED]


@pytest.mark.parametrize("status", [None, 500], ids=["cut", "500"])
def test_the_call_is_repeated_at_once(
    cloud: Cloud, make_session: MakeSession, status: int | None, idempotent: bool
) -> None:
    session, read = make_session()
    cloud.lose("RunInstances", status=status)
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    exactly(cloud, session)
    assert len(cloud.instances()) == (3 if idempotent else 6)


class Killed(BaseException):
    """The controller dies: nothing is cleaned up."""


def _killed(*_: Any) -> Any:
    raise Killed


def die_with_the_answer(session: Session, read: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call of `up` was carried out, and the controller was killed before it wrote down what came."""
    with monkeypatch.context() as patched:
        patched.setattr(launch, "adopt", _killed)
        with pytest.raises(Killed):
            up(session, read, Silent(), hosts=HOSTS)


def test_a_controller_that_died_with_the_answer_adopts_what_it_launched(
    cloud: Cloud, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, read = make_session()
    die_with_the_answer(session, read, monkeypatch)
    assert [lease.state for lease in leases.read(session)] == [LeaseState.INTENDED]
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    exactly(cloud, session)
    assert len(cloud.instances()) == 3


def test_a_controller_that_died_before_the_call_makes_it_word_for_word(
    cloud: Cloud, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, read = make_session()
    with monkeypatch.context() as patched:
        patched.setattr(launch, "call", _killed)
        with pytest.raises(Killed):
            up(session, read, Silent(), hosts=HOSTS)
    (lease,) = leases.read(session)
    assert cloud.calls("RunInstances") == []
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    exactly(cloud, session)
    assert [call["parameters"]["ClientToken"] for call in cloud.calls("RunInstances")] == [lease.id]


def test_what_is_seen_too_late_is_not_launched_twice(
    cloud: Cloud, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch, idempotent: bool
) -> None:
    """The worst of it: nothing is seen for as long as is looked, so that the call is made again."""
    session, read = make_session()
    monkeypatch.setattr(launch, "LOOKS", 1)
    cloud.slow(hidden_calls=4)
    die_with_the_answer(session, read, monkeypatch)
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    exactly(cloud, session)
    assert cloud.counted()["RunInstances"] == 2
    assert len(cloud.instances()) == (3 if idempotent else 6)


def test_hosts_that_need_none_any_more_are_not_launched_again(
    cloud: Cloud, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, read = make_session()
    with monkeypatch.context() as patched:
        patched.setattr(launch, "call", _killed)
        with pytest.raises(Killed):
            up(session, read, Silent(), hosts=["g5-1"])
    assert up(session, read, Silent(), hosts=["g5-2"]) == {}
    exactly(cloud, session, ("g5-2",))
    assert leases.read(session)[0].state is LeaseState.REFUSED


def test_an_expired_lease_is_not_launched_any_more(
    cloud: Cloud, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, read = make_session()
    with monkeypatch.context() as patched:
        patched.setattr(launch, "call", _killed)
        with pytest.raises(Killed):
            up(session, read, Silent(), hosts=HOSTS)
    (lease,) = leases.read(session)
    old = replace(lease, written_at=time.time() - 9000, first_expires_at=time.time() - 1, expires_at=time.time() - 1)
    leases.write(session, old)
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    exactly(cloud, session)
    assert lease.id not in [call["parameters"]["ClientToken"] for call in cloud.calls("RunInstances")]


def test_where_no_answer_ever_comes_everything_is_taken_back(cloud: Cloud, make_session: MakeSession) -> None:
    session, read = make_session()
    cloud.lose("RunInstances", times=None)
    with pytest.raises(CloudError, match="run_instances in us-east-1"):
        up(session, read, Silent(), hosts=HOSTS)
    assert nothing(cloud)


def test_an_answer_in_other_words_is_an_answer(
    cloud: Cloud, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer fleet asks otherwise with the same token: EC2 says so, and what it launched is found by its tag."""
    session, read = make_session(text())
    die_with_the_answer(session, read, monkeypatch)
    monkeypatch.setattr(launch, "LOOKS", 2)
    asked = launch.request
    monkeypatch.setattr(launch, "request", lambda lease, data: {**asked(lease, data), "EbsOptimized": True})
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    exactly(cloud, session)


def test_one_that_down_has_looked_at_is_not_launched_again(
    cloud: Cloud, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller died with the answer, and so did `down` after it had seen what there is."""
    session, read = make_session()
    die_with_the_answer(session, read, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(ending, "terminate", lambda _, ids: _killed() if ids else {})
        with pytest.raises(Killed):
            down.down(session, Silent(), hosts=["g5-2"])
    (lease,) = leases.read(session)
    assert (lease.state, len(lease.instances)) == (LeaseState.INTENDED, 3)
    assert up(session, read, Silent(), hosts=HOSTS) == {}
    exactly(cloud, session)
    assert len(cloud.instances()) == 3


def test_a_refusal_after_no_answer_is_no_refusal(
    cloud: Cloud, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two attempts the first may have been carried out, whatever is said to the second."""
    session, read = make_session()
    cloud.lose("RunInstances", status=500)
    cloud.fault("RunInstances", "UnauthorizedOperation", times=None, skip=1)
    with monkeypatch.context() as patched:
        patched.setattr(down, "down", lambda *_, **__: ())
        with pytest.raises(CloudError, match="UnauthorizedOperation"):
            up(session, read, Silent(), hosts=HOSTS)
    assert [lease.state for lease in leases.read(session)] == [LeaseState.INTENDED]
    cloud.heal()
    assert len(down.down(session, Silent())) == 3
    assert nothing(cloud)
