"""What becomes of a unit when a session goes on: kept, waited for, fetched, or run again with the reason."""

from dataclasses import replace
from typing import Any

import pytest

from fleet import handoff, resume
from fleet.handoff import Attempt, Collected, Readiness, UnitRecord
from fleet.harness.contract import Market, Reason, RunSpec, UnitState
from fleet.terms import HostState
from tests.unit.collecting import UNIT, spec_of
from tests.unit.fakes import status

HOME = Collected(folder="collect/h01/x", complete=True)
LOCK = {"fleet": "0123456789abcdef", "wheel:torch": "2.13.0", "driver": "550.1"}


def spec(**changes: Any) -> RunSpec:
    return replace(spec_of(UNIT), lock=LOCK, **changes)


def record(state: UnitState = UnitState.DONE, **more: Any) -> UnitRecord:
    return UnitRecord(unit=UNIT, host="h01", state=state, **{"status": status(UNIT, state), **more})


def locked(**changes: str) -> RunSpec:
    return replace(spec(), lock={**LOCK, **changes})


def test_what_is_done_and_verified_under_the_same_lock_is_kept_as_it_is() -> None:
    moved = spec(work_dir="/elsewhere", start={"target_qps": 3.0}, labels=("new",), attempt=1)
    found = resume.decide(spec(), moved, record(), HOME)
    assert found.keep
    assert (found.spec.work_dir, found.spec.start, found.spec.labels) == ("/elsewhere", {}, spec().labels)
    assert found.record == record()
    assert resume.lines([found]) == []


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (locked(driver="560.2"), "driver 550.1 → 560.2"),
        (locked(**{"wheel:torch": "2.14.0"}), "torch 2.13.0 → 2.14.0"),
        (locked(fleet="fedcba9876543210"), "fleet 0123456789ab → fedcba987654"),
        (locked(cuda="13.0"), "cuda none → 13.0"),
        (spec(quick=not spec().quick), f"quick {spec().quick} → {not spec().quick}"),
        (spec(user_conf="*.Offline.target_qps = 1\n" * 9), "user_conf changed"),
    ],
)
def test_a_changed_lock_or_campaign_is_said_and_measured_again(new: RunSpec, why: str) -> None:
    assert handoff.why_again(spec(), new, record(), HOME) == why
    found = resume.decide(spec(), new, record(), HOME)
    assert not found.keep
    assert resume.lines([found]) == [f"again: {UNIT}: {why}"]
    assert found.spec == replace(new, attempt=2)
    (before,) = found.record.attempts
    assert (before.state, before.reason, before.cause) == (UnitState.DONE, Reason.LOCK_CHANGED, why)
    assert found.record.state is UnitState.PENDING


def test_weights_count_from_when_they_are_known() -> None:
    before, after = locked(weights="a" * 64), locked(weights="b" * 64)
    assert handoff.same_run(spec(), after)
    # The lock of what is home stays the plan's.
    assert resume.decide(spec(), after, record(), HOME).spec.lock == LOCK
    assert handoff.difference(before, after) == f"weights {'a' * 12} → {'b' * 12}"


@pytest.mark.parametrize(
    "state", [UnitState.PENDING, UnitState.QUEUED, UnitState.RUNNING, UnitState.UNREACHABLE, UnitState.LEFT_OUT]
)
def test_a_unit_that_may_be_on_its_host_is_asked_for_by_the_very_same_spec(state: UnitState) -> None:
    old = spec(attempt=3, start={"target_qps": 1.0})
    attempts = tuple(
        Attempt(state=UnitState.INTERRUPTED, reason=Reason.INTERRUPTED, cause="x", ended_at=1.0) for _ in range(2)
    )
    found = resume.decide(old, spec(), record(state, attempts=attempts), None)
    assert (found.spec, found.keep, found.again) == (old, False, "")
    assert found.record.attempts == attempts


def test_done_and_not_home_is_fetched_first() -> None:
    for home in (None, replace(HOME, complete=False, cause="the transfer broke off")):
        found = resume.decide(spec(), spec(), record(), home)
        assert (found.spec, found.keep, found.again) == (spec(), False, "")
    said = handoff.why_again(spec(), spec(), record(), replace(HOME, complete=False, cause="the transfer broke off"))
    assert said == "its files are not home: the transfer broke off"


FIRST = Attempt(state=UnitState.DONE, reason=Reason.INVALID_RESULT, cause="INVALID: too short", ended_at=1.0)


def test_files_of_an_earlier_start_are_not_those_of_this_one() -> None:
    again = record(attempts=(FIRST,))
    assert handoff.missing([spec()], {UNIT: again}, {UNIT: replace(HOME, attempt=1)}) == [UNIT]
    found = resume.decide(spec(), spec(), again, replace(HOME, attempt=1))
    # The host is asked for the very start that it may have made.
    assert (found.keep, found.again, found.spec.attempt) == (False, "", 2)
    assert handoff.why_again(spec(), spec(), again, replace(HOME, attempt=1)) == (
        "its files are not home: those of start 1 are"
    )


