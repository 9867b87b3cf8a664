import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from fleet.errors import SubmissionError
from fleet.handoff import Attempt
from fleet.results.records import Cost, Price
from fleet.submission import build as build_module
from fleet.submission.build import build
from fleet.submission.check import check
from fleet.submission.layout import LAYOUTS, SubmissionLayout, safe_name
from fleet.submission.select import select
from fleet.submission.truncate import truncate
from fleet.terms import HostState, Reason, Scenario, UnitState

from . import example

SS, SS_ACC = "alpha.tiny-bert.SingleStream.performance", "alpha.tiny-bert.SingleStream.accuracy"


def test_a_full_session_becomes_a_tree_with_no_findings(tmp_path: Path) -> None:
    session, results = example.make(tmp_path)
    built = build(session, results)
    assert built.systems == ("alpha", "beta")
    assert (built.scenario_count, built.performance_results, built.left) == (4, 4, ())
    home = session.submission / "open" / "ExampleLab"
    files = sorted(p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file())
    one = "results/alpha/tiny-bert/Offline"
    assert [f for f in files if f.startswith(one)] == [
        f"{one}/README.md",
        f"{one}/accuracy/accuracy.txt",
        f"{one}/accuracy/mlperf_log_accuracy.json",
        f"{one}/accuracy/mlperf_log_detail.txt",
        f"{one}/accuracy/mlperf_log_summary.txt",
        f"{one}/measurements.json",
        f"{one}/performance/run_1/mlperf_log_detail.txt",
        f"{one}/performance/run_1/mlperf_log_summary.txt",
        f"{one}/user.conf",
    ]
    assert json.loads((home / "model_mapping.json").read_text()) == {"tiny-bert": "bert-99"}
    assert "mlcommons-loadgen==6.0.17" in (home / "src/tiny-bert/README.md").read_text()
    assert (home / "documentation/README.md").read_text().splitlines()[0] == results.headline
    assert check(session, example.ROUND) == ()
    assert sorted(p.name for p in session.root.iterdir()) == ["campaign.yml", "collect", "session.json", "submission"]


def test_building_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    session, results = example.make(tmp_path)
    trees = []
    for _ in range(2):
        build(session, results)
        trees.append({p: p.read_bytes() for p in session.submission.rglob("*") if p.is_file()})
    assert trees[0] == trees[1]


def test_collected_files_are_never_changed(tmp_path: Path) -> None:
    session, results = example.make(tmp_path)
    before = {p: p.read_bytes() for p in session.collect.rglob("*") if p.is_file()}
    build(session, results)
    assert before == {p: p.read_bytes() for p in session.collect.rglob("*") if p.is_file()}


def test_a_partial_fleet_says_so_first_and_names_the_cause(tmp_path: Path) -> None:
    session, results = example.make(tmp_path)
    for unit in results.units:
        if unit.host == "beta":
            results = example.change(results, unit.unit, state=UnitState.UNREACHABLE, cause="ssh timed out")
    gone = dataclasses.replace(results.systems[1], state=HostState.UNREACHABLE, cause="no route to host")
    results = dataclasses.replace(results, systems=(results.systems[0], gone))
    built = build(session, results)
    text = (session.submission / "open/ExampleLab/documentation/README.md").read_text()
    assert text.splitlines()[0] == "1 of 2 hosts, 4 of 8 units"
    assert "- beta: unreachable: no route to host" in text
    assert "- alpha:" not in text.partition("## Hosts that are missing")[2].partition("## Units")[0]
    assert text.count("unreachable: ssh timed out") == 4
    assert built.systems == ("alpha",)
    assert not (session.submission / "open/ExampleLab/systems/beta.json").exists()
    assert len(built.left) == 4


def test_a_host_that_is_away_now_is_not_missing_when_all_is_home(tmp_path: Path) -> None:
    session, results = example.make(tmp_path)
    away = dataclasses.replace(results.systems[1], state=HostState.UNREACHABLE, cause="no route to host")
    build(session, dataclasses.replace(results, systems=(results.systems[0], away)))
    text = (session.submission / "open/ExampleLab/documentation/README.md").read_text()
    assert text.splitlines()[0] == "2 of 2 hosts, 8 of 8 units"
    assert "## Hosts that are missing\n\nnone\n" in text


def test_a_host_that_lacks_one_unit_is_missing_though_it_is_ready(tmp_path: Path) -> None:
    session, results = example.make(tmp_path)
    results = example.change(results, SS, state=UnitState.TIMEOUT, reason=Reason.TIMEOUT, cause="late")
    build(session, results)
    text = (session.submission / "open/ExampleLab/documentation/README.md").read_text()
    assert text.splitlines()[0] == "1 of 2 hosts, 7 of 8 units"
    assert "- alpha: incomplete: " in text
    assert f"- {SS}: timeout: late" in text


