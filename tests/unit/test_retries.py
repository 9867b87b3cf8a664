"""Units that are started again, or not: by the reason for which they ended, and nothing that was measured is lost."""

from typing import Any

import pytest

from fleet import poll
from fleet.campaign import RetryPolicy
from fleet.handoff import Collected, UnitRecord
from fleet.harness.contract import Reason, UnitState
from fleet.inventory import reach
from fleet.terms import HostState
from tests.unit.fakes import FakeConnection, RecordingWatch, answer, status
from tests.unit.polling import Asked

pytestmark = pytest.mark.usefixtures("quick_polls")


def no_records() -> list[UnitRecord]:
    return []


SOON = RetryPolicy(times=1, after_s=0.05)


def test_units_are_started_over_the_same_connection_as_their_host_is_asked(asked: Asked) -> None:
    connection = FakeConnection([answer(status("h01.a"), status("h01.b"))])
    asked(units=("a", "b"), h01=connection)
    (queue_,) = connection.started
    assert queue_["session"] == "t1"
    assert [spec["unit"] for spec in queue_["specs"]] == ["h01.a", "h01.b"]
    assert connection.closed == 1


def test_a_host_that_refuses_its_units_says_why(asked: Asked) -> None:
    connection = FakeConnection([answer()], refuses=["Traceback\nOSError: [Errno 28] No space left on device"])
    found = asked(h01=connection)["h01.u"]
    assert (found.state, found.cause) == (UnitState.FAILED, "OSError: [Errno 28] No space left on device")
    assert found.reason is Reason.NO_SPACE


def test_units_that_a_host_has_no_room_for_are_started_again_alone(asked: Asked) -> None:
    class Host(FakeConnection):
        def run(self, command: str, **more: Any) -> reach.Answer:
            self.full = {} if self.started else {"h01.b": "[Errno 28] No space left on device"}
            both = len(self.started) > 1
            self.answers = [answer(status("h01.a"), *([status("h01.b")] if both else []))]
            return super().run(command, **more)

    connection = Host([""])
    found = asked(units=("a", "b"), h01=connection, retry={Reason.NO_SPACE: SOON})
    assert [[spec["unit"] for spec in queue_["specs"]] for queue_ in connection.started] == [
        ["h01.a", "h01.b"],
        ["h01.b"],
    ]
    assert (found["h01.a"].state, found["h01.a"].attempts) == (UnitState.DONE, ())
    (attempt,) = found["h01.b"].attempts
    assert (attempt.reason, attempt.cause) == (Reason.NO_SPACE, "[Errno 28] No space left on device")


def test_what_ended_for_a_reason_that_may_pass_is_started_again(asked: Asked) -> None:
    died = status("h01.u", UnitState.INTERRUPTED, cause="killed", reason=Reason.INTERRUPTED)
    order: list[str] = []

    class Host(FakeConnection):
        def run(self, command: str, **more: Any) -> reach.Answer:
            order.extend(["start"] if more.get("stdin") else [])
            self.answers = [answer(died if len(self.started) == 1 else status("h01.u"))]
            return super().run(command, **more)

    def bring(_: object, __: str, record: UnitRecord) -> None:
        order.append(f"bring {record.state}")

    connection, noted = Host([""]), no_records()
    found = asked(h01=connection, bring=bring, noted=noted, retry={Reason.INTERRUPTED: SOON})["h01.u"]
    assert (found.state, found.reason) == (UnitState.DONE, Reason.NONE)
    # The files of an attempt are home before the next one makes room for itself.
    assert order == ["start", "bring interrupted", "start", "bring done"]
    assert [queue_["specs"][0]["attempt"] for queue_ in connection.started] == [1, 2]
    (attempt,) = found.attempts
    assert (attempt.state, attempt.reason, attempt.cause) == (UnitState.INTERRUPTED, Reason.INTERRUPTED, "killed")
    assert attempt.ended_at > 0
    assert [item.state for item in noted] == [UnitState.INTERRUPTED, UnitState.PENDING, UnitState.DONE]
    assert noted[1].cause == "again in 0 s: killed"


