"""Hosts handed over as they become ready: what is kept of them, what is cancelled, and a disk here that is full."""

import errno
import queue
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleet import handoff, launch, planning
from fleet.handoff import Attempt, HostRecord, UnitRecord
from fleet.harness.contract import Reason, RunSpec, UnitState
from fleet.inventory import reach
from fleet.inventory.hosts import Host
from fleet.session import Session
from fleet.terms import HostState
from tests.unit.fakes import MINIMAL, FakeConnection, RecordingWatch, Scene, answer, scene, status

pytestmark = pytest.mark.usefixtures("quick_polls")

TEXT = MINIMAL.replace("[{name: h01, kind: server}]", "[{name: h01, kind: server}, {name: h02, kind: server}]").replace(
    "name: tiny-bert", "name: tiny-bert, scenarios: [Offline], modes: [performance]"
)
H01, H02 = (f"{host}.tiny-bert.Offline.performance" for host in ("h01", "h02"))


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeConnection]:
    """The connections behind reach.connect; each unit is done at once."""
    found = {"h01": FakeConnection([answer(status(H01))]), "h02": FakeConnection([answer(status(H02))])}

    def opened(host: Host) -> reach.Connection:
        return found[host.name]

    monkeypatch.setattr(reach, "connect", opened)
    return found


def launcher(made: Scene, watch: RecordingWatch | None = None) -> launch.Launcher:
    return launch.Launcher(
        session=made.session,
        campaign=made.campaign,
        watch=watch or RecordingWatch(),
        folder=made.session.run,
        token=made.session.token,
    )


def specs(made: Scene) -> dict[str, RunSpec]:
    return {spec.host: spec for spec in planning.plan(made.session, made.campaign, quick=True).units}


def everything(made: Scene) -> launch.Batches:
    return launch.batches(launch.by_host(handoff.readiness(made.session), specs(made).values()))


def test_a_host_is_started_while_another_is_not_ready_yet(tmp_path: Path, hosts: dict[str, FakeConnection]) -> None:
    made = scene(tmp_path, TEXT)
    first, second = handoff.readiness(made.session)
    batches: launch.Batches = queue.SimpleQueue()
    batches.put(launch.Batch(first, [specs(made)["h01"]]))
    brought: list[str] = []

    def bring(_: reach.Connection, __: str, record: UnitRecord) -> None:
        brought.append(record.unit)
        if record.host == "h01":
            # Only now, with the first host's unit done and on its way home, is the second one ready.
            batches.put(launch.Batch(second, [specs(made)["h02"]]))
            batches.put(None)

    launcher(made).launch(batches, lambda: bring)
    assert brought == [H01, H02]
    assert {unit: item.state for unit, item in handoff.records(made.session).items()} == {
        H01: UnitState.DONE, H02: UnitState.DONE,
    }  # fmt: skip
    assert [len(host.started) for host in hosts.values()] == [1, 1]


@pytest.mark.usefixtures("hosts")
def test_each_host_has_a_record(tmp_path: Path) -> None:
    made = scene(tmp_path, TEXT)
    launcher(made).launch(everything(made), lambda: lambda *_: None)
    for name in ("h01", "h02"):
        found = made.session.read(made.session.run / "hosts" / f"{name}.json", HostRecord)
        assert (found.host, found.state, found.cause) == (name, HostState.READY, "")
        assert found.last_answer_at is not None


@pytest.mark.parametrize("named", ["h01", H01])
def test_a_name_in_the_cancel_folder_stops_a_unit(tmp_path: Path, hosts: dict[str, FakeConnection], named: str) -> None:
    made = scene(tmp_path, TEXT)
    folder = made.session.run / "cancel"
    folder.mkdir(parents=True)

    class Runs(FakeConnection):
        def run(self, command: str, **more: Any) -> reach.Answer:
            stopped = status(H01, UnitState.INTERRUPTED, cause="cancelled")
            self.answers = [answer(stopped if self.cancelled else status(H01, UnitState.RUNNING))]
            if self.commands:
                (folder / named).touch()
            return super().run(command, **more)

    hosts["h01"] = Runs([""])
    launcher(made).launch(everything(made), lambda: lambda *_: None)
    found = handoff.records(made.session)
    assert (found[H01].state, found[H01].reason) == (UnitState.INTERRUPTED, Reason.CANCELLED)
    assert found[H02].state is UnitState.DONE
    assert hosts["h01"].cancelled == [H01]
    assert hosts["h02"].cancelled == []