def test_warnings_and_earlier_starts_are_in_the_notes(tmp_path: Path) -> None:
    session, results = example.make(tmp_path)
    lost = Attempt(state=UnitState.UNREACHABLE, reason=Reason.UNREACHABLE, cause="no answer for 25 s", ended_at=1.0)
    results = example.change(results, SS, warnings=("on battery for 31 s",), attempts=(lost,))
    doubt = dataclasses.replace(results.systems[0], warnings=("KillUserProcesses=yes",))
    build(session, dataclasses.replace(results, systems=(doubt, results.systems[1])))
    home = session.submission / "open/ExampleLab"
    whole = (home / "documentation/README.md").read_text()
    assert f"- {SS}: started 2 times; before: unreachable: no answer for 25 s" in whole
    assert f"- {SS}: on battery for 31 s" in whole
    assert "- alpha: KillUserProcesses=yes" in whole
    one = (home / "results/alpha/tiny-bert/SingleStream/README.md").read_text()
    assert "- performance unit: warning: on battery for 31 s" in one
    assert "- performance unit: started 2 times; before: unreachable: no answer for 25 s" in one
    assert "- warning: KillUserProcesses=yes" in one
    other = (home / "results/beta/tiny-bert/SingleStream/README.md").read_text()
    assert "warning" not in other


def test_what_it_cost_is_in_the_notes_and_nothing_where_nobody_knows(tmp_path: Path) -> None:
    session, results = example.make(tmp_path)
    build(session, results)
    notes = session.submission / "open/ExampleLab/documentation/README.md"
    assert "cost" not in notes.read_text()
    price = Price(usd_per_hour=1.006, source="pricing-api 2026-11-25", market="on-demand")
    results = example.change(results, SS, price=price, usd_per_million=2.5, million_of="samples")
    cost = Cost(
        usd=3.1, instances_usd=3.1, own_usd=0.0, measured_usd=2.0, besides_usd=0.1, besides_source="table 2026-08-17",
        instances=1, open=(), unpriced=("beta",),
    )  # fmt: skip
    build(session, dataclasses.replace(results, cost=cost))
    text = notes.read_text()
    assert "not an MLPerf metric, not verified by MLCommons Association" in text
    assert "- $3.10, of which units ran for $2.00" in text
    assert "- without a price, so not in the sum: beta" in text
    said = "$2.50 / M samples at $1.006 an hour (on-demand, pricing-api 2026-11-25)"
    assert f"- alpha: tiny-bert SingleStream: {said}" in text
    assert "beta: tiny-bert" not in text.partition("## What it cost")[2]
    assert check(session, example.ROUND) == ()


@pytest.mark.parametrize(("division", "entries"), [("open", 4), ("closed", 0)])
def test_the_open_division_takes_any_scenario(tmp_path: Path, division: str, entries: int) -> None:
    session, results = example.make(tmp_path)
    for unit in (SS, SS_ACC):
        results = example.change(results, unit, scenario=Scenario.SERVER)
    selection = select(dataclasses.replace(results, division=division), session.root)
    assert len(selection.entries) == entries


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"state": UnitState.FAILED, "cause": "out of memory"}, "failed: out of memory"),
        ({"labels": ("random weights",)}, "labelled 'random weights': never submitted"),
        ({"labels": ("simulated",)}, "labelled 'simulated': never submitted"),
        ({"backend": "null"}, "backend null computes nothing: never submitted"),
        ({"submittable": False, "not_submittable_because": ("INVALID: too short",)}, "INVALID: too short"),
        ({"summary": None, "cause": "not collected"}, "no result: not collected"),
        ({"summary": None, "reason": Reason.LOCK_CHANGED, "cause": "driver 1 → 2"}, "no result (lock-changed): driver"),
        ({"folder": ""}, "nothing came home from its host"),
        ({"folder": "collect/nowhere"}, "files missing: mlperf_log_summary.txt, mlperf_log_detail.txt, user.conf"),
        ({"model": {}}, "its manifest does not say: input_data_types, retraining, starting_weights_filename"),
        ({"benchmark": "bert-100"}, "benchmark 'bert-100': unknown; there are"),
    ],
)
def test_a_scenario_goes_in_only_with_both_its_runs(tmp_path: Path, values: dict[str, object], reason: str) -> None:
    session, results = example.make(tmp_path)
    selection = select(example.change(results, SS, **values), session.root)
    left = {one.unit: one.reason for one in selection.left}
    assert left.keys() == {SS, SS_ACC}
    assert reason in left[SS]
    assert left[SS_ACC] == "the performance unit of tiny-bert SingleStream on alpha is missing"
    assert len(selection.entries) == 3