@pytest.mark.parametrize("times", [0, 1, 3])
def test_a_unit_is_not_started_more_often_than_its_policy_says(asked: Asked, times: int) -> None:
    connection = FakeConnection([answer(status("h01.u", UnitState.FAILED, cause="x", reason=Reason.NO_SPACE))])
    found = asked(h01=connection, retry={Reason.NO_SPACE: RetryPolicy(times=times, after_s=0)})["h01.u"]
    assert (found.state, found.reason, found.cause) == (UnitState.FAILED, Reason.NO_SPACE, "x")
    assert len(connection.started) == 1 + times == 1 + len(found.attempts)


def invalid(cause: str = "INVALID: too few queries") -> Collected:
    return Collected(folder="f", complete=True, cause=cause, reason=Reason.INVALID_RESULT)


def test_an_invalid_result_is_measured_again_and_the_verdict_stays_on_record(asked: Asked) -> None:
    homes = [invalid(), Collected(folder="f", complete=True)]
    connection = FakeConnection([answer(status("h01.u"))])
    found = asked(h01=connection, bring=lambda *_: homes.pop(0), retry={Reason.INVALID_RESULT: SOON})["h01.u"]
    assert (found.state, found.reason) == (UnitState.DONE, Reason.NONE)
    assert [item.cause for item in found.attempts] == ["INVALID: too few queries"]
    assert len(connection.started) == 2


def test_a_further_attempt_that_fails_takes_no_measurement_away(asked: Asked) -> None:
    class Host(FakeConnection):
        def run(self, command: str, **more: Any) -> reach.Answer:
            once = len(self.started) == 1
            said = status("h01.u") if once else status("h01.u", UnitState.FAILED, cause="out", reason=Reason.OTHER)
            self.answers = [answer(said)]
            return super().run(command, **more)

    found = asked(h01=Host([""]), bring=lambda *_: invalid(), retry={Reason.INVALID_RESULT: SOON})["h01.u"]
    assert (found.state, found.reason) == (UnitState.DONE, Reason.INVALID_RESULT)
    # It was the first of two starts.
    assert (found.attempts, found.best) == ((), None)
    assert [(item.state, item.cause) for item in found.later] == [(UnitState.FAILED, "out")]


def test_a_further_start_on_a_host_that_is_lost_stays_open(asked: Asked) -> None:
    class Host(FakeConnection):
        def run(self, command: str, **more: Any) -> reach.Answer:
            if len(self.started) == 2:
                raise reach.Unreachable(HostState.UNREACHABLE, "connection lost (reset)")
            self.answers = [answer(status("h01.u"))]
            return super().run(command, **more)

    found = asked(h01=Host([""]), bring=lambda *_: invalid(), retry={Reason.INVALID_RESULT: SOON})["h01.u"]
    assert (found.state, found.reason, found.attempt) == (UnitState.UNREACHABLE, Reason.UNREACHABLE, 2)
    assert "it may still run there" in found.cause
    assert found.best is not None
    assert (found.best.state, found.best.reason) == (UnitState.DONE, Reason.INVALID_RESULT)


def test_what_was_measured_is_on_record_while_it_is_tried_again(asked: Asked) -> None:
    """The controller may die then, and nothing else knows of the number."""
    homes, noted = [invalid(), invalid("INVALID: again")], no_records()
    connection = FakeConnection([answer(status("h01.u"))])
    asked(h01=connection, noted=noted, bring=lambda *_: homes.pop(0), retry={Reason.INVALID_RESULT: SOON})
    (kept,) = [item.best for item in noted if item.state is UnitState.PENDING]
    assert kept is not None
    assert (kept.state, kept.reason, kept.status, kept.attempts) == (
        UnitState.DONE, Reason.INVALID_RESULT, status("h01.u"), (),
    )  # fmt: skip
    assert (noted[-1].state, noted[-1].best, len(noted[-1].attempts)) == (UnitState.DONE, None, 1)


