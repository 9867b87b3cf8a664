"""The poll loop: a host's answer is never trusted, its silence has an end, and a unit nobody runs is not waited for."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet import poll
from fleet.handoff import UnitRecord
from fleet.harness.contract import SupervisorBeat, UnitState, UnitStatus
from fleet.inventory import reach
from fleet.inventory.hosts import Host
from fleet.inventory.reach import Unreachable
from fleet.poll import Polled, Word
from fleet.terms import HostKind, HostState
from tests.unit.fakes import FakeConnection, RecordingWatch, answer, status

GONE = Unreachable(HostState.UNREACHABLE, "connection lost (reset)")
RUNNING = status("h01.u", UnitState.RUNNING, boot_id="boot-1", heartbeat_at=999.0)


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its module alone: a connection of a test sleeps as long as it says.
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: time.sleep(seconds / 100))
    monkeypatch.setattr(poll, "time", clock)


@pytest.fixture
def dead_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poll, "CONFIRM_S", 0.0)


Asked = Callable[..., dict[str, UnitRecord]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Polls the hosts behind the connections given, each with the unit HOST.u unless `units` says otherwise."""

    def ask(
        *, units: tuple[str, ...] = ("u",), watch: RecordingWatch | None = None, noted: list[UnitRecord] | None = None,
        bring: Callable[..., object] = lambda *_: None, **connections: FakeConnection,
    ) -> dict[str, UnitRecord]:  # fmt: skip
        def opened(host: Host) -> reach.Connection:
            return connections[host.name]

        monkeypatch.setattr(reach, "connect", opened)
        polled = [
            Polled(
                host=Host(name=name, kind=HostKind.SERVER, connection="ssh", address=name),
                work_dir="/w o",
                units=[f"{name}.{unit}" for unit in units],
            )
            for name in connections
        ]
        known = {
            unit: UnitRecord(unit=unit, host=item.host.name, state=UnitState.PENDING)
            for item in polled
            for unit in item.units
        }
        notes = [] if noted is None else noted
        poll.poll(polled, known, notes.append, bring, watch or RecordingWatch(), token="t1", lost_after_s=0.3)
        assert all(record.state.ended for record in known.values())
        assert {item.unit: item.state for item in notes} == {unit: record.state for unit, record in known.items()}
        return known

    return ask


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
        def run(self, command: str, *, timeout: float) -> reach.Answer:
            time.sleep(4.0)
            return super().run(command, timeout=timeout)

    started = time.monotonic()
    found = asked(h01=Stuck([answer(status("h01.u"))]))
    assert time.monotonic() - started < 3.0
    assert "the last question is still open" in found["h01.u"].cause


def test_a_folder_that_is_not_there_is_said(asked: Asked) -> None:
    found = asked(h01=FakeConnection([answer(RUNNING), answer()]))
    assert (found["h01.u"].state, found["h01.u"].cause) == (UnitState.FAILED, "its folder is not on the host")


def test_a_units_end_stands_whatever_is_said_later(asked: Asked) -> None:
    first = answer(status("h01.a"), status("h01.b", UnitState.RUNNING, boot_id="boot-1", heartbeat_at=999.0))
    found = asked(h01=FakeConnection([first, answer(status("h01.b"))]), units=("a", "b"))
    assert {record.state for record in found.values()} == {UnitState.DONE}


def beat(at: float, boot: str = "boot-1") -> SupervisorBeat:
    return SupervisorBeat(pid=7, boot_id=boot, heartbeat_at=at)


@pytest.mark.parametrize(
    ("now", "boot", "expected"),
    [
        (1000, "boot-2", (UnitState.INTERRUPTED, "the host was rebooted")),
        (1100, "boot-2", (UnitState.INTERRUPTED, "the host was rebooted")),
        (1100, "boot-1", (UnitState.FAILED, "its supervisor died, or its disk is full")),
    ],
)
@pytest.mark.parametrize("last", [None, 500.0, 990.0])
@pytest.mark.usefixtures("dead_at_once")
def test_queued_units_end_when_nobody_will_ever_run_them(
    asked: Asked, last: float | None, now: int, boot: str, expected: tuple[UnitState, str]
) -> None:
    ended = status("h01.a", UnitState.FAILED, cause="killed by SIGKILL")
    queued = status("h01.b", UnitState.QUEUED, heartbeat_at=990.0, boot_id="boot-1")
    said = answer(ended, queued, now=now, boot=boot, beat=None if last is None else beat(last))
    found = asked(h01=FakeConnection([said]), units=("a", "b"))
    assert (found["h01.b"].state, found["h01.b"].cause) == expected
    assert found["h01.a"].cause == "killed by SIGKILL"


def test_one_stale_answer_alone_is_no_verdict(asked: Asked) -> None:
    stale, fresh = answer(RUNNING, now=1100), answer(RUNNING)
    noted: list[UnitRecord] = []
    asked(h01=FakeConnection([fresh, stale, fresh, stale, stale, answer(status("h01.u"))]), noted=noted)
    assert [record.state for record in noted] == [UnitState.RUNNING, UnitState.DONE]


def test_a_supervisor_that_looks_dead_long_enough_is(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poll, "CONFIRM_S", 0.05)
    connection = FakeConnection([answer(RUNNING), answer(RUNNING, now=1100)])
    assert asked(h01=connection)["h01.u"].state is UnitState.FAILED
    assert len(connection.commands) >= 3


