"""The ledger after a long time, and after what EC2 does with what has been terminated."""

import time

import pytest

from fleet.cloud import arrivals, leases, spend
from fleet.cloud.leases import LeaseState
from tests.cloud.cloud import Cloud
from tests.cloud.conftest import MakeSession
from tests.cloud.launched import HOUR, ids, launched


def test_what_nobody_saw_end_has_cost_until_its_timer_and_no_more(cloud: Cloud, make_session: MakeSession) -> None:
    """A campaign that is gone on with days later: EC2 has forgotten its instances."""
    session, _ = make_session()
    launched(cloud, session, 2, age_s=72 * HOUR, left_s=-68 * HOUR)
    cloud.reset()
    arrivals.reconcile(session)
    (lease,) = leases.read(session)
    assert lease.state is LeaseState.ENDED
    assert [leased.ended_at for leased in lease.instances] == [lease.expires_at] * 2
    assert spend.most((lease,), time.time()) == pytest.approx(2 * 4 * 1.006, rel=0.2)


def test_one_that_was_taken_back_is_known_to_be_when_its_tags_are_gone(cloud: Cloud, make_session: MakeSession) -> None:
    """EC2 takes tags off what has been terminated, sooner or later."""
    session, _ = make_session()
    lease = launched(cloud, session, 2)
    gone = lease.instances[0].id
    cloud.end(gone)
    cloud.client("ec2").delete_tags(
        Resources=[gone], Tags=[{"Key": key} for key in (leases.SESSION_TAG, leases.LEASE_TAG)]
    )
    arrivals.reconcile(session)
    (noted,) = leases.read(session)
    assert noted.instances[0].cause == leases.TAKEN_BACK
    assert leases.live((noted,)).keys() == {"g5-2"}
    assert ids(noted) == ids(lease)