def test_corrupt_files_are_fetched_again_before_the_unit_is_run_again(asked: Asked) -> None:
    corrupt = Collected(folder="", complete=False, cause="lies", reason=Reason.CORRUPT_FILES)
    homes = [corrupt, corrupt, Collected(folder="f", complete=True)]
    connection = FakeConnection([answer(status("h01.u"))])
    found = asked(h01=connection, bring=lambda *_: homes.pop(0), retry={Reason.CORRUPT_FILES: SOON})["h01.u"]
    assert homes == []
    assert len(connection.started) == 2
    assert [item.reason for item in found.attempts] == [Reason.CORRUPT_FILES]


def test_a_transfer_that_breaks_off_is_gone_on_with_and_nothing_is_started_over(asked: Asked) -> None:
    brought: list[str] = []

    def bring(_: object, __: str, record: UnitRecord) -> Collected:
        brought.append(record.unit)
        return Collected(folder="", complete=False, cause="stalled", reason=Reason.UNREACHABLE)

    connection = FakeConnection([answer(status("h01.u"))])
    every = dict.fromkeys(Reason, SOON)
    assert asked(h01=connection, bring=bring, retry=every)["h01.u"].state is UnitState.DONE
    assert (len(brought), len(connection.started)) == (poll.FETCHES, 1)


def test_this_machines_full_disk_is_no_reason_to_run_a_unit_again(asked: Asked) -> None:
    full = Collected(folder="", complete=False, cause="on this machine: full", reason=Reason.NO_SPACE)
    connection = FakeConnection([answer(status("h01.u"))])
    every = dict.fromkeys(Reason, SOON)
    found = asked(h01=connection, bring=lambda *_: full, retry=every)["h01.u"]
    assert (found.state, found.reason, len(connection.started)) == (UnitState.DONE, Reason.NONE, 1)


def test_cancelled_units_are_stopped_and_not_started_again(asked: Asked) -> None:
    names: set[str] = set()

    class Host(FakeConnection):
        def run(self, command: str, **more: Any) -> reach.Answer:
            stopped = status("h01.a", UnitState.INTERRUPTED, cause="cancelled")
            running = status("h01.a", UnitState.RUNNING)
            self.answers = [answer(stopped if self.cancelled else running, status("h01.b"))]
            names.update({"h01.a"} if self.commands else set())
            return super().run(command, **more)

    connection = Host([""])
    found = asked(h01=connection, units=("a", "b"), cancelled=lambda: names, retry=dict.fromkeys(Reason, SOON))
    assert connection.cancelled == ["h01.a"]
    assert (found["h01.a"].state, found["h01.a"].reason) == (UnitState.INTERRUPTED, Reason.CANCELLED)
    assert found["h01.b"].state is UnitState.DONE
    assert len(connection.started) == 1


def test_a_unit_that_waits_to_be_started_again_is_cancelled_at_once(asked: Asked) -> None:
    names: set[str] = set()

    class Watches(RecordingWatch):
        def host(self, host: str, text: str, *, fraction: float | None = None, ended: bool = False) -> None:
            super().host(host, text, fraction=fraction, ended=ended)
            if "again in" in text:
                names.add("h01")

    connection = FakeConnection([answer(status("h01.u", UnitState.FAILED, cause="x", reason=Reason.NO_SPACE))])
    retry = {Reason.NO_SPACE: RetryPolicy(times=5, after_s=3600)}
    found = asked(h01=connection, watch=Watches(), cancelled=lambda: names, retry=retry)["h01.u"]
    assert (found.state, found.reason) == (UnitState.INTERRUPTED, Reason.CANCELLED)
    assert len(connection.started) == 1
