"""What leases cost, by hand."""

import dataclasses
from pathlib import Path

import pytest

from fleet import handoff
from fleet import session as sessions
from fleet.cli import cloud_tables
from fleet.cloud import leases, spend
from fleet.cloud.leases import LeaseState
from fleet.cloud.price_table import table
from tests.unit.cloud.leased import LAUNCHED, NOW, lease, leased

VOLUME = table().besides(150, public=False)
BOTH = table().besides(150, public=True)


def test_seconds_are_billed_and_a_minute_at_least() -> None:
    assert spend.usd(3600, 61) == 61
    assert spend.usd(3600, 3) == 60


def test_from_launch_to_end_or_until_now() -> None:
    ended, running = leased("a-1", ended_at=NOW - 3600), leased("a-2")
    found = spend.of([lease(instances=(ended, running), public=True)], NOW)
    assert [item.usd for item in found.instances] == [1.0, 2.0]
    assert found.usd == 3.0
    assert found.besides_usd == pytest.approx(3 * BOTH)
    one = found.instances[0]
    assert (one.host, one.market, one.price_source, one.ended_at) == (
        "a-1", "on-demand", "pricing-api 2026-11-25", NOW - 3600,
    )  # fmt: skip


def test_one_too_many_and_one_that_was_replaced_cost_as_well() -> None:
    spare = leased("", id="i-spare", ended_at=LAUNCHED + 5)
    first = lease(instances=(leased("a-1", ended_at=NOW - 3600, cause="spot interruption"), spare), market="spot")
    second = lease(id="lease-2", instances=(leased("a-1", id="i-2", launched_at=NOW - 1800),), usd_per_hour=2.0)
    assert spend.of([first, second], NOW).usd == pytest.approx(1.0 + 60 / 3600 + 1.0)


def test_what_was_not_seen_to_be_gone_is_counted_until_its_timer_at_most() -> None:
    (item,) = spend.of([lease(instances=(leased("a-1"),))], NOW + 100 * 3600).instances
    assert item.usd == pytest.approx(3.0)
    assert item.ended_at is None


def test_the_most_counts_what_still_runs_to_the_end_of_its_lease() -> None:
    one = lease(instances=(leased("a-1", ended_at=NOW), leased("a-2")))
    assert spend.most([one], NOW) == pytest.approx((2 + 3) * (1 + VOLUME))
    # One that outlives its timer is worse than planned.
    assert spend.most([one], NOW + 7200) == pytest.approx((2 + 4) * (1 + VOLUME))
    # An extension that was not answered may hold; one timer may be later than the others'.
    unsure = dataclasses.replace(one, may_expire_at=NOW + 2 * 3600)
    assert spend.most([unsure], NOW) == pytest.approx((2 + 4) * (1 + VOLUME))
    moved = lease(instances=(leased("a-1", expires_at=NOW + 2 * 3600), leased("a-2")))
    assert spend.most([moved], NOW) == pytest.approx((4 + 3) * (1 + VOLUME))


def test_a_call_that_may_have_been_carried_out_can_cost_everything() -> None:
    intended = lease(state=LeaseState.INTENDED, public=True)
    assert spend.most([intended], NOW) == pytest.approx(2 * 3 * (1 + BOTH))
    assert spend.most([intended], NOW, without={"a-1", "a-2"}) == 0
    assert spend.most([lease(state=LeaseState.REFUSED)], NOW) == 0


def test_it_is_written_for_results_and_only_where_there_are_leases(tmp_path: Path) -> None:
    session = sessions.create(tmp_path, "x")
    assert spend.write(session) is None
    assert handoff.spend(session) is None
    leases.write(session, lease(instances=(leased("a-1", ended_at=NOW),)))
    written = spend.write(session)
    assert written == handoff.spend(session)
    assert written is not None
    assert written.usd == 2.0
    assert cloud_tables.spent(written).startswith("cost: $2.00 for 1 instance, about $0.033 for volumes and addresses")


def test_in_a_line_what_may_still_run_is_said() -> None:
    assert cloud_tables.spent(None) == ""
    found = spend.of([lease(instances=(leased("a-1", ended_at=NOW), leased("a-2")))], NOW)
    assert ", and growing: 1 of 2 not seen to be gone; traffic, taxes" in cloud_tables.spent(found)
