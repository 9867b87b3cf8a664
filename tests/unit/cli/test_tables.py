"""Rows that people read, from what stages found."""

from fleet.cli import tables
from fleet.handoff import Readiness, UnitRecord
from fleet.terms import HostState, UnitState

HOURS = 3600.0


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
