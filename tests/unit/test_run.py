"""The run stage: a record for every planned unit from the first moment, and an end with a cause for each."""

import queue
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleet import handoff, launch, planning, run
from fleet.harness.contract import RunSpec, UnitState
from fleet.inventory import files, reach
from fleet.inventory.hosts import Host
from fleet.subset import Subset
from fleet.terms import HostKind, HostState, Mode, Scenario
from tests.unit.fakes import MINIMAL, FakeConnection, RecordingWatch, Scene, answer, scene, status

TWO = MINIMAL.replace("[{name: h01, kind: server}]", "[{name: h01, kind: server}, {name: h02, kind: server}]")
ONE_UNIT = MINIMAL.replace("name: tiny-bert", "name: tiny-bert, scenarios: [Offline], modes: [performance]")
UNIT = "h01.tiny-bert.Offline.performance"


pytestmark = pytest.mark.usefixtures("quick_polls")


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
    return planning.plan(made.session, made.campaign, quick=quick)


def go(made: Scene, watch: RecordingWatch | None = None, *, quick: bool = False) -> Any:
    found = run.run(
        made.session, made.campaign, watch or RecordingWatch(), quick=quick, bringer=lambda _: lambda *_: None
    )
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
    assert quick.deadline_s == pytest.approx(2 * (60 + 120) + 120)  # the set, on a slow machine
    assert "*.Offline.min_duration = 7000\n" in quick.user_conf
    own = ONE_UNIT.replace("modes:", "user_conf: {Offline: {min_duration: 20000, target_qps: 5}}, modes:")
    assert performance(own).user_conf == "*.Offline.min_duration = 20000\n*.Offline.target_qps = 5.0\n"
    engine = ONE_UNIT.replace("modes:", "backend: tensorrt, modes:")
    assert performance(engine).deadline_s == pytest.approx(3 * (60 + 1.4 * 600) + 120 + 900)
    # Offline sends the whole set at least, which at five samples a second takes longer than the duration.
    assert performance(own).expected_s == pytest.approx(60 + 10833 / 5)
    assert performance(own).deadline_s == pytest.approx(3 * (60 + 10833 / 5) + 120)


def test_a_fast_target_shortens_what_is_expected_and_not_the_deadline(tmp_path: Path) -> None:
    fast = ONE_UNIT.replace("tiny-bert", "bert-99").replace(
        "modes:", "user_conf: {Offline: {target_qps: 5000}}, modes:"
    )
    spec = plan(scene(tmp_path, fast)).units[0]
    assert spec.expected_s == pytest.approx(60 + 1.4 * 600)
    assert spec.deadline_s == pytest.approx(3 * (60 + 7200) + 120)


def test_a_quick_run_takes_as_much_of_a_set_as_a_slow_machine_answers_in_minutes(tmp_path: Path) -> None:
    counts = {}
    for name in ("tiny-bert", "bert-99", "gptj-99"):
        made = scene(tmp_path / name, ONE_UNIT.replace("tiny-bert", name))
        counts[name] = plan(made, quick=True).units[0].sample_count
    assert counts == {"tiny-bert": 10833, "bert-99": 180, "gptj-99": 100}


@pytest.mark.parametrize(
    ("more", "labels"),
    [
        ("", ("demo model",)),
        (", backend_options: {weights: random}", ("demo model", "random weights")),
        (', backend: "null"', ("demo model", "simulated")),
    ],
)
def test_labels_that_the_campaign_brings_about_are_there_before_anything_ran(
    tmp_path: Path, connect: Connect, more: str, labels: tuple[str, ...]
) -> None:
    made = scene(tmp_path, ONE_UNIT.replace("[performance]", f"[performance]{more}"))
    assert plan(made).units[0].labels == labels
    connect({"h01": FakeConnection([answer()], refuses=["no room"])})
    assert go(made)[UNIT].labels == labels
    assert made.session.read(made.session.run / "units" / f"{UNIT}.json", handoff.UnitRecord).labels == labels


def bring_home(made: Scene, **changes: Any) -> None:
    """Every unit's files are here and verified, unless `changes` says otherwise."""
    home = handoff.Collected(**{"folder": "collect/h01/x", "complete": True, **changes})
    units = {spec.unit: home for spec in handoff.plan(made.session).units}
    made.session.write(made.session.collect / "collected.json", handoff.CollectedFile(units=units))


