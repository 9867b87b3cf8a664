"""fleet cancel and the questions before a session goes on, without hosts."""

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fleet import cancel, handoff, meanwhile, planning
from fleet.errors import CampaignError, SessionError
from fleet.handoff import UnitRecord
from fleet.harness.contract import Reason, UnitState, UnitStatus
from fleet.inventory import files, reach
from fleet.inventory.hosts import Host
from fleet.subset import EVERYTHING, Subset
from fleet.terms import HostState
from tests.unit.fakes import MINIMAL, FakeConnection, Scene, scene, status

TWO = MINIMAL.replace("[{name: h01, kind: server}]", "[{name: h01, kind: server}, {name: h02, kind: server}]").replace(
    "name: tiny-bert", "name: tiny-bert, scenarios: [Offline], modes: [performance]"
)
ONE, OTHER = "h01.tiny-bert.Offline.performance", "h02.tiny-bert.Offline.performance"


class Said(FakeConnection):
    """Says the same whatever it is told."""

    def run(self, command: str, *, timeout: float, **_: Any) -> reach.Answer:
        assert timeout <= cancel.STOP_S
        self.commands.append(command)
        return reach.Answer(rc=0, out=str(self.answers[0]), err="")


def answer(*statuses: UnitStatus) -> str:
    """What the question prints."""
    return "1000.00 boot-1\n" + "".join("\x1e" + json.dumps(asdict(item)) for item in statuses)


@pytest.fixture
def made(tmp_path: Path) -> Scene:
    """Two hosts with a unit each; both run."""
    made = scene(tmp_path, TWO)
    plan = planning.plan(made.session, made.campaign, quick=False)
    made.session.write(made.session.run / "plan.json", plan)
    for unit in (ONE, OTHER):
        note(made, unit, UnitState.RUNNING)
    return made


def note(made: Scene, unit: str, state: UnitState) -> None:
    record = UnitRecord(unit=unit, host=unit.partition(".")[0], state=state, status=status(unit, state))
    made.session.write(made.session.run / "units" / f"{unit}.json", record)


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeConnection]:
    """Connections by host; a host without one is away."""
    there: dict[str, FakeConnection] = {}

    def connect(host: Host) -> FakeConnection:
        if host.name not in there:
            raise reach.Unreachable(HostState.UNREACHABLE, f"{host.name} is away")
        return there[host.name]

    monkeypatch.setattr(reach, "connect", connect)
    return there


def told(made: Scene) -> list[str]:
    return sorted(path.name for path in (made.session.run / "cancel").iterdir())


def test_everything_stops_and_is_written_down_where_no_controller_does_it(
    made: Scene, hosts: dict[str, FakeConnection]
) -> None:
    hosts["h01"] = Said([json.dumps({ONE: "interrupted"})])
    hosts["h02"] = Said([json.dumps({OTHER: "interrupted"})])
    found = cancel.cancel(made.session, [])
    assert [(item.unit, item.state, item.stopped) for item in found] == [
        (ONE, UnitState.INTERRUPTED, True),
        (OTHER, UnitState.INTERRUPTED, True),
    ]
    work = "/home/me/.mlperf-fleet"
    assert shlex.split(hosts["h01"].commands[0]) == [
        f"{work}/venv/bin/python", f"{work}/harness/current", "cancel", work, made.session.token,
    ]  # fmt: skip
    assert hosts["h01"].closed == 1
    assert told(made) == ["h01", "h02"]
    for record in handoff.records(made.session).values():
        assert (record.state, record.reason, record.cause) == (UnitState.INTERRUPTED, Reason.CANCELLED, "cancelled")


def test_beside_a_controller_the_records_are_its_own(made: Scene, hosts: dict[str, FakeConnection]) -> None:
    hosts["h02"] = Said([json.dumps({OTHER: "interrupted"})])
    with made.session.locked():
        (found,) = cancel.cancel(made.session, [OTHER])
    assert found.stopped
    assert shlex.split(hosts["h02"].commands[0])[-1] == OTHER
    assert told(made) == [OTHER]
    assert handoff.records(made.session)[OTHER].state is UnitState.RUNNING


def test_a_host_that_is_away_may_still_run_its_units(made: Scene, hosts: dict[str, FakeConnection]) -> None:
    assert hosts == {}
    (found,) = cancel.cancel(made.session, ["h01"])
    assert (found.state, found.stopped, found.cause) == (UnitState.RUNNING, False, "h01 is away")
    assert handoff.records(made.session)[ONE].state is UnitState.RUNNING