def test_what_was_cancelled_before_any_host_was_ready_is_not_started(
    tmp_path: Path, hosts: dict[str, FakeConnection]
) -> None:
    made = scene(tmp_path, TEXT)
    folder = made.session.run / "cancel"
    folder.mkdir(parents=True)
    (folder / "h02").touch()
    launcher(made).launch(everything(made), lambda: lambda *_: None)
    found = handoff.records(made.session)
    assert (found[H02].state, found[H02].reason) == (UnitState.INTERRUPTED, Reason.CANCELLED)
    assert found[H01].state is UnitState.DONE
    assert [len(host.started) for host in hosts.values()] == [1, 0]


def test_a_full_disk_here_stops_no_unit_and_the_records_follow(
    tmp_path: Path, hosts: dict[str, FakeConnection], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, watch = scene(tmp_path, TEXT), RecordingWatch()
    full = threading.Event()
    write = Session.write

    def writes(session: Session, path: Path, value: Any) -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(session, path, value)

    def bring(_: reach.Connection, __: str, record: UnitRecord) -> None:
        if record.unit == H02:
            full.clear()

    class Fills(FakeConnection):
        def run(self, command: str, **more: Any) -> reach.Answer:
            full.set()
            return super().run(command, **more)

    hosts["h01"] = Fills([answer(status(H01))])
    monkeypatch.setattr(Session, "write", writes)
    launcher(made, watch).launch(everything(made), lambda: bring)
    assert {item.state for item in handoff.records(made.session).values()} == {UnitState.DONE}
    assert any("this machine cannot keep its records: No space left" in text for _, text in watch.lines)


def test_a_disk_here_that_stays_full_is_said_in_the_end(
    tmp_path: Path, hosts: dict[str, FakeConnection], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scene(tmp_path, TEXT)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    batches = everything(made)
    monkeypatch.setattr(Session, "write", full)
    with pytest.raises(OSError, match="No space left"):
        launcher(made).launch(batches, lambda: lambda *_: None)
    # All units ran to their ends first.
    assert [len(host.started) for host in hosts.values()] == [1, 1]


def test_earlier_attempts_stay_on_record(tmp_path: Path, hosts: dict[str, FakeConnection]) -> None:
    made = scene(tmp_path, TEXT)
    before = Attempt(state=UnitState.FAILED, reason=Reason.OUT_OF_MEMORY, cause="x", ended_at=1.0)
    pending = UnitRecord(unit=H01, host="h01", state=UnitState.PENDING, attempts=(before,))
    made.session.write(made.session.run / "units" / f"{H01}.json", pending)
    assert hosts
    launcher(made).launch(everything(made), lambda: lambda *_: None)
    assert handoff.records(made.session)[H01].attempts == (before,)


def test_what_was_measured_stands_when_another_controllers_further_try_fails(
    tmp_path: Path, hosts: dict[str, FakeConnection]
) -> None:
    made = scene(tmp_path, TEXT)
    invalid = Attempt(state=UnitState.DONE, reason=Reason.INVALID_RESULT, cause="INVALID", ended_at=1.0)
    best = UnitRecord(unit=H01, host="h01", state=UnitState.DONE, reason=Reason.INVALID_RESULT, status=status(H01))
    running = UnitRecord(unit=H01, host="h01", state=UnitState.RUNNING, attempts=(invalid,), best=best)
    made.session.write(made.session.run / "units" / f"{H01}.json", running)
    hosts["h01"].answers = [answer(status(H01, UnitState.FAILED, cause="out", reason=Reason.OTHER))]
    launcher(made).launch(everything(made), lambda: lambda *_: None)
    found = handoff.records(made.session)[H01]
    assert replace(found, later=()) == best
    assert [(item.state, item.cause) for item in found.later] == [(UnitState.FAILED, "out")]


@pytest.mark.parametrize(
    ("state", "unit_state", "reason"),
    [
        (HostState.UNREACHABLE, UnitState.UNREACHABLE, Reason.UNREACHABLE),
        (HostState.CHANGED_KEY, UnitState.NOT_READY, Reason.HOST_KEY),
        (HostState.NOT_READY, UnitState.NOT_READY, Reason.OTHER),
    ],
)
@pytest.mark.usefixtures("hosts")
def test_units_that_cannot_start_say_why(
    tmp_path: Path, state: HostState, unit_state: UnitState, reason: Reason
) -> None:
    made = scene(tmp_path, TEXT, states={"h01": state})
    launcher(made).launch(everything(made), lambda: lambda *_: None)
    found = handoff.records(made.session)
    assert (found[H01].state, found[H01].reason, found[H01].cause) == (unit_state, reason, "h01 is away")
    assert found[H02].state is UnitState.DONE