def test_all_units_end_as_the_host_says(tmp_path: Path, connect: Connect) -> None:
    made = scene(tmp_path)
    units = [spec.unit for spec in plan(made).units]
    queued = [status(unit, UnitState.QUEUED) for unit in units]
    half = [status(units[0]), status(units[1], UnitState.RUNNING, boot_id="boot-1", heartbeat_at=999.0), *queued[2:]]
    ends = [status(unit) for unit in units[:3]] + [status(units[3], UnitState.FAILED, cause="out of memory")]
    connection = FakeConnection([answer(*queued), answer(*half), answer(*ends)])
    connect({"h01": connection})
    watch = RecordingWatch()
    found = go(made, watch)
    assert [record.state for record in found.values()] == [UnitState.DONE] * 3 + [UnitState.FAILED]
    assert found[units[3]].cause == "out of memory"
    assert handoff.records(made.session) == found
    (queue,) = connection.started
    assert queue["session"] == made.session.token
    assert [spec["unit"] for spec in queue["specs"]] == units
    assert connection.closed == 1
    assert f"cd /home/me/.mlperf-fleet/runs/{made.session.token} && " in connection.commands[0]
    assert ("h01", "3 of 4 units done: out of memory") in watch.lines
    assert any("tiny-bert.SingleStream.performance (demo model) (2/4)" in text for _, text in watch.lines)


def test_ended_units_are_handed_to_the_bringer_of_the_plan_just_written(tmp_path: Path, connect: Connect) -> None:
    made = scene(tmp_path, ONE_UNIT)
    connection = FakeConnection([answer(status(UNIT))])
    connect({"h01": connection})
    brought: list[tuple[object, str, str, UnitState]] = []

    def bringer(planned: Mapping[str, RunSpec]) -> launch.Bring:
        assert list(planned) == [UNIT]
        assert [spec.unit for spec in handoff.plan(made.session).units] == [UNIT]
        return lambda at, work_dir, record: brought.append((at, work_dir, record.unit, record.state))

    run.run(made.session, made.campaign, RecordingWatch(), quick=False, bringer=bringer)
    assert brought == [(connection, "/home/me/.mlperf-fleet", UNIT, UnitState.DONE)]


def test_every_unit_has_a_record_before_anything_is_started(tmp_path: Path, connect: Connect) -> None:
    made = scene(tmp_path, ONE_UNIT)
    seen: list[UnitState] = []

    class Host(FakeConnection):
        def run(self, command: str, **more: Any) -> reach.Answer:
            if not self.started:
                seen.extend(item.state for item in handoff.records(made.session).values())
            return super().run(command, **more)

    connect({"h01": Host([answer(status(UNIT))])})
    go(made)
    assert seen == [UnitState.PENDING]


def away(made: Scene, host: str, **changes: Any) -> None:
    """Change what provision left of a host."""
    rows = [replace(item, **changes) if item.host == host else item for item in handoff.readiness(made.session)]
    made.session.write(made.session.provision / "readiness.json", handoff.ReadinessFile(hosts=tuple(rows)))


def test_a_host_that_was_away_is_asked_anew_for_what_was_planned_when_it_was_ready(
    tmp_path: Path, connect: Connect
) -> None:
    made = scene(tmp_path, ONE_UNIT, lock={"driver": "550.1"})
    connect({"h01": FakeConnection([answer(status(UNIT, UnitState.FAILED, cause="x"))])})
    go(made)
    away(made, "h01", state=HostState.UNREACHABLE, cause="h01 is away", lock={})
    back = FakeConnection([answer(status(UNIT, UnitState.RUNNING)), answer(status(UNIT))])
    connect({"h01": back})
    assert go(made)[UNIT].state is UnitState.DONE
    (started,) = back.started
    assert started["specs"][0]["lock"]["driver"] == "550.1"
    assert started["specs"][0]["attempt"] == 2


def test_units_of_a_host_that_is_not_ready_end_with_its_cause(tmp_path: Path) -> None:
    made = scene(tmp_path, TWO, states={"h01": HostState.UNREACHABLE, "h02": HostState.CHANGED_KEY})
    away(made, "h01", work_dir="")
    found = go(made)
    by_host = {(record.host, record.state, record.cause) for record in found.values()}
    assert by_host == {
        ("h01", UnitState.UNREACHABLE, "h01 is away"),
        ("h02", UnitState.NOT_READY, "h02 is away"),
    }
    assert len(found) == 8


def test_a_benchmark_the_host_cannot_run_is_not_started(tmp_path: Path) -> None:
    made = scene(tmp_path, ONE_UNIT, cannot={"tiny-bert": "0.5 GiB memory, 1.5 GiB needed"})
    found = go(made)
    assert (found[UNIT].state, found[UNIT].cause) == (UnitState.NOT_READY, "0.5 GiB memory, 1.5 GiB needed")


def test_a_host_that_refuses_its_units_ends_them_with_its_words(tmp_path: Path, connect: Connect) -> None:
    made = scene(tmp_path, ONE_UNIT)
    connect({"h01": FakeConnection([answer()], refuses=["no room"])})
    found = go(made)
    assert (found[UNIT].state, found[UNIT].cause) == (UnitState.FAILED, "no room")


