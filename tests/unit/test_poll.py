"""The poll loop: silent hosts hold nobody up and may come back, units are started again by cause, and all of them end."""

import queue
import threading
import time
from typing import Any

import pytest

from fleet import poll
from fleet.campaign import RetryPolicy
from fleet.handoff import HostRecord, UnitRecord
from fleet.harness.contract import Reason, SupervisorBeat, UnitState
from fleet.inventory import reach
from fleet.inventory.reach import Unreachable
from fleet.terms import HostState
from tests.unit.fakes import FakeConnection, RecordingWatch, answer, status
from tests.unit.polling import Asked, host_of

GONE = Unreachable(HostState.UNREACHABLE, "connection lost (reset)")
RUNNING = status("h01.u", UnitState.RUNNING, boot_id="boot-1", beat_uptime=999.0)


pytestmark = pytest.mark.usefixtures("quick_polls")


@pytest.fixture
def dead_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poll, "CONFIRM_S", 0.0)


def test_every_change_is_noted_once_and_the_connection_is_kept(asked: Asked) -> None:
    first = answer(status("h01.u", UnitState.QUEUED))
    connection = FakeConnection([first, answer(RUNNING), answer(RUNNING), answer(status("h01.u"))])
    noted: list[UnitRecord] = []
    watch = RecordingWatch()
    assert asked(h01=connection, noted=noted, watch=watch)["h01.u"].status == status("h01.u")
    assert [record.state for record in noted] == [UnitState.QUEUED, UnitState.RUNNING, UnitState.DONE]
    assert connection.closed == 1
    assert "cd '/w o/runs/t1' && " in connection.commands[0]
    assert watch.ended == ["h01"]
    assert watch.lines[-1] == ("h01", "1 of 1 units done")


def test_a_host_that_falls_silent_is_lost_and_holds_nobody_up(asked: Asked) -> None:
    found = asked(h01=FakeConnection([answer(RUNNING), GONE]), h02=FakeConnection([answer(status("h02.u"))]))
    assert found["h02.u"].state is UnitState.DONE
    assert found["h01.u"].state is UnitState.UNREACHABLE
    assert "connection lost (reset)" in found["h01.u"].cause
    assert "it may still run there" in found["h01.u"].cause
    assert found["h01.u"].status == RUNNING


def test_a_host_that_comes_back_in_time_is_not_lost(asked: Asked) -> None:
    connection, watch = FakeConnection([GONE, GONE, GONE, answer(status("h01.u"))]), RecordingWatch()
    assert asked(h01=connection, watch=watch)["h01.u"].state is UnitState.DONE
    assert ("h01", "no answer: connection lost (reset)") in watch.lines
    assert connection.closed == 4  # a connection that failed is not asked again


def test_garbage_counts_as_silence(asked: Asked) -> None:
    found = asked(h01=FakeConnection(["bash: date: not found\n"]))
    assert found["h01.u"].state is UnitState.UNREACHABLE
    assert "its answer cannot be read" in found["h01.u"].cause


def test_a_question_that_never_returns_counts_as_silence(asked: Asked) -> None:
    class Stuck(FakeConnection):
        def run(self, command: str, **more: Any) -> reach.Answer:
            time.sleep(4.0)
            return super().run(command, **more)

    started = time.monotonic()
    found = asked(h01=Stuck([answer(status("h01.u"))]))
    assert time.monotonic() - started < 3.0
    assert "the last question is still open" in found["h01.u"].cause


def test_a_folder_that_is_not_there_is_said(asked: Asked) -> None:
    found = asked(h01=FakeConnection([answer(RUNNING), answer()]))
    assert (found["h01.u"].state, found["h01.u"].cause) == (UnitState.FAILED, "its folder is not on the host")


def test_a_units_end_stands_whatever_is_said_later(asked: Asked) -> None:
    first = answer(status("h01.a"), status("h01.b", UnitState.RUNNING, boot_id="boot-1", beat_uptime=999.0))
    found = asked(h01=FakeConnection([first, answer(status("h01.b"))]), units=("a", "b"))
    assert {record.state for record in found.values()} == {UnitState.DONE}