def test_nothing_to_submit_is_an_error_with_every_reason_and_the_old_tree_stays(tmp_path: Path) -> None:
    session, results = example.make(tmp_path)
    build(session, results)
    for unit in results.units:
        results = example.change(results, unit.unit, state=UnitState.TIMEOUT, cause=f"late {unit.unit}")
    with pytest.raises(SubmissionError) as caught:
        build(session, results)
    assert all(f"late {unit.unit}" in caught.value.message for unit in results.units)
    assert check(session, example.ROUND) == ()


def test_a_build_that_breaks_leaves_the_old_tree_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, results = example.make(tmp_path)
    build(session, results)
    before = sorted(session.root.rglob("*"))

    def broken(_: Path) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(build_module, "truncate", broken)
    with pytest.raises(OSError, match="disk full"):
        build(session, results)
    assert sorted(session.root.rglob("*")) == before


def test_a_killed_build_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    session, results = example.make(tmp_path)
    build(session, results)
    session.submission.rename(session.root / ".submission-old")
    (session.root / ".submission-abc").mkdir()
    build(session, results)
    assert not list(session.root.glob(".submission*"))


def test_hosts_that_share_a_system_id_are_represented_by_one(tmp_path: Path) -> None:
    session, results = example.make(tmp_path)
    units = tuple(dataclasses.replace(u, system_id="fleet-node") for u in results.units)
    systems = tuple(dataclasses.replace(s, system_id="fleet-node") for s in results.systems)
    results = dataclasses.replace(results, units=units, systems=systems)
    results = example.change(results, SS, state=UnitState.FAILED, cause="x")
    built = build(session, results)
    assert built.systems == ("fleet-node",)
    assert built.performance_results == 2
    assert sum("host beta stands for system fleet-node" in left.reason for left in built.left) == 2
    assert len(built.left) == 4


@pytest.mark.parametrize("name", ["Example Lab", ".hidden", "a/b", "", "..", "Ex\u00e4mple"])
def test_names_that_cannot_be_folders_are_refused_with_one_that_can(tmp_path: Path, name: str) -> None:
    session, results = example.make(tmp_path)
    with pytest.raises(SubmissionError) as caught:
        build(session, dataclasses.replace(results, submitter=name))
    better = caught.value.hint.split()[2]
    assert safe_name(better, "submitter") == better


def test_a_link_among_collected_files_is_not_followed(tmp_path: Path) -> None:
    session, results = example.make(tmp_path)
    secret = tmp_path / "secret"
    secret.write_text("x")
    conf = session.root / results.units[0].folder / "user.conf"
    conf.unlink()
    conf.symlink_to(secret)
    built = build(session, results)
    assert any("files missing: user.conf" in left.reason for left in built.left)


def test_truncation_keeps_both_ends_and_the_checksum_and_can_be_repeated(tmp_path: Path) -> None:
    full = example.accuracy_log()
    (tmp_path / "mlperf_log_accuracy.json").write_bytes(full)
    (tmp_path / "accuracy.txt").write_text(example.ACCURACY_TXT)
    digest = truncate(tmp_path)
    log, text = (tmp_path / n for n in ("mlperf_log_accuracy.json", "accuracy.txt"))
    assert digest == hashlib.sha256(full).hexdigest()
    assert log.read_bytes() == full[:4096] + b"\n\n...\n\n" + full[-4096:]
    assert text.read_text() == f"{example.ACCURACY_TXT}\nhash={digest}\n"
    assert truncate(tmp_path) == digest
    assert log.stat().st_size == 8199
    assert text.read_text().count("hash=") == 1


def test_a_small_accuracy_log_stays_whole(tmp_path: Path) -> None:
    (tmp_path / "mlperf_log_accuracy.json").write_text("[]")
    (tmp_path / "accuracy.txt").write_text("")
    truncate(tmp_path)
    assert (tmp_path / "mlperf_log_accuracy.json").read_text() == "[]"
    (tmp_path / "accuracy.txt").unlink()
    with pytest.raises(SubmissionError, match=r"accuracy\.txt is missing"):
        truncate(tmp_path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_every_path(tmp_path: Path, name: str) -> None:
    layout = SubmissionLayout(tmp_path, "open", "Lab", name)
    key = ("s", "b", "Offline")
    paths = [
        layout.system_json("s"),
        layout.source_dir("b"),
        layout.measurements(*key),
        layout.notes_dir(*key),
        layout.performance_dir(*key),
        layout.accuracy_dir(*key),
        layout.documentation,
        layout.results_dir,
    ]
    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(tmp_path / "open" / "Lab") for path in paths)
