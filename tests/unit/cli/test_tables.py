"""Rows that people read, from what stages found."""

from dataclasses import replace
from pathlib import Path

from fleet.cli import tables
from fleet.cloud.leases import LeaseState
from fleet.errors import ExitCode
from fleet.handoff import Attempt, Readiness, UnitRecord
from fleet.results.load import load
from fleet.results.records import SessionResults
from fleet.terms import HostState, Reason, UnitState
from tests.unit.results.session_files import ALL_FOUR, Host, Unit, build
from tests.unit.test_what_runs import lease

HOURS = 3600.0
LOST = Attempt(state=UnitState.UNREACHABLE, reason=Reason.UNREACHABLE, cause="no answer for 25 s", ended_at=1.0)


def rows(results: SessionResults) -> list[dict[str, str]]:
    """The results' table, without the columns of numbers."""
    columns, found = tables.results(results)
    return [
        {name: cell for name, cell in zip(columns, row, strict=True) if name in {"host", "verdict", "why", "remarks"}}
        for row in found
    ]


def test_each_benchmark_has_an_answer_per_host() -> None:
    found = [
        Readiness(
            host="gpu01",
            state=HostState.READY,
            cannot={"gptj-99": "NVIDIA T4 has 15.0 GiB, 22.3 GiB needed"},
            batches={"bert-99": 16},
            expected_s={"tiny-bert": 1800.0, "bert-99": 4 * HOURS, "gptj-99": 50 * HOURS},
        ),
        Readiness(host="small", state=HostState.NOT_READY, cannot={"bert-99": "2 GiB free"}, expected_s={"bert-99": 1}),
        Readiness(host="gone", state=HostState.UNREACHABLE, expected_s={"bert-99": 1.0}),
    ]
    assert tables.benchmarks(found) == (
        ["host", "benchmark", "answer", "time"],
        [
            ["gpu01", "tiny-bert", "runs", "about 30 min"],
            ["gpu01", "bert-99", "runs in batches of 16, for want of memory", "about 4.0 h"],
            ["gpu01", "gptj-99", "cannot: NVIDIA T4 has 15.0 GiB, 22.3 GiB needed", "-"],
            ["small", "bert-99", "cannot: 2 GiB free", "-"],
        ],
    )


def test_labels_stand_behind_a_units_name_whatever_became_of_it() -> None:
    failed = UnitRecord(
        unit="a.bert-99.Offline.performance", host="a", state=UnitState.FAILED, cause="x", labels=("random weights",)
    )
    assert tables.units([failed])[1] == [["a.bert-99.Offline.performance (random weights)", "failed", "x"]]


def test_a_units_reason_and_its_earlier_starts_are_told() -> None:
    killed = UnitRecord(
        unit="u", host="a", state=UnitState.FAILED, reason=Reason.OUT_OF_MEMORY, cause="SIGKILL", attempts=(LOST,)
    )
    waits = UnitRecord(unit="v", host="a", state=UnitState.PENDING, attempts=(LOST, LOST))
    stands = UnitRecord(unit="w", host="a", state=UnitState.DONE, later=(LOST,))
    assert tables.units([killed, waits, stands])[1] == [
        ["u", "failed (out-of-memory)", "SIGKILL; start 2; before: unreachable: no answer for 25 s"],
        ["v", "pending", "start 3; before: unreachable: no answer for 25 s; unreachable: no answer for 25 s"],
        ["w", "done", "later: unreachable: no answer for 25 s"],
    ]


def test_results_without_anything_to_remark_have_no_such_column(tmp_path: Path) -> None:
    results = load(build(tmp_path, [Host(name="a", units=ALL_FOUR)]))
    assert rows(results) == [{"host": "a", "verdict": "submittable", "why": ""}] * 2
    assert tables.results_code(results) is ExitCode.OK


def test_every_host_and_unit_has_its_row_with_state_reason_and_cause(tmp_path: Path) -> None:
    offline, single, *accuracy = ALL_FOUR
    hosts = [
        Host(name="a", warnings=("no swap",), units=(replace(offline, conditions={"battery": 9.0}), single, *accuracy)),
        Host(name="b", units=(replace(offline, state=UnitState.FAILED, reason=Reason.NO_SPACE, cause="disk full"),)),
        Host(name="c", units=(replace(offline, collected=False, attempts=(LOST,)), accuracy[0])),
        Host(name="d", state=HostState.LEFT_OUT, cause="--exclude d"),
        Host(name="e", units=(replace(offline, state=UnitState.RUNNING), replace(accuracy[0], state=UnitState.QUEUED))),
    ]
    results = load(build(tmp_path, hosts))
    assert rows(results) == [
        {
            "host": "a",
            "verdict": "submittable",
            "why": "",
            "remarks": "performance: on battery for 9 s; no swap",
        },
        {"host": "a", "verdict": "submittable", "why": "", "remarks": ""},
        {"host": "b", "verdict": "failed (no-space)", "why": "disk full", "remarks": ""},
        {
            "host": "c",
            "verdict": "performance: no result (corrupt-files)",
            "why": "not collected: files are missing or changed",
            "remarks": "performance: started 2 times; before: unreachable: no answer for 25 s",
        },
        {"host": "e", "verdict": "performance: running; accuracy: queued", "why": "", "remarks": ""},
        {"host": "d", "verdict": "left-out", "why": "--exclude d", "remarks": ""},
    ]
    assert tables.results_code(results) is ExitCode.MISSING


def code_of(tmp_path: Path, *hosts: Host) -> ExitCode:
    return tables.results_code(load(build(tmp_path, list(hosts))))


def test_the_exit_code_follows_the_sums(tmp_path: Path) -> None:
    whole, gone = Host(name="a", units=ALL_FOUR), Host(name="b", units=(Unit(collected=False),))
    away = Host(name="c", state=HostState.UNREACHABLE, units=ALL_FOUR)
    assert code_of(tmp_path / "away", whole, away) is ExitCode.OK
    assert code_of(tmp_path / "gone", whole, gone) is ExitCode.MISSING
    assert code_of(tmp_path / "out", whole, Host(name="d", state=HostState.LEFT_OUT)) is ExitCode.MISSING
    assert code_of(tmp_path / "bad", Host(name="a", units=(Unit(log="offline-invalid"),))) is ExitCode.INVALID


def test_instances_are_shown_with_the_end_of_their_lease_and_those_without_an_answer_too() -> None:
    asked_for = replace(lease("g5-1", "g5-2", state=LeaseState.INTENDED, hours=2), instances=())
    launched = lease("g5-3", hours=-1)
    ended = lease("g5-4", state=LeaseState.ENDED, ended=5.0)
    columns, rows = tables.leased([asked_for, launched, ended], asked_for.written_at)
    assert columns[:2] == ["host", "instance"]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("g5-1, g5-2", "not known", "asked for, no answer noted; ends in 2.0 h"),
        ("g5-3", "i-g5-3", "lease over for 60 min"),
        ("g5-4", "i-g5-4", "ended"),
    ]