def beat(at: float, boot: str = "boot-1") -> SupervisorBeat:
    return SupervisorBeat(pid=7, boot_id=boot, heartbeat_at=0.0, beat_uptime=at)


@pytest.mark.parametrize(
    ("now", "boot", "expected"),
    [
        (1000, "boot-2", (UnitState.INTERRUPTED, "the host was rebooted")),
        (1100, "boot-2", (UnitState.INTERRUPTED, "the host was rebooted")),
        (1100, "boot-1", (UnitState.FAILED, "its supervisor is silent, or its disk is full")),
    ],
)
@pytest.mark.parametrize("last", [None, 500.0, 990.0])
@pytest.mark.usefixtures("dead_at_once")
def test_queued_units_end_when_nobody_will_ever_run_them(
    asked: Asked, last: float | None, now: int, boot: str, expected: tuple[UnitState, str]
) -> None:
    ended = status("h01.a", UnitState.FAILED, cause="killed by SIGKILL")
    queued = status("h01.b", UnitState.QUEUED, beat_uptime=990.0, boot_id="boot-1")
    said = answer(ended, queued, uptime=now, boot=boot, beat=None if last is None else beat(last))
    found = asked(h01=FakeConnection([said]), units=("a", "b"))
    assert (found["h01.b"].state, found["h01.b"].cause) == expected
    assert found["h01.a"].cause == "killed by SIGKILL"


def test_one_stale_answer_alone_is_no_verdict(asked: Asked) -> None:
    stale, fresh = answer(RUNNING, uptime=1100), answer(RUNNING)
    noted: list[UnitRecord] = []
    asked(h01=FakeConnection([fresh, stale, fresh, stale, stale, answer(status("h01.u"))]), noted=noted)
    assert [record.state for record in noted] == [UnitState.RUNNING, UnitState.DONE]


def test_a_supervisor_that_looks_dead_long_enough_is(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poll, "CONFIRM_S", 0.05)
    connection = FakeConnection([answer(RUNNING), answer(RUNNING, uptime=1100)])
    assert asked(h01=connection)["h01.u"].state is UnitState.FAILED
    assert len(connection.commands) >= 3


def test_each_ended_unit_is_brought_home_once_over_the_open_connection(asked: Asked) -> None:
    brought: list[tuple[object, str, str]] = []
    connection = FakeConnection([
        answer(status("h01.a"), status("h01.b", UnitState.QUEUED)),
        answer(status("h01.a"), status("h01.b", UnitState.RUNNING)),
        answer(status("h01.a"), status("h01.b", UnitState.FAILED, cause="x")),
    ])  # fmt: skip

    def bring(at: object, work_dir: str, record: UnitRecord) -> None:
        assert record.state.ended
        brought.append((at, work_dir, record.unit))

    asked(units=("a", "b"), bring=bring, h01=connection)
    assert brought == [(connection, "/w o", "h01.a"), (connection, "/w o", "h01.b")]
    assert connection.closed == 1


def test_a_host_whose_files_take_long_holds_nobody_up(asked: Asked) -> None:
    gate, watch = threading.Event(), RecordingWatch()

    def bring(_: object, __: str, record: UnitRecord) -> None:
        if record.host == "h01":
            assert gate.wait(10)

    class Opens(RecordingWatch):
        def host(self, host: str, text: str, *, fraction: float | None = None, ended: bool = False) -> None:
            super().host(host, text, fraction=fraction, ended=ended)
            if host == "h02" and ended:
                gate.set()

    watch = Opens()
    asked(
        bring=bring,
        watch=watch,
        h01=FakeConnection([answer(status("h01.u"))]),
        h02=FakeConnection([answer(status("h02.u"))]),
    )
    assert watch.ended == ["h02", "h01"]


