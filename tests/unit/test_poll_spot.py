"""Hosts that EC2 takes back: their notice is heard, they get nothing more, and nobody waits for them."""

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fleet.campaign import RetryPolicy
from fleet.harness.contract import Reason, SupervisorBeat, UnitState
from fleet.inventory.reach import Unreachable
from fleet.terms import HostState
from tests.unit.fakes import FakeConnection, RecordingWatch, answer, status
from tests.unit.polling import Asked

if TYPE_CHECKING:
    from fleet.handoff import HostRecord

RUNNING = status("h01.u", UnitState.RUNNING, boot_id="boot-1", beat_uptime=999.0)

pytestmark = pytest.mark.usefixtures("quick_polls")


def beat(at: float, boot: str = "boot-1") -> SupervisorBeat:
    return SupervisorBeat(pid=7, boot_id=boot, heartbeat_at=0.0, beat_uptime=at)


NOTICE = "spot interruption notice, action terminate at 2026-11-25T05:02:00Z"
LEAVES = replace(beat(999.0), leaving=NOTICE)
AGAIN = {reason: RetryPolicy(times=2, after_s=0) for reason in Reason if reason is not Reason.NONE}
TAKEN = {"reason": Reason.INTERRUPTED, "cause": NOTICE}


def test_a_host_that_says_it_goes_away_gets_nothing_more(asked: Asked) -> None:
    running = [status("h01.a", UnitState.RUNNING, beat_uptime=999.0), status("h01.b", UnitState.QUEUED)]
    over = [status(f"h01.{name}", UnitState.INTERRUPTED, **TAKEN) for name in ("a", "b")]
    connection = FakeConnection([answer(*running, beat=beat(999.0)), answer(*over, beat=LEAVES)])
    brought: list[str] = []
    hosts: list[HostRecord] = []
    watch = RecordingWatch()
    found = asked(
        h01=connection, units=("a", "b"), retry=AGAIN, hosts=hosts, watch=watch,
        bring=lambda _, __, record: brought.append(record.unit),
    )  # fmt: skip
    for record in found.values():
        assert (record.state, record.reason, record.cause) == (UnitState.INTERRUPTED, Reason.INTERRUPTED, NOTICE)
        assert record.attempts == ()
    assert sorted(brought) == ["h01.a", "h01.b"]
    # Started once, and never again.
    assert [len(queue["specs"]) for queue in connection.started] == [2]
    assert (hosts[-1].state, hosts[-1].leaving) == (HostState.READY, NOTICE)
    assert watch.notes == [f"h01: {NOTICE}; nothing more is started there"]


def test_a_unit_that_was_to_start_again_there_does_not(asked: Asked) -> None:
    failed = [
        status("h01.a", UnitState.FAILED, reason=Reason.OTHER),
        status("h01.b", UnitState.RUNNING, beat_uptime=999.0),
    ]
    later = [status("h01.b", UnitState.INTERRUPTED, **TAKEN)]
    connection = FakeConnection([answer(*failed, beat=beat(999.0)), answer(*later, beat=LEAVES)])
    retry = {Reason.OTHER: RetryPolicy(times=1, after_s=60)}
    found = asked(h01=connection, units=("a", "b"), retry=retry)
    assert len(connection.started) == 1
    assert (found["h01.a"].state, found["h01.a"].cause) == (UnitState.INTERRUPTED, NOTICE)
    (attempt,) = found["h01.a"].attempts
    assert attempt.state is UnitState.FAILED


def test_a_host_that_goes_as_it_had_said_is_waited_for_no_more(asked: Asked) -> None:
    running = status("h01.u", UnitState.RUNNING, beat_uptime=999.0)
    connection = FakeConnection([answer(running, beat=LEAVES), Unreachable(HostState.UNREACHABLE, "no route")])
    hosts: list[HostRecord] = []
    # For so long nobody waits.
    found = asked(h01=connection, retry={Reason.UNREACHABLE: RetryPolicy(times=20, after_s=600)}, hosts=hosts)
    assert (found["h01.u"].state, found["h01.u"].reason) == (UnitState.INTERRUPTED, Reason.INTERRUPTED)
    assert found["h01.u"].cause == NOTICE
    assert (hosts[-1].state, hosts[-1].leaving) == (HostState.UNREACHABLE, NOTICE)


def test_the_notice_of_an_earlier_boot_is_none(asked: Asked) -> None:
    connection = FakeConnection([answer(RUNNING, beat=replace(LEAVES, boot_id="boot-0")), answer(status("h01.u"))])
    hosts: list[HostRecord] = []
    assert asked(h01=connection, hosts=hosts)["h01.u"].state is UnitState.DONE
    assert {record.leaving for record in hosts} == {""}


def test_the_words_of_a_notice_are_held_to_a_line(asked: Asked) -> None:
    connection = FakeConnection([answer(status("h01.u"), beat=replace(beat(1.0), leaving="\x1b[31m\n" + "x" * 9999))])
    hosts: list[HostRecord] = []
    asked(h01=connection, hosts=hosts)
    assert hosts[-1].leaving.isprintable()
    assert len(hosts[-1].leaving) <= 500
