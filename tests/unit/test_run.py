"""The run stage: a record for every planned unit from the first moment, and an end with a cause for each."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fleet import handoff, run
from fleet.harness.contract import RunSpec, UnitState, UnitStatus
from fleet.inventory import files, reach
from fleet.inventory.hosts import Host
from fleet.inventory.reach import Unreachable
from fleet.plays import HostOutcome
from fleet.terms import HostKind, HostState, Mode, Scenario
from tests.unit.fakes import MINIMAL, FakeConnection, FakePlays, RecordingWatch, Scene, scene

TWO = MINIMAL.replace("[{name: h01, kind: server}]", "[{name: h01, kind: server}, {name: h02, kind: server}]")
ONE_UNIT = MINIMAL.replace("name: tiny-bert", "name: tiny-bert, scenarios: [Offline], modes: [performance]")
UNIT = "h01.tiny-bert.Offline.performance"


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "POLL_FIRST_S", 0.01)
    monkeypatch.setattr(run, "POLL_LAST_S", 0.02)


def status(unit: str, state: UnitState = UnitState.DONE, **more: Any) -> UnitStatus:
    return UnitStatus(unit=unit, state=state, **more)


def answer(*statuses: UnitStatus, now: int = 1000, boot: str = "boot-1") -> str:
    """What the poll's shell command prints."""
    return f"{now}\n{boot}\n" + "".join(json.dumps(asdict(item), indent=1) + "\n" for item in statuses)


