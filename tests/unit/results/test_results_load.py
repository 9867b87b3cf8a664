"""Session folders in, records out: nothing planned is ever missing."""

import json
from pathlib import Path

import pytest

from fleet.errors import SessionError
from fleet.results.load import load
from fleet.results.records import UnitResult
from fleet.session import Session
from fleet.terms import HostState, Mode, Reason, UnitState
from tests.unit.results.session_files import ALL_FOUR, Host, Unit, build, sign

UNIT = "a.tiny-bert.Offline.performance"


def one(session: Session) -> UnitResult:
    (unit,) = load(session).units
    return unit


def in_unit(session: Session, name: str) -> Path:
    return session.collect / "a" / UNIT / name


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return build(tmp_path, [Host(name="a", units=(Unit(),))])


def test_a_full_session(tmp_path: Path) -> None:
    found = load(build(tmp_path, [Host(name="a", units=ALL_FOUR), Host(name="b", units=ALL_FOUR)]))
    assert found.headline == "2 of 2 hosts, 8 of 8 units"
    assert all(unit.submittable for unit in found.units)
    assert {unit.system_id for unit in found.units} == {"a", "b"}
    assert all(unit.accuracy["F1"] == 87.4417 for unit in found.units if unit.mode is Mode.ACCURACY)
    assert found.systems[0].description["framework"] == "PyTorch 2.13.0"
    assert (found.submitter, found.division, found.round) == ("ExampleLab", "open", "v6.1")


def test_a_lost_host_keeps_its_place_and_its_units(tmp_path: Path) -> None:
    lost = Host(
        name="b",
        state=HostState.UNREACHABLE,
        cause="no answer within 15 s",
        units=(Unit(state=UnitState.UNREACHABLE, cause="no answer"),),
    )
    found = load(build(tmp_path, [Host(name="a", units=(Unit(),)), lost]))
    assert found.headline == "1 of 2 hosts, 1 of 2 units"
    system = next(system for system in found.systems if system.host == "b")
    assert (system.state, system.cause) == (HostState.UNREACHABLE, "no answer within 15 s")
    assert system.description == {}
    unit = next(unit for unit in found.units if unit.host == "b")
    assert (unit.state, unit.cause, unit.summary, unit.submittable) == (UnitState.UNREACHABLE, "no answer", None, False)


def test_before_the_run_every_unit_is_pending(session: Session) -> None:
    for path in (session.run / "units" / f"{UNIT}.json", session.collect / "collected.json"):
        path.unlink()
    assert one(session).state is UnitState.PENDING
    assert load(session).headline == "0 of 1 hosts, 0 of 1 units"


def test_done_but_not_collected_is_not_counted(session: Session) -> None:
    (session.collect / "collected.json").unlink()
    unit = one(session)
    assert (unit.state, unit.cause, unit.submittable) == (UnitState.DONE, "not collected", False)
    assert load(session).headline == "0 of 1 hosts, 0 of 1 units"


def test_a_host_that_was_planned_but_is_nowhere_is_shown(session: Session) -> None:
    session.write(session.inventory / "reachability.json", [])
    session.write(session.provision / "readiness.json", {"hosts": []})
    (system,) = load(session).systems
    assert (system.state, system.cause) == (HostState.FAILED, "no stage looked at it")
    session.write(session.inventory / "hosts.json", [])
    (system,) = load(session).systems
    assert (system.state, system.cause) == (HostState.FAILED, "planned, but in no inventory")


def test_without_readiness_reachability_counts(session: Session) -> None:
    (session.provision / "readiness.json").unlink()
    assert load(session).systems[0].kind == "laptop"


@pytest.mark.parametrize("name", ["manifest.json", "mlperf_log_detail.txt"])
def test_a_file_that_vanished_is_the_units_cause(session: Session, name: str) -> None:
    in_unit(session, name).unlink()
    unit = one(session)
    assert unit.cause == f"collected, but {name} is missing"
    assert not unit.measured


def test_a_broken_log_is_the_units_cause(session: Session) -> None:
    in_unit(session, "mlperf_log_detail.txt").write_text(":::MLLOG {oops\n")
    sign(session.collect / "a" / UNIT)
    assert "line 1 is not JSON" in one(session).cause
    assert one(session).reason is Reason.CORRUPT_FILES


def test_a_broken_manifest_is_the_units_cause(session: Session) -> None:
    in_unit(session, "manifest.json").write_text("{}")
    assert one(session).cause.startswith("collected, but collect/a/")


def test_a_link_out_of_the_session_is_not_followed(session: Session, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    path = in_unit(session, "mlperf_log_detail.txt")
    path.replace(outside)
    path.symlink_to(outside)
    assert one(session).cause == "collected, but mlperf_log_detail.txt points outside the session"


def test_a_folder_outside_collect_is_refused(session: Session) -> None:
    entry = {"folder": "../elsewhere", "complete": True, "cause": ""}
    session.write(session.collect / "collected.json", {"units": {UNIT: entry}})
    assert one(session).cause == "collected, but '../elsewhere' is not inside collect/"


def test_a_giant_log_is_refused(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.results.home.MAX_FILE_BYTES", 10)
    assert "more than 10" in one(session).cause


def test_an_invalid_run_has_its_reasons_as_cause(tmp_path: Path) -> None:
    found = load(build(tmp_path, [Host(name="a", units=(Unit(log="offline-invalid"),))]))
    assert found.units[0].cause.startswith("INVALID: minimum duration not met")
    assert found.headline == "1 of 1 hosts, 1 of 1 units · 1 INVALID"


def test_a_quick_session_says_so(tmp_path: Path) -> None:
    found = load(build(tmp_path, [Host(name="a", units=(Unit(log="offline-quick"),))], quick=True))
    assert found.headline.endswith("quick run, not submittable")
    assert found.units[0].not_submittable_because == ("quick run", "min_duration 4 s, the round wants 600 s")


def test_accuracy_that_differs_from_the_manifest_is_refused(tmp_path: Path) -> None:
    unit = Unit(mode=Mode.ACCURACY, log="offline-accuracy")
    session = build(tmp_path, [Host(name="a", units=(unit,))])
    path = next(session.collect.glob("a/*/manifest.json"))
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"accuracy": {"F1": 99.0}}))
    assert one(session).not_submittable_because == ("accuracy.txt and manifest.json disagree",)


def test_labels_of_plan_and_host_are_both_shown(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a", units=(Unit(labels=("random weights",)),))])
    assert one(session).labels == ("demo model", "random weights")


def test_unreadable_facts_do_not_lose_the_host(session: Session) -> None:
    (session.provision / "facts" / "a.json").write_text('{"hostname": 3}')
    (system,) = load(session).systems
    assert system.description == {}
    assert "provision/facts/a.json" in system.cause


def test_notes_reach_the_description(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a", units=(Unit(),))], notes={"cooling": "air", "system_name": "My Box"})
    (system,) = load(session).systems
    assert (system.system_id, system.description["cooling"]) == ("My-Box", "air")
    assert system.notes["cooling"] == "air"


def test_without_a_plan_the_next_step_is_named(session: Session) -> None:
    (session.run / "plan.json").unlink()
    with pytest.raises(SessionError, match=r"run/plan\.json") as caught:
        load(session)
    assert caught.value.hint