def test_what_had_ended_keeps_its_result(made: Scene, hosts: dict[str, FakeConnection]) -> None:
    note(made, ONE, UnitState.DONE)
    note(made, OTHER, UnitState.PENDING)
    hosts.update({"h01": Said(['{"h01.x": "done"}']), "h02": Said(["{}"])})
    one, other = cancel.cancel(made.session, ["h*"])
    assert (one.state, one.stopped, one.cause) == (UnitState.DONE, True, "it had ended")
    assert (other.state, other.stopped, other.cause) == (UnitState.INTERRUPTED, True, "it was not started")
    assert handoff.records(made.session)[ONE].state is UnitState.DONE


@pytest.mark.parametrize(
    ("said", "cause"), [("nonsense", "its answer cannot be read"), ('{"x": "well"}', "its answer")]
)
def test_an_answer_that_cannot_be_read_stops_nothing(
    made: Scene, hosts: dict[str, FakeConnection], said: str, cause: str
) -> None:
    hosts["h01"] = Said([said])
    (found,) = cancel.cancel(made.session, ["h01"])
    assert not found.stopped
    assert cause in found.cause


def test_names_that_are_nothing_are_refused(made: Scene, tmp_path: Path) -> None:
    with pytest.raises(CampaignError, match="h99: neither a host nor a unit"):
        cancel.cancel(made.session, ["h01", "h99"])
    assert not (made.session.run / "cancel").exists()
    with pytest.raises(SessionError, match="nothing was started"):
        cancel.cancel(scene(tmp_path / "2", TWO).session, [])


def test_what_happened_meanwhile_is_said_per_host(made: Scene, hosts: dict[str, FakeConnection]) -> None:
    hosts["h01"] = Said([answer(status(ONE))])
    one, two = meanwhile.ask(made.session, EVERYTHING)
    assert (str(one), one.busy) == ("1 unit ended meanwhile", False)
    assert (str(two), two.busy) == ("no answer: h02 is away", True)
    running = status(ONE, UnitState.RUNNING, boot_id="boot-1", beat_uptime=999.0, heartbeat_at=999.0)
    hosts["h01"] = Said([answer(running)])
    (one,) = meanwhile.ask(made.session, Subset(limit=("h01",)))
    assert (str(one), one.busy) == ("1 unit running", True)
    assert meanwhile.busy(made.session, Subset(limit=("h01",))) == {"h01"}
    hosts["h01"] = Said(["garbage"])
    assert str(meanwhile.ask(made.session, EVERYTHING)[0]) == "no answer: its answer cannot be read"
    hosts["h01"] = Said([answer()])
    assert str(meanwhile.ask(made.session, EVERYTHING)[0]) == "nothing happened meanwhile; 1 unit missing"


@pytest.mark.parametrize("answers", [[], ["garbage"]])
@pytest.mark.parametrize(
    ("state", "last_seen", "busy"),
    [
        (UnitState.RUNNING, UnitState.RUNNING, True),
        (UnitState.QUEUED, None, True),
        (UnitState.UNREACHABLE, None, True),
        # The controller was killed as it went on with it.
        (UnitState.PENDING, UnitState.RUNNING, True),
        (UnitState.LEFT_OUT, UnitState.QUEUED, True),
        (UnitState.PENDING, None, False),
        (UnitState.FAILED, UnitState.FAILED, False),
        (UnitState.DONE, UnitState.DONE, False),
    ],
)
def test_no_answer_is_not_taken_for_nothing_runs(
    made: Scene, hosts: dict[str, FakeConnection], answers: list[Any], state: UnitState,
    last_seen: UnitState | None, *, busy: bool,
) -> None:  # fmt: skip
    seen = None if last_seen is None else status(ONE, last_seen)
    record = UnitRecord(unit=ONE, host="h01", state=state, status=seen)
    made.session.write(made.session.run / "units" / f"{ONE}.json", record)
    if answers:
        hosts["h01"] = Said(answers)
    assert ("h01" in meanwhile.busy(made.session, EVERYTHING)) is busy
    # One that did not answer the probe either is not gone on with at all.
    away = [replace(item, state=HostState.UNREACHABLE) for item in files.reachability(made.session)]
    files.write(made.session, files.hosts(made.session), away, made.campaign)
    assert meanwhile.busy(made.session, EVERYTHING) == set()


def test_hosts_with_nothing_missing_are_not_asked(made: Scene, hosts: dict[str, FakeConnection]) -> None:
    for unit in (ONE, OTHER):
        note(made, unit, UnitState.DONE)
    home = {unit: handoff.Collected(folder="x", complete=True) for unit in (ONE, OTHER)}
    made.session.write(made.session.collect / "collected.json", handoff.CollectedFile(units=home))
    assert hosts == {}
    assert meanwhile.ask(made.session, EVERYTHING) == []
    (made.session.run / "plan.json").unlink()
    assert meanwhile.ask(replace(made).session, EVERYTHING) == []
