"""Which instances a session needs, who is asked, and what is said of those that run on."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fleet import campaign, handoff, instances
from fleet import session as sessions
from fleet.cloud import leases
from fleet.cloud.leases import Lease, Leased, LeaseState
from fleet.errors import ExitCode
from fleet.handoff import Collected, CollectedFile, Plan, UnitRecord
from fleet.subset import EVERYTHING, Subset
from fleet.terms import Reason, UnitState
from tests.unit.collecting import UNIT, spec_of

if TYPE_CHECKING:
    from pathlib import Path

    from fleet.session import Session

TEXT = """
schema: 1
submitter: Us
benchmarks: [{name: tiny-bert}]
hosts: [{name: own, kind: server}]
cloud:
  max_cost: 10
  instances: [{name: g5, count: 3, types: [g5.xlarge]}]
"""
ASKED = campaign.load_text(TEXT, "fleet.yml")


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return sessions.create(tmp_path / "sessions", TEXT)


def lease(*hosts: str, state: LeaseState = LeaseState.LAUNCHED, hours: float = 1, ended: float | None = None) -> Lease:
    now = time.time()
    return Lease(
        id=leases.new_id(), hosts=hosts, region="us-east-1", zone="us-east-1a", subnet="", type="g5.xlarge",
        market="spot", image="ami-1", root_device="/dev/sda1", volume_gib=50, key_name="k", security_group="sg-1",
        owner="us", usd_per_hour=1.0, price_source="table", written_at=now, first_expires_at=now + hours * 3600,
        expires_at=now + hours * 3600, state=state,
        instances=tuple(Leased(id=f"i-{host}", host=host, ended_at=ended) for host in hosts),
    )  # fmt: skip


def planned(session: Session, **states: UnitState) -> None:
    """A plan with one unit per host (g5_1 is g5-1), each in a state; what is done is home."""
    specs, home = [], {}
    for name, state in states.items():
        host = name.replace("_", "-")
        spec = replace(spec_of(UNIT), unit=f"{host}.x", host=host)
        specs.append(spec)
        reason = Reason.INTERRUPTED if state is UnitState.INTERRUPTED else Reason.NONE
        record = UnitRecord(unit=spec.unit, host=host, state=state, reason=reason)
        session.write(session.run / "units" / f"{spec.unit}.json", record)
        if state is UnitState.DONE:
            home[spec.unit] = Collected(folder=f"collect/{host}", complete=True)
    session.write(session.run / "plan.json", Plan(quick=True, units=tuple(specs)))
    session.write(session.collect / "collected.json", CollectedFile(units=home))


def test_before_there_is_a_plan_every_instance_is_wanted_that_is_not_left_out(session: Session) -> None:
    assert instances.wanted(session, ASKED, EVERYTHING) == ["g5-1", "g5-2", "g5-3"]
    assert instances.wanted(session, ASKED, Subset(limit=("own", "g5-2"))) == ["g5-2"]
    assert instances.asked(session, ASKED, EVERYTHING) == EVERYTHING


def test_a_host_whose_units_are_home_gets_no_instance_again_and_is_not_asked(session: Session) -> None:
    planned(session, own=UnitState.FAILED, g5_1=UnitState.DONE, g5_2=UnitState.FAILED, g5_3=UnitState.DONE)
    leases.write(session, lease("g5-3"))
    assert instances.wanted(session, ASKED, EVERYTHING) == ["g5-2"]
    asked = instances.asked(session, ASKED, EVERYTHING)
    assert {name: asked.left_out(name) for name in ("own", "g5-1", "g5-2", "g5-3")} == {
        "own": "",
        "g5-1": instances.FINISHED,
        "g5-2": "",  # it has none, and needs one: that is said of it, not hidden
        "g5-3": "",  # its instance still runs
    }


def test_only_what_ec2_took_back_is_run_on_another_instance(session: Session) -> None:
    planned(session, own=UnitState.INTERRUPTED, g5_1=UnitState.DONE, g5_2=UnitState.INTERRUPTED, g5_3=UnitState.FAILED)
    assert instances.interrupted(session, ASKED) == ["g5-2"]
    part = instances.only(["g5-2"], session, EVERYTHING)
    assert [name for name in ("own", "g5-1", "g5-2", "g5-3") if not part.left_out(name)] == ["g5-2"]
    assert part.left_out("own") == instances.NOT_AGAIN


def test_what_vanished_before_its_notice_was_heard_is_run_again_when_ec2_took_it_back(session: Session) -> None:
    planned(session, g5_1=UnitState.UNREACHABLE, g5_2=UnitState.UNREACHABLE, g5_3=UnitState.UNREACHABLE)
    taken = lease("g5-1", "g5-2", state=LeaseState.ENDED, ended=5.0)
    back = tuple(replace(leased, cause=leases.TAKEN_BACK) for leased in taken.instances)
    leases.write(session, replace(taken, instances=back))
    # g5-2 has another instance since, and g5-3 just does not answer.
    leases.write(session, replace(lease("g5-2", "g5-3"), written_at=taken.written_at + 1))
    assert instances.interrupted(session, ASKED) == ["g5-1"]


@pytest.mark.parametrize("state", [LeaseState.LAUNCHED, LeaseState.INTENDED])
def test_what_may_still_run_is_an_error_of_its_own(session: Session, state: LeaseState) -> None:
    assert instances.left_running(session) is None
    leases.write(session, lease("g5-1", state=LeaseState.REFUSED))
    leases.write(session, lease("g5-2", state=LeaseState.ENDED, ended=1.0))
    assert not instances.may_run(session)
    leases.write(session, lease("g5-3", state=state))
    error = instances.left_running(session)
    assert error is not None
    assert error.exit_code is ExitCode.LEAK
    assert ("i-g5-3" if state is LeaseState.LAUNCHED else "ids not known yet") in error.message
    assert f"fleet down --session {session.id}" in error.hint


def test_a_unit_that_went_with_its_lease_says_so(session: Session) -> None:
    planned(session, g5_1=UnitState.UNREACHABLE, g5_2=UnitState.UNREACHABLE, g5_3=UnitState.DONE)
    leases.write(session, lease("g5-1", "g5-3", hours=-0.1))
    leases.write(session, lease("g5-2"))
    instances.explain(session)
    known = handoff.records(session)
    assert "its lease ended at" in known["g5-1.x"].cause
    assert (known["g5-2.x"].cause, known["g5-3.x"].cause) == ("", "")


def test_of_an_extension_that_not_all_were_told_each_has_its_own_end(session: Session) -> None:
    planned(session, g5_1=UnitState.UNREACHABLE, g5_2=UnitState.UNREACHABLE)
    found = lease("g5-1", "g5-2", hours=-0.1)
    later = time.time() + 7200
    told = tuple(replace(leased, expires_at=later if leased.host == "g5-2" else 0.0) for leased in found.instances)
    leases.write(session, replace(found, instances=told))
    instances.explain(session)
    known = handoff.records(session)
    assert "its lease ended at" in known["g5-1.x"].cause
    assert not known["g5-2.x"].cause
    error = instances.left_running(session)
    assert error is not None
    assert time.strftime("%H:%M", time.localtime(later)) in error.message