def test_done_units_are_not_run_again_until_their_spec_changes(tmp_path: Path, connect: Connect) -> None:
    made = scene(tmp_path, ONE_UNIT)
    host = FakeConnection([answer(status(UNIT))])
    connect({"h01": host})
    go(made)
    bring_home(made)
    assert go(made)[UNIT].state is UnitState.DONE
    assert len(host.started) == 1
    go(made, quick=True)
    assert len(host.started) == 2
    assert handoff.plan(made.session).quick


def test_done_units_are_kept_when_only_fleets_folder_lies_elsewhere(tmp_path: Path, connect: Connect) -> None:
    made = scene(tmp_path, ONE_UNIT)
    host = FakeConnection([answer(status(UNIT))])
    connect({"h01": host})
    go(made)
    bring_home(made)
    moved = [replace(item, work_dir="/scratch/fleet") for item in handoff.readiness(made.session)]
    made.session.write(made.session.provision / "readiness.json", handoff.ReadinessFile(hosts=tuple(moved)))
    assert go(made)[UNIT].state is UnitState.DONE
    assert len(host.started) == 1
    assert handoff.plan(made.session).units[0].work_dir == "/scratch/fleet"


def test_the_same_run_is_the_same_but_for_the_folder(tmp_path: Path) -> None:
    (one,) = plan(scene(tmp_path, ONE_UNIT)).units
    assert handoff.same_run(one, replace(one, work_dir="/elsewhere"))
    assert not handoff.same_run(one, replace(one, user_conf="*.Offline.target_qps = 1\n", work_dir="/elsewhere"))
    assert not handoff.same_run(one, replace(one, quick=True))
    assert not handoff.same_run(one, replace(one, backend_options={"threads": 1}))