Connect = Callable[[dict[str, FakeConnection]], None]


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Puts fake connections behind reach.connect, by host."""

    def install(connections: dict[str, FakeConnection]) -> None:
        def opened(host: Host) -> reach.Connection:
            return connections[host.name]

        monkeypatch.setattr(reach, "connect", opened)

    return install


def plan(made: Scene, *, quick: bool = False) -> handoff.Plan:
    return run.plan(made.session, made.campaign, base=made.base, source="fleet.yml", quick=quick)


def go(made: Scene, plays: FakePlays, watch: RecordingWatch | None = None, *, quick: bool = False) -> Any:
    found = run.run(
        made.session, made.campaign, plays, watch or RecordingWatch(),
        base=made.base, source="fleet.yml", quick=quick,
    )  # fmt: skip
    return {record.unit: record for record in found}


def test_the_plan_is_every_host_by_scenario_by_mode(tmp_path: Path) -> None:
    made = scene(tmp_path, TWO, states={"h02": HostState.UNREACHABLE})
    planned = plan(made)
    assert [spec.unit for spec in planned.units] == [
        f"{host}.tiny-bert.{scenario}.{mode}"
        for host in ("h01", "h02")
        for scenario in ("SingleStream", "Offline")
        for mode in ("accuracy", "performance")
    ]
    spec = planned.units[0]
    assert (spec.session, spec.work_dir, spec.round) == (made.session.token, "/home/me/.mlperf-fleet", "v6.1")
    assert (spec.loadgen_version, spec.loadgen_model, spec.module) == ("6.0.17", "bert", "tiny")
    assert (spec.sample_count, spec.performance_sample_count, spec.quick) == (10833, 10833, False)


def test_deadlines_follow_the_duration_asked_for(tmp_path: Path) -> None:
    def performance(text: str, *, quick: bool = False) -> RunSpec:
        made = scene(tmp_path / str(len(list(tmp_path.iterdir()))), text)
        return next(spec for spec in plan(made, quick=quick).units if spec.mode is Mode.PERFORMANCE)

    assert performance(ONE_UNIT).expected_s == pytest.approx(60 + 1.4 * 600)
    assert performance(ONE_UNIT).deadline_s == pytest.approx(3 * (60 + 1.4 * 600) + 120)
    quick = performance(ONE_UNIT + "run: {quick_seconds: 7, deadline_factor: 2}\n", quick=True)
    assert quick.deadline_s == pytest.approx(2 * (60 + 1.4 * 7) + 120)
    assert "*.Offline.min_duration = 7000\n" in quick.user_conf
    own = ONE_UNIT.replace("modes:", "user_conf: {Offline: {min_duration: 20000, target_qps: 5}}, modes:")
    assert performance(own).expected_s == pytest.approx(60 + 1.4 * 20)
    assert performance(own).user_conf == "*.Offline.min_duration = 20000\n*.Offline.target_qps = 5.0\n"


def test_all_units_end_as_the_host_says(tmp_path: Path, connect: Connect) -> None:
    made = scene(tmp_path)
    units = [spec.unit for spec in plan(made).units]
    queued = [status(unit, UnitState.QUEUED) for unit in units]
    half = [status(units[0]), status(units[1], UnitState.RUNNING, boot_id="boot-1", heartbeat_at=999.0), *queued[2:]]
    ends = [status(unit) for unit in units[:3]] + [status(units[3], UnitState.FAILED, cause="out of memory")]
    connection = FakeConnection([answer(*queued), answer(*half), answer(*ends)])
    connect({"h01": connection})
    plays, watch = FakePlays(), RecordingWatch()
    found = go(made, plays, watch)
    assert [record.state for record in found.values()] == [UnitState.DONE] * 3 + [UnitState.FAILED]
    assert found[units[3]].cause == "out of memory"
    assert handoff.records(made.session) == found
    assert plays.requests[0].playbook == "run"
    queue = json.loads((made.session.run / "queues" / "h01.json").read_text(encoding="utf-8"))
    assert queue["session"] == made.session.token
    assert [spec["unit"] for spec in queue["specs"]] == units
    assert connection.closed == 1
    assert f"/home/me/.mlperf-fleet/runs/{made.session.token}/*/status.json" in connection.commands[0]
    assert ("h01", "3 of 4 units done: out of memory") in watch.lines
    assert any("tiny-bert.SingleStream.performance (2/4)" in text for _, text in watch.lines)


def test_every_unit_has_a_record_before_anything_is_started(tmp_path: Path, connect: Connect) -> None:
    made = scene(tmp_path, ONE_UNIT)
    seen: list[UnitState] = []
    plays = FakePlays(during=lambda _: seen.extend(item.state for item in handoff.records(made.session).values()))
    connect({"h01": FakeConnection([answer(status(UNIT))])})
    go(made, plays)
    assert seen == [UnitState.PENDING]


def test_units_of_a_host_that_is_not_ready_end_with_its_cause(tmp_path: Path) -> None:
    made = scene(tmp_path, TWO, states={"h01": HostState.UNREACHABLE, "h02": HostState.CHANGED_KEY})
    plays = FakePlays()
    found = go(made, plays)
    assert plays.requests == []
    by_host = {(record.host, record.state, record.cause) for record in found.values()}
    assert by_host == {
        ("h01", UnitState.UNREACHABLE, "h01 is away"),
        ("h02", UnitState.NOT_READY, "h02 is away"),
    }
    assert len(found) == 8


def test_a_benchmark_the_host_cannot_run_is_not_started(tmp_path: Path) -> None:
    made = scene(tmp_path, ONE_UNIT, cannot={"tiny-bert": "0.5 GiB memory, 1.5 GiB needed"})
    found = go(made, FakePlays())
    assert (found[UNIT].state, found[UNIT].cause) == (UnitState.NOT_READY, "0.5 GiB memory, 1.5 GiB needed")


@pytest.mark.parametrize(
    ("state", "expected"),
    [(HostState.FAILED, UnitState.FAILED), (HostState.UNREACHABLE, UnitState.UNREACHABLE)],
)
def test_a_play_that_fails_ends_the_hosts_units(tmp_path: Path, state: HostState, expected: UnitState) -> None:
    made = scene(tmp_path, ONE_UNIT)
    plays = FakePlays({"h01": HostOutcome(host="h01", state=state, cause="no room")})
    found = go(made, plays)
    assert (found[UNIT].state, found[UNIT].cause) == (expected, "no room")


def test_done_units_are_not_run_again_until_their_spec_changes(tmp_path: Path, connect: Connect) -> None:
    made = scene(tmp_path, ONE_UNIT)
    connect({"h01": FakeConnection([answer(status(UNIT))])})
    plays = FakePlays()
    go(made, plays)
    assert go(made, plays)[UNIT].state is UnitState.DONE
    assert len(plays.requests) == 1
    go(made, plays, quick=True)
    assert len(plays.requests) == 2
    assert handoff.plan(made.session).quick


def test_failed_units_are_run_again(tmp_path: Path, connect: Connect) -> None:
    made = scene(tmp_path, ONE_UNIT)
    connect({"h01": FakeConnection([answer(status(UNIT, UnitState.FAILED, cause="x"))])})
    plays = FakePlays()
    go(made, plays)
    connect({"h01": FakeConnection([answer(status(UNIT))])})
    assert go(made, plays)[UNIT].state is UnitState.DONE
    assert len(plays.requests) == 2


def impatient(made: Scene) -> Scene:
    settings = made.campaign.run.model_copy(update={"lost_after_s": 0.3})
    return replace(made, campaign=made.campaign.model_copy(update={"run": settings}))


def test_a_host_that_falls_silent_is_lost_and_holds_nobody_up(tmp_path: Path, connect: Connect) -> None:
    text = TWO.replace("name: tiny-bert", "name: tiny-bert, scenarios: [Offline], modes: [performance]")
    made = impatient(scene(tmp_path, text))
    gone = Unreachable(HostState.UNREACHABLE, "connection lost (reset)")
    other = UNIT.replace("h01", "h02")
    lost = FakeConnection([answer(status(UNIT, UnitState.RUNNING, boot_id="boot-1", heartbeat_at=999.0)), gone])
    connect({"h01": lost, "h02": FakeConnection([answer(status(other))])})
    found = go(made, FakePlays())
    assert found[other].state is UnitState.DONE
    assert found[UNIT].state is UnitState.UNREACHABLE
    assert "connection lost (reset)" in found[UNIT].cause
    assert "it may still run there" in found[UNIT].cause
    assert found[UNIT].status is not None


def test_a_host_that_comes_back_in_time_is_not_lost(tmp_path: Path, connect: Connect) -> None:
    made = impatient(scene(tmp_path, ONE_UNIT))
    gone = Unreachable(HostState.UNREACHABLE, "connection lost")
    connect({"h01": FakeConnection([gone, gone, gone, answer(status(UNIT))])})
    assert go(made, FakePlays())[UNIT].state is UnitState.DONE


def test_a_question_that_never_returns_counts_as_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(FakeConnection):
        def run(self, command: str, *, timeout: float) -> reach.Answer:
            time.sleep(1.0)
            return super().run(command, timeout=timeout)

    made = impatient(scene(tmp_path, ONE_UNIT))
    monkeypatch.setattr(reach, "connect", lambda _: Stuck([answer(status(UNIT))]))
    started = time.monotonic()
    found = go(made, FakePlays())
    assert time.monotonic() - started < 0.9
    assert "the last question is still open" in found[UNIT].cause


@pytest.mark.parametrize(
    ("given", "state", "cause"),
    [
        (status("u", UnitState.QUEUED), UnitState.QUEUED, ""),
        (status("u", UnitState.RUNNING, boot_id="b", heartbeat_at=990.0), UnitState.RUNNING, ""),
        (status("u", UnitState.RUNNING, boot_id="a", heartbeat_at=999.0), UnitState.INTERRUPTED, "rebooted"),
        (status("u", UnitState.RUNNING, boot_id="b", heartbeat_at=900.0), UnitState.FAILED, "its supervisor died"),
        (status("u", UnitState.DONE, boot_id="a", heartbeat_at=1.0), UnitState.DONE, ""),
        (status("u", UnitState.TIMEOUT, cause="late"), UnitState.TIMEOUT, "late"),
    ],
)
def test_judge(given: UnitStatus, state: UnitState, cause: str) -> None:
    found, said = run.judge(given, now=1000.0, boot="b")
    assert found is state
    assert cause in said
    assert bool(cause) == bool(said)


def test_an_unknown_boot_or_time_is_no_verdict() -> None:
    running = status("u", UnitState.RUNNING, boot_id="b", heartbeat_at=990.0)
    assert run.judge(running, now=0.0, boot="")[0] is UnitState.RUNNING


def test_parse_answer_reads_what_the_shell_prints() -> None:
    now, boot, found = run.parse_answer(answer(status("a"), status("b", UnitState.RUNNING, samples_done=7)))
    assert (now, boot) == (1000.0, "boot-1")
    assert {unit: item.state for unit, item in found.items()} == {"a": UnitState.DONE, "b": UnitState.RUNNING}
    assert found["b"].samples_done == 7


@pytest.mark.parametrize(
    "text",
    ["", "\n\n\n", "bash: date: not found\n", "garbage\ngarbage\ngarbage{{{", "1\nb\n[]", '1\nb\n{"unit": 3}', "\0\0"],
)
def test_parse_answer_takes_nothing_from_garbage(text: str) -> None:
    assert run.parse_answer(text)[2] == {}


def test_parse_answer_keeps_what_came_before_a_truncation() -> None:
    whole = answer(status("a"), status("b"))
    for end in range(len(whole)):
        found = run.parse_answer(whole[:end])[2]
        assert set(found) <= {"a", "b"}
    assert set(run.parse_answer(whole[:-5])[2]) == {"a"}


def test_parse_answer_leaves_out_one_that_does_not_fit() -> None:
    text = answer(status("a")) + '{"unit": "x", "state": "flying"}\n' + json.dumps(asdict(status("b")))
    assert set(run.parse_answer(text)[2]) == {"a", "b"}


@pytest.mark.xfail(strict=True, raises=ValueError, reason="isdigit accepts '²', float does not: the host ends the run")
def test_parse_answer_survives_digits_that_are_no_number() -> None:
    assert run.parse_answer("²\nb\n")[0] == 0.0


@pytest.mark.xfail(strict=True, raises=RecursionError, reason="deep JSON from one host ends the run for all")
def test_parse_answer_survives_deep_nesting() -> None:
    assert run.parse_answer("1\nb\n" + "[" * 100_000)[2] == {}


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="_documents stops at the first broken status: later units look vanished"
)
def test_parse_answer_goes_on_after_a_broken_status() -> None:
    text = answer(status("a")) + '{"unit": "x", "sta\n' + json.dumps(asdict(status("b")), indent=1)
    assert set(run.parse_answer(text)[2]) == {"a", "b"}


def test_a_folder_that_vanished_is_said(tmp_path: Path, connect: Connect) -> None:
    made = scene(tmp_path, ONE_UNIT)
    running = answer(status(UNIT, UnitState.RUNNING, boot_id="boot-1", heartbeat_at=999.0))
    connect({"h01": FakeConnection([running, answer()])})
    found = go(made, FakePlays())
    assert (found[UNIT].state, found[UNIT].cause) == (UnitState.FAILED, "its folder vanished from the host")


@pytest.mark.xfail(
    strict=True,
    raises=pytest.fail.Exception,
    reason="a queued unit whose supervisor is gone (killed, rebooted) is never judged: run never returns",
)
@pytest.mark.parametrize("boot", ["boot-1", "boot-2"])
def test_queued_units_end_when_nobody_will_ever_run_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connect: Connect, boot: str
) -> None:
    text = MINIMAL.replace("name: tiny-bert", "name: tiny-bert, scenarios: [Offline]")
    made = impatient(scene(tmp_path, text))
    dead = status("h01.tiny-bert.Offline.accuracy", UnitState.RUNNING, boot_id="boot-1", heartbeat_at=1.0)
    connection = FakeConnection([answer(dead, status(UNIT, UnitState.QUEUED), boot=boot)])
    connect({"h01": connection})

    ended, real_sleep = time.monotonic() + 2, time.sleep

    def sleep(seconds: float) -> None:
        if time.monotonic() > ended:
            pytest.fail("still polling")
        real_sleep(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    found = go(made, FakePlays())
    assert found[UNIT].state.ended


@pytest.mark.xfail(
    strict=True, raises=KeyError, reason="_start looks hosts up in readiness without asking if it is there"
)
def test_a_host_that_was_never_provisioned_gets_a_state(tmp_path: Path) -> None:
    made = scene(tmp_path, ONE_UNIT)
    added = Host(name="h02", kind=HostKind.SERVER, connection="ssh", address="h02")
    campaign_hosts = TWO.replace("name: tiny-bert", "name: tiny-bert, scenarios: [Offline], modes: [performance]")
    wider = scene(tmp_path / "2", campaign_hosts)
    made.session.write(made.session.inventory / "hosts.json", [*files.hosts(made.session), added])
    found = go(replace(made, campaign=wider.campaign), FakePlays(during=lambda _: pytest.fail("started")))
    assert found[UNIT.replace("h01", "h02")].state is UnitState.NOT_READY


def test_specs_name_the_scenario_in_user_conf(tmp_path: Path) -> None:
    text = MINIMAL.replace(
        "name: tiny-bert", "name: tiny-bert, scenarios: [Server], user_conf: {Server: {target_qps: 3}}"
    )
    (spec, _) = plan(scene(tmp_path, text)).units
    assert spec.scenario is Scenario.SERVER
    assert spec.user_conf == "*.Server.target_qps = 3.0\n"