def test_a_host_is_asked_on_while_its_files_are_on_their_way(asked: Asked) -> None:
    noted: list[UnitRecord] = []
    running: set[str] = set()

    def bring(_: object, __: str, record: UnitRecord) -> None:
        running.add(record.unit)
        assert len(running) == 1, "a host's units come one after another"
        end = time.monotonic() + 10
        # The first unit's files take until the controller has seen the second unit end.
        while not any(item.unit == "h01.b" and item.state is UnitState.DONE for item in noted):
            assert time.monotonic() < end, "the host is not asked any more"
            time.sleep(0.01)
        running.remove(record.unit)

    asked(
        units=("a", "b"),
        bring=bring,
        noted=noted,
        h01=FakeConnection([
            answer(status("h01.a"), status("h01.b", UnitState.QUEUED)),
            answer(status("h01.a"), status("h01.b", UnitState.RUNNING)),
            answer(status("h01.a"), status("h01.b")),
        ]),
    )  # fmt: skip
    assert running == set()


def test_units_that_ended_while_the_host_was_away_are_brought_when_it_is_back(asked: Asked) -> None:
    brought: list[str] = []
    asked(
        units=("a", "b"),
        bring=lambda _, __, record: brought.append(record.unit),
        h01=FakeConnection([
            answer(status("h01.a", UnitState.RUNNING), status("h01.b", UnitState.QUEUED)),
            GONE,
            answer(status("h01.a"), status("h01.b", UnitState.FAILED, cause="x")),
        ]),
    )  # fmt: skip
    assert brought == ["h01.a", "h01.b"]


def test_what_no_host_says_is_not_sent_for(asked: Asked) -> None:
    brought: list[str] = []

    def bring(_: object, __: str, record: UnitRecord) -> None:
        brought.append(record.unit)

    found = asked(
        units=("a", "b"),
        bring=bring,
        h01=FakeConnection([answer(status("h01.a"))]),
        h02=FakeConnection([answer(status("h02.a", UnitState.RUNNING), status("h02.b", UnitState.QUEUED)), GONE]),
    )
    # h01 has no folder of its b any more, h02 fell silent for good.
    assert found["h01.b"].cause == "its folder is not on the host"
    assert found["h02.a"].state is UnitState.UNREACHABLE
    assert brought == ["h01.a"]


def test_how_long_is_left_is_said_in_words(asked: Asked) -> None:
    running = status(
        "h01.a", UnitState.RUNNING, boot_id="boot-1", heartbeat_at=999.0, started_at=399.0, expected_s=1800.0
    )
    queued = status("h01.b", UnitState.QUEUED, boot_id="boot-1", heartbeat_at=999.0, expected_s=6000.0)
    watch = RecordingWatch()
    ends = answer(status("h01.a"), status("h01.b"))
    asked(units=("a", "b"), watch=watch, h01=FakeConnection([answer(running, queued), ends]))
    assert any(text.endswith("about 2.0 h left") for _, text in watch.lines)


def test_a_unit_that_is_late_is_said_to_be(asked: Asked) -> None:
    def late(**more: float) -> str:
        running = status("h01.a", UnitState.RUNNING, boot_id="boot-1", heartbeat_at=999.0, started_at=399.0, **more)
        queued = status("h01.b", UnitState.QUEUED, boot_id="boot-1", heartbeat_at=999.0, expected_s=6000.0)
        return answer(running, queued)

    watch = RecordingWatch()
    ends = answer(status("h01.a"), status("h01.b"))
    asked(units=("a", "b"), watch=watch, h01=FakeConnection([late(expected_s=590.0), ends]))
    assert any(text.endswith("600 s, longer than expected, about 1.7 h for the others") for _, text in watch.lines)
    watch = RecordingWatch()
    # Of a unit that nothing was expected of nothing is said.
    asked(units=("a", "b"), watch=watch, h01=FakeConnection([late(), ends]))
    assert not any("longer than expected" in text for _, text in watch.lines)


def test_a_unit_that_gets_onto_battery_is_said_to_once_while_it_runs(asked: Asked) -> None:
    def seen(**conditions: float) -> str:
        return answer(status("h01.u", UnitState.RUNNING, boot_id="boot-1", beat_uptime=999.0, conditions=conditions))

    watch = RecordingWatch()
    connection = FakeConnection([seen(battery=0.0), seen(battery=1.0), seen(battery=2.0), answer(status("h01.u"))])
    asked(watch=watch, h01=connection)
    assert watch.notes == ["h01: u: on battery"]