def test_a_controller_that_dies_before_its_plan_is_written_leaves_no_old_unit_for_a_new_one(
    tmp_path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scene(tmp_path, ONE_UNIT)
    host = FakeConnection([answer(status(UNIT))])
    connect({"h01": host})
    go(made)
    whole = handoff.plan(made.session)
    seen: list[UnitState] = []
    write = type(made.session).write

    def dies(session: Any, path: Path, value: Any) -> None:
        if path.name == "plan.json":
            seen.extend(item.state for item in handoff.records(made.session).values())
            raise KeyboardInterrupt
        write(session, path, value)

    with monkeypatch.context() as patch:
        patch.setattr(type(made.session), "write", dies)
        with pytest.raises(KeyboardInterrupt):
            go(made, quick=True)
    assert seen == [UnitState.PENDING]
    assert handoff.plan(made.session) == whole
    # Neither the old plan nor the new one takes the unit for done.
    assert handoff.records(made.session)[UNIT].state is UnitState.PENDING
    assert go(made, quick=True)[UNIT].state is UnitState.DONE
    assert len(host.started) == 2


def test_failed_units_are_run_again(tmp_path: Path, connect: Connect) -> None:
    made = scene(tmp_path, ONE_UNIT)
    host = FakeConnection([answer(status(UNIT, UnitState.FAILED, cause="x"))])
    connect({"h01": host})
    go(made)
    host.answers = [answer(status(UNIT))]
    assert go(made)[UNIT].state is UnitState.DONE
    assert len(host.started) == 2


def test_a_host_that_was_never_provisioned_gets_a_state(tmp_path: Path, connect: Connect) -> None:
    made = scene(tmp_path, ONE_UNIT)
    added = Host(name="h02", kind=HostKind.SERVER, connection="ssh", address="h02", entry=1)
    campaign_hosts = TWO.replace("name: tiny-bert", "name: tiny-bert, scenarios: [Offline], modes: [performance]")
    wider = scene(tmp_path / "2", campaign_hosts)
    made.session.write(made.session.inventory / "hosts.json", [*files.hosts(made.session), added])
    connect({"h01": FakeConnection([answer(status(UNIT))])})
    record = go(replace(made, campaign=wider.campaign))[UNIT.replace("h01", "h02")]
    assert (record.state, record.cause) == (UnitState.NOT_READY, "never provisioned: fleet provision")


def test_a_host_has_the_settings_of_its_own_entry(tmp_path: Path) -> None:
    entry = "{name: h02, kind: server, user_conf: {tiny-bert: {Offline: {target_qps: 99}}}}"
    units = plan(scene(tmp_path, ONE_UNIT.replace("kind: server}]", f"kind: server}}, {entry}]"))).units
    assert [spec.user_conf for spec in units] == ["", "*.Offline.target_qps = 99.0\n"]


def test_specs_name_the_scenario_in_user_conf(tmp_path: Path) -> None:
    text = MINIMAL.replace(
        "name: tiny-bert", "name: tiny-bert, scenarios: [Server], user_conf: {Server: {target_qps: 3}}"
    )
    (spec, _) = plan(scene(tmp_path, text)).units
    assert spec.scenario is Scenario.SERVER
    assert spec.user_conf == "*.Server.target_qps = 3.0\n"


def test_a_host_that_is_away_keeps_its_plan_and_what_it_measured(tmp_path: Path, connect: Connect) -> None:
    made = scene(tmp_path, ONE_UNIT, lock={"driver": "550.1"})
    connect({"h01": FakeConnection([answer(status(UNIT))])})
    go(made)
    bring_home(made)
    before = handoff.plan(made.session)
    away = [
        replace(item, state=HostState.UNREACHABLE, lock={}, work_dir="") for item in handoff.readiness(made.session)
    ]
    made.session.write(made.session.provision / "readiness.json", handoff.ReadinessFile(hosts=tuple(away)))
    watch = RecordingWatch()
    assert go(made, watch)[UNIT].state is UnitState.DONE
    assert handoff.plan(made.session) == before
    assert watch.notes == []


def test_a_changed_driver_is_measured_again_and_said(tmp_path: Path, connect: Connect) -> None:
    made = scene(tmp_path, ONE_UNIT, lock={"driver": "550.1"})
    connect({"h01": FakeConnection([answer(status(UNIT))])})
    go(made)
    bring_home(made)
    newer = [replace(item, lock={"driver": "560.2"}) for item in handoff.readiness(made.session)]
    made.session.write(made.session.provision / "readiness.json", handoff.ReadinessFile(hosts=tuple(newer)))
    watch = RecordingWatch()
    go(made, watch)
    assert watch.notes == [f"again: {UNIT}: driver 550.1 → 560.2"]
    (spec,) = handoff.plan(made.session).units
    assert (spec.lock, spec.attempt) == ({"driver": "560.2"}, 2)


def test_units_that_are_left_out_say_so_and_others_run(tmp_path: Path, connect: Connect) -> None:
    made = scene(tmp_path, ONE_UNIT.replace("kind: server}]", "kind: server}, {name: h02, kind: server}]"))
    connect({"h01": FakeConnection([answer(status(UNIT))])})
    found = run.run(
        made.session,
        made.campaign,
        RecordingWatch(),
        quick=False,
        bringer=lambda _: lambda *_: None,
        subset=Subset(exclude=("h02",)),
    )
    assert [(item.state, item.cause) for item in found] == [
        (UnitState.DONE, ""),
        (UnitState.LEFT_OUT, "--exclude h02"),
    ]
    connect({"h02": FakeConnection([answer(status(UNIT.replace("h01", "h02")))])})
    bring_home(made)
    assert {item.state for item in go(made).values()} == {UnitState.DONE}


def test_hosts_that_come_one_by_one_are_planned_as_they_come(tmp_path: Path, connect: Connect) -> None:
    made = scene(tmp_path, ONE_UNIT.replace("kind: server}]", "kind: server}, {name: h02, kind: server}]"))
    h02 = UNIT.replace("h01", "h02")
    connect({"h01": FakeConnection([answer(status(UNIT))]), "h02": FakeConnection([answer(status(h02))])})
    one, two = handoff.readiness(made.session)
    ready: run.Ready = queue.SimpleQueue()
    planned: dict[str, RunSpec] = {}

    def bringer(live: Mapping[str, RunSpec]) -> launch.Bring:
        return lambda _, __, record: planned.update({record.unit: live[record.unit]})

    for item in (replace(two, lock={"driver": "2"}), replace(one, lock={"driver": "1"}), None):
        ready.put(item)
    found = run.run(made.session, made.campaign, RecordingWatch(), quick=False, bringer=bringer, ready=ready)
    assert [(item.unit, item.state) for item in found] == [(UNIT, UnitState.DONE), (h02, UnitState.DONE)]
    assert [spec.lock for spec in handoff.plan(made.session).units] == [{"driver": "1"}, {"driver": "2"}]
    assert {unit: spec.lock for unit, spec in planned.items()} == {UNIT: {"driver": "1"}, h02: {"driver": "2"}}


def test_a_disk_that_is_full_while_hosts_are_handed_over_ends_the_run_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scene(tmp_path, ONE_UNIT)
    write = type(made.session).write
    plans: list[Path] = []

    def full(session: Any, path: Path, value: Any) -> None:
        if path.name == "plan.json":
            plans.append(path)
            if len(plans) > 1:
                raise OSError(28, "No space left on device", str(path))
        write(session, path, value)

    monkeypatch.setattr(type(made.session), "write", full)
    with pytest.raises(OSError, match="No space left"):
        go(made)