@pytest.mark.parametrize(("hosts", "interval"), [(1, 1.0), (16, 1.0), (64, 4.0)])
def test_many_hosts_are_asked_less_often(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, hosts: int, interval: float
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        time.sleep(0.01)

    monkeypatch.setattr(poll, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))

    def connection(unit: str) -> FakeConnection:
        running = status(unit, UnitState.RUNNING, boot_id="boot-1", heartbeat_at=999.0)
        return FakeConnection([answer(running), answer(status(unit))])

    asked(**{f"h{number}": connection(f"h{number}.u") for number in range(hosts)})
    # What asking took is part of the interval.
    assert slept
    assert all(0.5 * interval < seconds <= interval for seconds in slept)


def word(now: float = 1000.0, boot: str = "b", last: SupervisorBeat | None = None) -> Word:
    return Word(now=now, boot=boot, beat=last, statuses={})


def queued(at: float | None, boot: str = "b") -> UnitStatus:
    return status("u", UnitState.QUEUED, heartbeat_at=at, boot_id=boot)


@pytest.mark.parametrize(
    ("given", "last", "state", "cause"),
    [
        # A unit waits for hours behind others: its supervisor's beat speaks for it.
        (queued(10.0), beat(999.0, "b"), UnitState.QUEUED, ""),
        (queued(10.0), beat(900.0, "b"), UnitState.FAILED, "its supervisor died"),
        (queued(10.0, "a"), beat(900.0, "a"), UnitState.INTERRUPTED, "rebooted"),
        # Queued after a reboot, beside the beat of the supervisor before it: the unit's own word is the newer one.
        (queued(990.0), beat(900.0, "a"), UnitState.QUEUED, ""),
        (queued(10.0, "a"), beat(999.0, "b"), UnitState.QUEUED, ""),
        (queued(990.0), None, UnitState.QUEUED, ""),
        (queued(900.0), None, UnitState.FAILED, "its supervisor died"),
        (queued(990.0, "a"), None, UnitState.INTERRUPTED, "rebooted"),
        (queued(None, ""), None, UnitState.QUEUED, ""),
        # A running unit has a heartbeat of its own, which no other session's or later supervisor's replaces.
        (status("u", UnitState.RUNNING, boot_id="b", heartbeat_at=990.0), None, UnitState.RUNNING, ""),
        (status("u", UnitState.RUNNING, boot_id="a", heartbeat_at=999.0), None, UnitState.INTERRUPTED, "rebooted"),
        (status("u", UnitState.RUNNING, boot_id="b", heartbeat_at=900.0), None, UnitState.FAILED, "supervisor died"),
        (
            status("u", UnitState.RUNNING, boot_id="b", heartbeat_at=900.0),
            beat(999.0, "b"),
            UnitState.FAILED,
            "supervisor died",
        ),
        (status("u", UnitState.DONE, boot_id="a", heartbeat_at=1.0), None, UnitState.DONE, ""),
        (status("u", UnitState.TIMEOUT, cause="late"), None, UnitState.TIMEOUT, "late"),
    ],
)
def test_judge(given: UnitStatus, last: SupervisorBeat | None, state: UnitState, cause: str) -> None:
    found, said = poll.judge(given, word(last=last))
    assert found is state
    assert cause in said
    assert bool(cause) == bool(said)


def test_an_unknown_boot_or_time_is_no_verdict() -> None:
    running = status("u", UnitState.RUNNING, boot_id="b", heartbeat_at=990.0)
    assert poll.judge(running, word(0.0, ""))[0] is UnitState.RUNNING


def test_parse_answer_reads_what_the_shell_prints() -> None:
    found = poll.parse_answer(answer(status("a"), status("b", UnitState.RUNNING, samples_done=7), beat=beat(999.0)))
    assert (found.now, found.boot, found.beat) == (1000.0, "boot-1", beat(999.0))
    assert {unit: item.state for unit, item in found.statuses.items()} == {"a": UnitState.DONE, "b": UnitState.RUNNING}
    assert found.statuses["b"].samples_done == 7


GARBAGE = ["", "\n\n\n", "bash: date: not found\n", "garbage\ngarbage\ngarbage{{{", "1\nb\n\x1e[]", '1\nb\n\x1e{"unit": 3}',
           "\0\0", "1\nb\n\x1e" + "[" * 100_000, "\x1e" * 100]  # fmt: skip


@pytest.mark.parametrize("text", GARBAGE, ids=range(len(GARBAGE)))
def test_parse_answer_takes_nothing_from_garbage(text: str) -> None:
    found = poll.parse_answer(text)
    assert (found.statuses, found.beat) == ({}, None)


@pytest.mark.parametrize("first", ["²", "١٢", "-1", "1e3", "nan", "", "0x1"])
def test_parse_answer_takes_digits_only_for_the_time(first: str) -> None:
    assert poll.parse_answer(f"{first}\nb\n").now == 0.0


def test_parse_answer_keeps_what_came_before_a_truncation() -> None:
    whole = answer(status("a"), status("b"), beat=beat(1.0))
    for end in range(len(whole)):
        assert set(poll.parse_answer(whole[:end]).statuses) <= {"a", "b"}
    found = poll.parse_answer(whole[:-5])
    assert (set(found.statuses), found.beat) == ({"a"}, beat(1.0))


@pytest.mark.parametrize("broken", ['{"unit": "x", "sta\n', '{"unit": "x", "state": "flying"}\n', "", "\0", "}{"])
def test_parse_answer_goes_on_after_a_broken_status(broken: str) -> None:
    assert set(poll.parse_answer(answer(status("a"), broken, status("b"))).statuses) == {"a", "b"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.text(), st.builds(lambda at: json.dumps(asdict(queued(at))), st.floats()))), st.text())
def test_nothing_a_host_says_is_an_error(documents: list[str], first: str) -> None:
    found = poll.parse_answer("\x1e".join([first, *documents]))
    for item in found.statuses.values():
        assert isinstance(poll.judge(item, found)[0], UnitState)


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