class Frozen(FakeConnection):
    """Takes its units, answers once, and then says nothing until `thaw` is set, or the connection is closed."""

    def __init__(self, answers: list[str | Unreachable]) -> None:
        super().__init__(answers)
        self.thaw, self.silent = threading.Event(), False

    def run(self, command: str, **more: Any) -> reach.Answer:
        if self.silent and not self.thaw.wait(20):
            raise GONE
        answered = super().run(command, **more)
        self.silent = self.silent or bool(self.commands)
        return answered


def test_any_number_of_frozen_hosts_holds_no_other_up(asked: Asked) -> None:
    frozen = {f"f{number:02}": Frozen([answer(status(f"f{number:02}.u", UnitState.RUNNING))]) for number in range(70)}
    watch = RecordingWatch()
    good = FakeConnection([answer(status("good.u", UnitState.RUNNING)), answer(status("good.u"))])
    try:
        # Long enough for a machine on which others compute to ask the good one twice.
        found = asked(**frozen, good=good, watch=watch, lost_after_s=3.0)
    finally:
        for connection in frozen.values():
            connection.thaw.set()
    assert found["good.u"].state is UnitState.DONE
    assert {record.state for record in found.values()} == {UnitState.DONE, UnitState.UNREACHABLE}
    assert watch.ended[0] == "good"


def test_a_lost_host_is_asked_on_while_others_work_and_its_units_come_back(asked: Asked) -> None:
    frozen = Frozen([answer(status("h01.u", UnitState.RUNNING)), answer(status("h01.u"))])
    hosts: list[HostRecord] = []
    noted: list[UnitRecord] = []

    class Works(FakeConnection):
        """Works until the other host has come back."""

        def run(self, command: str, **more: Any) -> reach.Answer:
            states = [item.state for item in noted if item.host == "h01"]
            if UnitState.UNREACHABLE in states:
                frozen.thaw.set()
            over = states[-1:] == [UnitState.DONE]
            self.answers = [answer(status("h02.u", UnitState.DONE if over else UnitState.RUNNING))]
            return super().run(command, **more)

    retry = {Reason.UNREACHABLE: RetryPolicy(times=1, after_s=0)}
    found = asked(h01=frozen, h02=Works([""]), noted=noted, hosts=hosts, retry=retry)
    assert found["h01.u"].state is UnitState.DONE
    assert [item.state for item in noted if item.host == "h01"] == [
        UnitState.RUNNING, UnitState.UNREACHABLE, UnitState.DONE,
    ]  # fmt: skip
    first, lost, back = [item for item in hosts if item.host == "h01"]
    assert (first.state, lost.state, back.state) == (HostState.READY, HostState.UNREACHABLE, HostState.READY)
    assert "no answer for" in lost.cause
    assert lost.last_answer_at is not None
    assert first.since <= lost.since <= back.since
    assert lost.last_answer_at < lost.since


def test_a_lost_host_that_is_alone_gets_its_policys_time(asked: Asked) -> None:
    connection = FakeConnection([answer(RUNNING), *[GONE] * 5, answer(status("h01.u"))])
    patient = RetryPolicy(times=20, after_s=0.2)

    class Slow(FakeConnection):
        def run(self, command: str, **more: Any) -> reach.Answer:
            time.sleep(0.1)
            return super().run(command, **more)

    slow = Slow(connection.answers)
    assert asked(h01=slow, retry={Reason.UNREACHABLE: patient})["h01.u"].state is UnitState.DONE


def test_units_that_a_lost_host_never_took_are_started_when_it_is_back(asked: Asked) -> None:
    class Away(FakeConnection):
        tries = 0

        def run(self, command: str, **more: Any) -> reach.Answer:
            self.tries += 1
            if self.tries < 8:
                time.sleep(0.1)
                raise GONE
            return super().run(command, **more)

    connection = Away([answer(status("h01.u"))])
    noted: list[UnitRecord] = []
    patient = RetryPolicy(times=20, after_s=0.2)
    asked(h01=connection, noted=noted, retry={Reason.UNREACHABLE: patient})
    assert len(connection.started) == 1
    states = [item.state for item in noted]
    assert (states[0], states[-1]) == (UnitState.UNREACHABLE, UnitState.DONE)