@pytest.mark.parametrize("attempt", [0, 2])
def test_files_of_this_start_are_home_and_so_are_those_of_an_older_fleet_that_did_not_say(attempt: int) -> None:
    again, home = record(attempts=(FIRST,)), replace(HOME, attempt=attempt)
    assert handoff.missing([spec()], {UNIT: again}, {UNIT: home}) == []
    assert resume.decide(spec(), spec(), again, home).keep


def test_done_and_corrupt_runs_again() -> None:
    home = replace(HOME, complete=False, cause="its sha256 is not the manifest's", reason=Reason.CORRUPT_FILES)
    found = resume.decide(spec(), spec(), record(), home)
    assert found.spec.attempt == 2
    assert found.again == "its files are not home: its sha256 is not the manifest's"


def test_an_end_without_a_number_runs_again_and_is_remembered() -> None:
    ended = record(UnitState.FAILED, cause="killed by SIGKILL", reason=Reason.OUT_OF_MEMORY)
    found = resume.decide(spec(), spec(), ended, None)
    assert resume.lines([found]) == [f"again: {UNIT}: failed: killed by SIGKILL"]
    assert found.spec.attempt == 2
    assert [(item.state, item.reason) for item in found.record.attempts] == [(UnitState.FAILED, Reason.OUT_OF_MEMORY)]
    never = resume.decide(spec(), spec(), replace(ended, status=None), None)
    assert (never.spec.attempt, never.record.attempts, never.again) == (1, (), "")


INVALID = Attempt(state=UnitState.DONE, reason=Reason.INVALID_RESULT, cause="INVALID", ended_at=1.0)
OUT = Attempt(state=UnitState.FAILED, reason=Reason.OTHER, cause="out", ended_at=2.0)


def test_python_counts_from_when_it_is_known() -> None:
    """A session of an older fleet does not say it."""
    before, after = locked(python="3.11.9"), locked(python="3.12.1")
    assert handoff.same_run(spec(), after)
    assert handoff.difference(before, after) == "python 3.11.9 → 3.12.1"


def test_what_was_measured_stands_whoever_dies_while_it_is_tried_again() -> None:
    best = record(reason=Reason.INVALID_RESULT)
    tried = record(UnitState.RUNNING, attempts=(INVALID,), best=best)
    assert resume.decide(spec(), spec(), tried, HOME).record.best == best
    assert resume.decide(spec(), locked(driver="560.2"), tried, HOME).record.best is None
    failed = replace(tried, state=UnitState.FAILED, reason=Reason.OTHER, cause="out")
    assert resume.decide(spec(), spec(), failed, HOME).record.best == best
    for found in (resume.not_started(failed, None), resume.left_out(failed, "--limit h02")):
        assert replace(found, later=()) == best
        assert [replace(item, ended_at=2.0) for item in found.later] == [OUT]


def test_later_starts_count_when_it_is_started_once_more() -> None:
    stands = record(reason=Reason.INVALID_RESULT, later=(OUT,))
    assert resume.decide(spec(), spec(), stands, HOME).keep
    # On its host lies what the later start left.
    found = resume.decide(spec(), spec(), stands, None)
    assert (found.spec.attempt, found.again) == (3, "its files are not home")
    assert [item.state for item in found.record.attempts] == [UnitState.DONE, UnitState.FAILED]
    assert found.record.later == ()


def test_units_with_one_cause_are_one_line() -> None:
    failed = record(UnitState.FAILED, cause="no room")
    units = [replace(spec(), unit=f"h01.{number}") for number in range(5)]
    found = [resume.decide(unit, unit, failed, None) for unit in units]
    assert resume.lines(found) == ["again: h01.0, h01.1, h01.2 and 2 more: failed: no room"]


@pytest.mark.parametrize(
    ("state", "unit", "reason"),
    [
        (HostState.UNREACHABLE, UnitState.UNREACHABLE, Reason.UNREACHABLE),
        (HostState.CHANGED_KEY, UnitState.NOT_READY, Reason.HOST_KEY),
        (HostState.FAILED, UnitState.NOT_READY, Reason.OTHER),
        (HostState.LEFT_OUT, UnitState.NOT_READY, Reason.OTHER),
    ],
)
def test_a_host_that_cannot_be_used_costs_no_unit_that_ended(state: HostState, unit: UnitState, reason: Reason) -> None:
    ready = Readiness(host="h01", state=state, cause="why")
    for ended in (record(), record(UnitState.FAILED, cause="x")):
        assert resume.not_started(ended, ready) == ended
    found = resume.not_started(record(UnitState.RUNNING), ready)
    assert (found.state, found.reason, found.status) == (unit, reason, record(UnitState.RUNNING).status)
    assert "why" in found.cause


