"""Who is missing and why, what was started again, what is doubtful: nothing of it is ever swallowed."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fleet import handoff
from fleet.handoff import Attempt
from fleet.results.export import export, units_frame
from fleet.results.load import load
from fleet.results.records import SessionResults, missing_as
from fleet.session import Session
from fleet.terms import HostState, Reason, UnitState
from tests.unit.results.session_files import ALL_FOUR, Host, Unit, build, facts, sign

DETAIL = "mlperf_log_detail.txt"
LOST = Attempt(state=UnitState.UNREACHABLE, reason=Reason.UNREACHABLE, cause="no answer for 25 s", ended_at=1.0)
KILLED = Attempt(state=UnitState.FAILED, reason=Reason.OUT_OF_MEMORY, cause="killed by SIGKILL", ended_at=2.0)


def unit_folder(session: Session) -> Path:
    (path,) = session.collect.glob("a/*")
    return path


def missing(results: SessionResults) -> dict[str, tuple[str, str]]:
    return {system.host: (missing_as(system), system.cause) for system in results.missing_hosts}


def test_a_host_that_is_away_now_is_not_missing_when_all_is_home(tmp_path: Path) -> None:
    away = Host(name="a", state=HostState.UNREACHABLE, cause="no route", units=ALL_FOUR)
    found = load(build(tmp_path, [away]))
    assert found.headline == "1 of 1 hosts, 4 of 4 units"
    assert missing(found) == {}
    (system,) = found.systems
    assert (system.state, system.reason) == (HostState.UNREACHABLE, Reason.NONE)
    assert system.warnings == ("unreachable when last asked (no route); all its units are home",)


def test_a_ready_host_that_lacks_a_unit_is_missing_with_the_units_cause(tmp_path: Path) -> None:
    late = dataclasses.replace(ALL_FOUR[0], state=UnitState.TIMEOUT, reason=Reason.TIMEOUT, cause="stopped after 30 s")
    gone = dataclasses.replace(ALL_FOUR[1], collected=False, collect_cause="the transfer broke off")
    found = load(build(tmp_path, [Host(name="a", units=(late, gone, *ALL_FOUR[2:])), Host(name="b", units=ALL_FOUR)]))
    assert found.headline == "1 of 2 hosts, 6 of 8 units"
    (state, cause) = missing(found)["a"]
    assert state == "incomplete"
    assert cause.startswith(
        "2 of 4 units; timeout: stopped after 30 s; no result (corrupt-files): not collected: the transfer broke off"
    )
    assert found.systems[0].reason is Reason.TIMEOUT


def test_no_number_comes_from_a_unit_whose_instance_was_taken_back(tmp_path: Path) -> None:
    notice = "spot interruption notice, action terminate at 2026-11-25T05:02:00Z"
    # All its files are at home and whole, as an earlier start may leave them, or a host that lies.
    taken = [
        dataclasses.replace(unit, state=UnitState.INTERRUPTED, reason=Reason.INTERRUPTED, cause=notice)
        for unit in ALL_FOUR
    ]
    session = build(tmp_path, [Host(name="a", units=tuple(taken)), Host(name="b", units=ALL_FOUR)])
    found = load(session)
    assert found.headline == "1 of 2 hosts, 4 of 8 units"
    for unit in found.units[:4]:
        assert (unit.state, unit.reason, unit.cause) == (UnitState.INTERRUPTED, Reason.INTERRUPTED, notice)
        assert (unit.summary, unit.accuracy, unit.submittable, unit.measured) == (None, {}, False, False)
        assert unit.not_submittable_because[0] == f"interrupted: {notice}"
    frame = units_frame(found)
    for number in ("value", "latency_p99_ms", "F1", "queries", "valid"):
        assert frame[frame["host"] == "a"][number].isna().all()
        assert frame[frame["host"] == "b"][number].notna().any()


def test_hosts_that_were_left_out_are_missing_with_their_cause(tmp_path: Path) -> None:
    out = dataclasses.replace(ALL_FOUR[0], state=UnitState.LEFT_OUT, cause="--limit a")
    hosts = [Host(name="a", units=ALL_FOUR), Host(name="b", state=HostState.LEFT_OUT, cause="--limit a", units=(out,))]
    found = load(build(tmp_path, hosts))
    assert found.headline == "1 of 2 hosts, 4 of 5 units"
    assert missing(found) == {"b": ("left-out", "--limit a")}
    assert [unit.outcome for unit in found.missing_units] == ["left-out"]
    assert found.missing_units[0].starts == 0


def test_a_host_without_units_is_missing(tmp_path: Path) -> None:
    assert missing(load(build(tmp_path, [Host(name="a")]))) == {"a": ("incomplete", "no unit was planned for it")}


def test_a_host_that_was_lost_while_it_ran_says_so(tmp_path: Path) -> None:
    unit = Unit(state=UnitState.UNREACHABLE, cause="no answer")
    session = build(tmp_path, [Host(name="a", units=(unit,)), Host(name="b", units=ALL_FOUR)])
    for host in ("a", "b"):
        lost = {
            "host": host,
            "state": "unreachable",
            "cause": "no answer for 25 s",
            "since": 1.0,
            "last_answer_at": 0.5,
        }
        session.write(session.run / "hosts" / f"{host}.json", lost)
    found = load(session)
    # b was lost after all of it was home
    assert missing(found) == {"a": ("unreachable", "no answer for 25 s")}
    assert found.systems[0].reason is Reason.UNREACHABLE
    assert found.systems[1].warnings == ()


@pytest.mark.parametrize(
    ("state", "said", "reason"),
    [
        (UnitState.FAILED, Reason.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY),
        (UnitState.FAILED, Reason.NONE, Reason.OTHER),
        (UnitState.TIMEOUT, Reason.NONE, Reason.TIMEOUT),
        (UnitState.UNREACHABLE, Reason.NONE, Reason.UNREACHABLE),
        (UnitState.INTERRUPTED, Reason.CANCELLED, Reason.CANCELLED),
        (UnitState.LEFT_OUT, Reason.NONE, Reason.NONE),
    ],
)
def test_every_end_has_its_reason(tmp_path: Path, state: UnitState, said: Reason, reason: Reason) -> None:
    found = load(build(tmp_path, [Host(name="a", units=(Unit(state=state, reason=said, cause="x"),))]))
    assert found.units[0].reason is reason


def test_an_invalid_result_has_its_reason(tmp_path: Path) -> None:
    found = load(build(tmp_path, [Host(name="a", units=(Unit(log="offline-invalid"),))]))
    assert (found.units[0].reason, found.units[0].outcome) == (Reason.INVALID_RESULT, "done (invalid-result)")


def test_what_lies_at_home_of_a_unit_that_was_started_again_is_no_number(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a", units=(Unit(),))])
    (path,) = (session.run / "units").glob("*.json")
    record = {"unit": path.stem, "host": "a", "state": "failed", "cause": "x"}
    session.write(path, record)
    (unit,) = load(session).units
    assert (unit.summary, unit.accuracy, unit.measured) == (None, {}, False)


def test_earlier_starts_are_told_with_their_causes(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a", units=(Unit(attempts=(LOST, KILLED)),))])
    (unit,) = load(session).units
    assert unit.measured
    assert unit.starts == 3
    assert unit.history == (
        "started 3 times; before: unreachable: no answer for 25 s; failed (out-of-memory): killed by SIGKILL"
    )


def test_a_number_stands_while_nobody_knows_what_a_further_start_came_to(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a", units=(Unit(log="offline-invalid"),))])
    (best,) = handoff.records(session).values()
    invalid = Attempt(state=UnitState.DONE, reason=Reason.INVALID_RESULT, cause="INVALID: too short", ended_at=1.0)
    record = dataclasses.replace(
        best, state=LOST.state, reason=LOST.reason, cause=LOST.cause, attempts=(invalid,), best=best
    )
    session.write(session.run / "units" / f"{best.unit}.json", record)
    (unit,) = load(session).units
    assert (unit.state, unit.invalid, unit.measured) == (UnitState.DONE, True, True)
    assert unit.history == "started 2 times; later: unreachable: no answer for 25 s"
    # Only told: the session itself waits for its host.
    assert handoff.records(session) == {best.unit: record}


def test_a_start_that_came_to_nothing_after_the_number_is_a_later_one(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a", units=(Unit(later=(KILLED,)),))])
    (unit,) = (results := load(session)).units
    assert unit.starts == 2
    assert unit.history == "started 2 times; later: failed (out-of-memory): killed by SIGKILL"
    (row,) = (row for _, row in units_frame(results).iterrows())
    assert (row["starts"], row["earlier_causes"]) == (2, "later: failed (out-of-memory): killed by SIGKILL")


def test_conditions_become_warnings_unless_ignored(tmp_path: Path) -> None:
    seen = {"battery": 31.4, "sleep": 0.0, "thermal": 0.3, "gremlins": 5.0}
    session = build(tmp_path, [Host(name="a", units=(Unit(conditions=seen),), warnings=("no swap",))])
    found = load(session)
    assert found.units[0].warnings == ("on battery for 31 s", "throttled by heat for less than 1 s")
    assert found.systems[0].warnings == ("no swap",)
    assert found.warnings == (
        ("a", "no swap"),
        ("a.tiny-bert.Offline.performance", "on battery for 31 s"),
        ("a.tiny-bert.Offline.performance", "throttled by heat for less than 1 s"),
    )
    plan = session.read(session.run / "plan.json", dict[str, Any])
    plan["units"][0]["conditions"] = {"battery": "ignore"}
    session.write(session.run / "plan.json", plan)
    assert load(session).units[0].warnings == ("throttled by heat for less than 1 s",)


@pytest.mark.parametrize(
    ("ran", "named"),
    [
        ({"lock": {"driver": "550.1", "fleet": "ab"}}, "driver 550.1 → none, fleet ab → none"),
        ({"user_conf": "*.Offline.target_qps = 3\n" * 9}, "user_conf changed"),
        (
            {"lock": {"cuda": "v" * 200, "driver": "f" * 64, "weights": "a"}, "sample_count": 3},
            "cuda changed, driver ffffffffffff → none, sample_count 3 → 10833",
        ),
        (
            {"lock": {f"wheel:{number}": "1" for number in range(8)}},
            "0 1 → none, 1 1 → none, 2 1 → none, 3 1 → none, 4 1 → none, 5 1 → none, and 2 more",
        ),
    ],
)
def test_another_lock_than_the_plans_is_not_measured(tmp_path: Path, ran: dict[str, Any], named: str) -> None:
    (unit,) = load(build(tmp_path, [Host(name="a", units=(Unit(ran=ran),))])).units
    assert (unit.state, unit.measured, unit.reason) == (UnitState.DONE, False, Reason.LOCK_CHANGED)
    assert unit.cause == f"it ran under another lock than is planned now: {named}"
    assert unit.outcome == "no result (lock-changed)"
    assert not unit.submittable


@pytest.mark.parametrize(
    ("home", "cause", "reason"),
    [
        (
            {"cause": "it ran by another spec", "reason": "lock-changed"},
            "it ran under another lock than is planned now: driver 1 → none",
            Reason.LOCK_CHANGED,
        ),
        # Files of an earlier attempt are still there: their lock is not why this one is not home.
        (
            {"cause": "the transfer broke off", "reason": "unreachable"},
            "not collected: the transfer broke off",
            Reason.UNREACHABLE,
        ),
        (
            {"cause": "user.conf is not in the manifest"},
            "not collected: user.conf is not in the manifest",
            Reason.CORRUPT_FILES,
        ),
        ({"folder": "", "cause": ""}, "not collected: files are missing or changed", Reason.OTHER),
    ],
)
def test_what_collect_found_wrong_is_the_cause(
    tmp_path: Path, home: dict[str, str], cause: str, reason: Reason
) -> None:
    session = build(tmp_path, [Host(name="a", units=(Unit(ran={"lock": {"driver": "1"}}),))])
    folder = unit_folder(session)
    entry = {"folder": folder.relative_to(session.root).as_posix(), "complete": False} | home
    session.write(session.collect / "collected.json", {"units": {folder.name: entry}})
    (unit,) = load(session).units
    assert (unit.cause, unit.reason, unit.measured) == (cause, reason, False)


def test_what_no_number_depends_on_may_differ(tmp_path: Path) -> None:
    ran = {"work_dir": "/elsewhere", "attempt": 3, "start": {"target_qps": 2.0}, "deadline_s": 1.0, "expected_s": 1.0}
    (unit,) = load(build(tmp_path, [Host(name="a", units=(Unit(ran=ran),))])).units
    assert unit.measured


@pytest.mark.parametrize("bytes_left", [100_000, 5_000, 1, 0])
def test_a_log_that_its_host_cut_off_is_a_cause(tmp_path: Path, bytes_left: int) -> None:
    session = build(tmp_path, [Host(name="a", units=(Unit(),))])
    path = unit_folder(session) / DETAIL
    content = path.read_bytes()
    path.write_bytes(content[: min(bytes_left, len(content) - 1)])
    sign(unit_folder(session))
    (unit,) = load(session).units
    assert (unit.measured, unit.reason) == (False, Reason.CORRUPT_FILES)
    assert unit.cause.startswith(f"collected, but {DETAIL}")


@pytest.mark.parametrize("name", [DETAIL, "mlperf_log_summary.txt", "user.conf"])
def test_a_file_that_was_cut_off_at_home_is_a_cause(tmp_path: Path, name: str) -> None:
    session = build(tmp_path, [Host(name="a", units=(Unit(),))])
    path = unit_folder(session) / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    (unit,) = load(session).units
    assert unit.cause == f"collected, but {name} is cut off: {size - 1} bytes, the manifest says {size}"
    assert (unit.measured, unit.reason) == (False, Reason.CORRUPT_FILES)


def test_a_file_of_the_right_size_that_was_changed_is_a_cause(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a", units=(Unit(),))])
    path = unit_folder(session) / DETAIL
    path.write_bytes(path.read_bytes().replace(b'"VALID"', b'"VALIE"'))
    (unit,) = load(session).units
    assert unit.cause == f"collected, but {DETAIL} was changed: its sha256 is not the manifest's"


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a", units=(Unit(),))])
    path = unit_folder(session) / "manifest.json"
    path.write_text(path.read_text().replace('"user.conf"', '"../../../campaign.yml"'), encoding="utf-8")
    assert load(session).units[0].cause == "collected, but its manifest names '../../../campaign.yml'"


def test_two_hosts_with_one_machine_id_are_two_systems_and_say_so(tmp_path: Path) -> None:
    hosts = [Host(name=name, machine_id=key * 32, units=ALL_FOUR) for name, key in (("a", "1"), ("b", "1"), ("c", "2"))]
    found = load(build(tmp_path, hosts))
    assert found.headline == "3 of 3 hosts, 12 of 12 units"
    assert len({system.system_id for system in found.systems}) == 3
    assert [bool(system.warnings) for system in found.systems] == [True, True, False]
    assert found.systems[0].warnings[0].startswith("shares its machine-id with b: ")


def test_clones_with_gpus_of_their_own_are_told_apart(tmp_path: Path) -> None:
    hosts = [
        Host(name="a", machine_id="1" * 32, units=ALL_FOUR),
        Host(name="b", machine_id="1" * 32, facts="epyc-2-sockets-8-gpus", units=ALL_FOUR),
    ]
    assert all(system.warnings == () for system in load(build(tmp_path, hosts)).systems)


def test_one_hostname_makes_two_systems_without_a_warning(tmp_path: Path) -> None:
    # Both fixtures carry the hostname that was recorded with the facts.
    found = load(build(tmp_path, [Host(name="a", units=ALL_FOUR), Host(name="b", units=ALL_FOUR)]))
    assert {system.system_id for system in found.systems} == {"a", "b"}
    assert all(system.warnings == () for system in found.systems)


def test_tables_hold_reasons_starts_warnings_and_hosts(tmp_path: Path) -> None:
    hosts = [
        Host(name="a", units=(Unit(attempts=(LOST,), conditions={"battery": 31.0}),), warnings=("no swap",)),
        Host(name="b", units=(Unit(state=UnitState.FAILED, reason=Reason.NO_SPACE, cause="disk full"),)),
    ]
    session = build(tmp_path, hosts)
    results = load(session)
    export(session, results)
    assert session.read(session.results / "results.json", SessionResults) == results
    one, two = (row for _, row in units_frame(results).iterrows())
    assert (one["starts"], one["earlier_causes"]) == (2, "unreachable: no answer for 25 s")
    assert (one["warnings"], one["host_warnings"]) == ("on battery for 31 s", "no swap")
    assert (two["reason"], two["starts"], two["earlier_causes"]) == ("no-space", 1, "")
    assert (two["host_state"], two["host_reason"]) == ("ready", "no-space")
    assert two["host_cause"] == "0 of 1 units; failed (no-space): disk full"


def measured_by(session: Session, *instances: str) -> None:
    """Say which instance each unit of the plan was started on."""
    plan = handoff.plan(session)
    specs = tuple(dataclasses.replace(spec, instance=name) for spec, name in zip(plan.units, instances, strict=True))
    session.write(session.run / "plan.json", dataclasses.replace(plan, units=specs))


def test_a_system_is_described_by_the_instance_that_measured_and_not_by_its_successor(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a", kind="ec2", facts="laptop-hybrid-cores", units=ALL_FOUR)])
    measured_by(session, *["i-1"] * 4)
    session.write(handoff.facts_of(session, "i-1"), facts("aws-g5-xlarge"))
    (system,) = load(session).systems
    assert "A10G" in system.description["accelerator_model_name"]
    assert system.warnings == ()


def test_units_of_several_instances_under_one_name_are_said_with_the_number(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a", kind="ec2", facts="aws-g5-xlarge", units=ALL_FOUR)])
    measured_by(session, "i-1", "i-2", "i-2", "i-2")
    (system,) = load(session).systems
    assert system.warnings == ("measured on 2 instances of one type, units of each: i-1 (1), i-2 (3)",)