@pytest.mark.parametrize("state", [HostState.CHANGED_KEY, HostState.UNKNOWN_KEY])
def test_a_host_whose_key_changed_is_not_asked_again(asked: Asked, state: HostState) -> None:
    changed = Unreachable(state, "its host key changed", "ssh-keygen -R h01")
    connection = FakeConnection([answer(RUNNING), changed])
    hosts: list[HostRecord] = []
    other = FakeConnection([*[answer(status("h02.u", UnitState.RUNNING))] * 30, answer(status("h02.u"))])
    found = asked(h01=connection, h02=other, hosts=hosts, retry=dict.fromkeys(Reason, RetryPolicy(times=1, after_s=0)))
    assert (found["h01.u"].state, found["h01.u"].reason) == (UnitState.UNREACHABLE, Reason.HOST_KEY)
    assert found["h01.u"].cause == "its host key changed: ssh-keygen -R h01"
    assert len(connection.commands) == 2
    last = [item for item in hosts if item.host == "h01"][-1]
    assert (last.state, last.hint) == (state, "ssh-keygen -R h01")
    assert found["h02.u"].state is UnitState.DONE


def test_a_silent_hosts_record_says_so_long_before_it_is_lost(asked: Asked) -> None:
    hosts: list[HostRecord] = []
    asked(h01=FakeConnection([answer(RUNNING), GONE]), hosts=hosts)
    assert [(item.state, item.cause) for item in hosts[:2]] == [
        (HostState.READY, ""), (HostState.READY, "no answer: connection lost (reset)"),
    ]  # fmt: skip
    assert hosts[-1].state is HostState.UNREACHABLE


def test_hosts_that_come_later_find_the_others_at_work(asked: Asked) -> None:
    arrivals = queue.SimpleQueue[Any]()
    arrivals.put(host_of("h01", "u"))
    late = FakeConnection([answer(status("h02.u"))])

    class First(FakeConnection):
        """Works until the second host has ended."""

        def run(self, command: str, **more: Any) -> reach.Answer:
            if len(self.commands) == 3:
                arrivals.put(host_of("h02", "u"))
                arrivals.put(None)
            self.answers = [answer(status("h01.u", UnitState.DONE if late.closed else UnitState.RUNNING))]
            return super().run(command, **more)

    found = asked(arrivals=arrivals, h01=First([""]), h02=late)
    assert {record.state for record in found.values()} == {UnitState.DONE}


def test_ctrl_c_waits_for_no_host(asked: Asked) -> None:
    frozen, started = Frozen([answer(status("h01.u", UnitState.RUNNING))]), time.monotonic()

    def interrupted() -> set[str]:
        if frozen.silent and time.monotonic() - started > 0.2:
            raise KeyboardInterrupt
        return set()

    with pytest.raises(KeyboardInterrupt):
        asked(h01=frozen, cancelled=interrupted)
    assert time.monotonic() - started < 5
    frozen.thaw.set()


@pytest.mark.parametrize(
    ("hosts", "spent", "seconds"), [(1, 1, 1), (10, 1, 1), (48, 1, 4.8), (10, 90, 5), (48, 90, 5), (100, 90, 10)]
)
def test_many_hosts_and_settled_ones_are_asked_less_often(
    monkeypatch: pytest.MonkeyPatch, hosts: int, spent: float, seconds: float
) -> None:
    monkeypatch.undo()
    items = [host_of(f"h{number}", "u") for number in range(hosts)]
    runs = status("u", UnitState.RUNNING, started_at=0.0, heartbeat_at=float(spent))
    known = {
        unit: UnitRecord(unit=unit, host=item.host.name, state=UnitState.RUNNING, status=runs)
        for item in items
        for unit in item.specs
    }
    loop = poll.Poll(
        known=known, note=print, note_host=print, bring=lambda *_: None, watch=RecordingWatch(), token="t",
        lost_after_s=25, policy=lambda _: RetryPolicy(times=0, after_s=0), cancelled=set,
    )  # fmt: skip
    for item in items:
        loop._accept(item)
    assert loop._interval(items[0]) == pytest.approx(seconds)
    # The cost of polling: at 3 ms a question, no more than 3 % of a core.
    assert hosts / seconds <= poll.HOSTS_A_SECOND