def test_what_is_left_out_says_so_unless_it_had_ended() -> None:
    assert resume.left_out(record(), "--limit h02") == record()
    assert resume.left_out(record(UnitState.UNREACHABLE), "--limit h02").state is UnitState.UNREACHABLE
    found = resume.left_out(record(UnitState.RUNNING), "--limit h02")
    assert (found.state, found.cause) == (UnitState.LEFT_OUT, "--limit h02; last seen running")
    assert resume.left_out(record(UnitState.PENDING), "--limit h02").cause == "--limit h02"


OLD, NEW = "i-0old", "i-0new"
BEGUN = {"started_at": 1.0}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (UnitState.INTERRUPTED, f"instance {OLD} is gone: interrupted: spot interruption notice"),
        (UnitState.RUNNING, f"instance {OLD} is gone, where it was last seen running"),
        (UnitState.UNREACHABLE, f"instance {OLD} is gone: unreachable: spot interruption notice"),
        (UnitState.DONE, f"instance {OLD} is gone: its files are not home"),
    ],
)
def test_what_ran_on_an_instance_that_is_gone_begins_anew_on_its_replacement(state: UnitState, said: str) -> None:
    earlier = Attempt(state=UnitState.INTERRUPTED, reason=Reason.INTERRUPTED, cause="earlier", ended_at=1.0)
    reason = Reason.NONE if state in {UnitState.RUNNING, UnitState.DONE} else Reason.INTERRUPTED
    cause = "spot interruption notice" if reason else ""
    ran = record(state, cause=cause, reason=reason, attempts=(earlier,), status=status(UNIT, state, **BEGUN))
    new = spec(instance=NEW, market=Market.ON_DEMAND)
    found = resume.decide(spec(instance=OLD, market=Market.SPOT), new, ran, None)
    assert not found.keep
    assert found.spec == replace(new, attempt=3)
    assert (found.record.state, found.record.status, found.record.reason) == (UnitState.PENDING, None, Reason.NONE)
    first, last = found.record.attempts
    assert first == earlier
    assert (last.state, last.reason, last.cause) == (state, reason, said)
    assert resume.lines([found]) == [f"again: {UNIT}: {said}"]


@pytest.mark.parametrize("state", [UnitState.PENDING, UnitState.QUEUED, UnitState.INTERRUPTED, UnitState.UNREACHABLE])
def test_what_never_began_on_an_instance_that_is_gone_is_no_attempt(state: UnitState) -> None:
    waited = record(state, reason=Reason.INTERRUPTED, cause="spot interruption notice")
    new = spec(instance=NEW)
    found = resume.decide(spec(instance=OLD), new, waited, None)
    assert (found.spec, found.record.attempts, found.again) == (new, (), "")
    assert (found.record.state, found.record.status) == (UnitState.PENDING, None)


def test_what_is_home_is_kept_whatever_became_of_its_instance() -> None:
    found = resume.decide(spec(instance=OLD, market=Market.SPOT), spec(instance=NEW), record(), HOME)
    assert found.keep
    assert found.spec.instance == OLD


def test_a_unit_that_runs_goes_on_on_its_own_instance() -> None:
    running = record(UnitState.RUNNING, status=status(UNIT, UnitState.RUNNING, **BEGUN))
    found = resume.decide(spec(instance=OLD), spec(instance=OLD), running, None)
    assert (found.spec, found.again) == (spec(instance=OLD), "")
    assert found.record.attempts == ()


def test_a_number_of_one_instance_type_is_none_of_another() -> None:
    old = replace(locked(instance_type="g5.xlarge"), instance="i-1")
    new = replace(locked(instance_type="g6.xlarge"), instance="i-2")
    measured = record(status=status(UNIT, UnitState.DONE, started_at=1.0))
    found = resume.decide(old, new, measured, HOME)
    assert (found.keep, found.again) == (False, "instance_type g5.xlarge → g6.xlarge")
    assert found.spec == replace(new, attempt=2)


def test_a_number_of_another_instance_of_the_same_type_is_kept_as_that_ones() -> None:
    old = replace(locked(instance_type="g5.xlarge"), instance="i-1")
    new = replace(old, instance="i-2")
    assert resume.decide(old, new, record(), HOME).keep
    assert resume.decide(old, new, record(), HOME).spec.instance == "i-1"
    goes_on = resume.decide(old, new, record(UnitState.QUEUED), None)
    assert (goes_on.keep, goes_on.again, goes_on.spec.instance) == (False, "", "i-2")
