"""The main job on real hosts: one session, three systems, one submission, one report."""

import csv
import json
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.lab.outing import NULL, Fleet, rows, said

if TYPE_CHECKING:
    import subprocess

pytestmark = pytest.mark.lab
HOSTS = ("h01", "h02", "h03")


def test_one_session_three_systems_one_submission_one_report(benched: Fleet) -> None:
    session = benched.session
    tree = session / "submission" / "open" / "Lab"
    assert sorted(path.stem for path in (tree / "systems").glob("*.json")) == list(HOSTS)
    assert len(list(tree.glob("results/*/tiny-bert/*/performance/run_1/mlperf_log_detail.txt"))) == 6
    assert len(list(tree.glob("results/*/tiny-bert/*/accuracy/accuracy.txt"))) == 6
    assert json.loads((tree / "model_mapping.json").read_text(encoding="utf-8")) == {"tiny-bert": "bert-99"}
    assert "3 of 3 hosts" in (session / "report" / "index.html").read_text(encoding="utf-8")
    with (session / "results" / "results.csv").open(encoding="utf-8", newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 12


def test_accuracy_is_measured_over_the_whole_set(benched: Fleet) -> None:
    units = benched.read("results", "results.json")["units"]
    accuracies = [unit["accuracy"]["F1"] for unit in units if unit["mode"] == "accuracy"]
    assert len(accuracies) == 6
    assert all(value >= 85 for value in accuracies)
    assert all(unit["summary"]["accuracy_sample_count"] in (None, 10833) for unit in units)
    assert all("demo model" in unit["labels"] for unit in units)


def test_nothing_on_the_hosts_needed_root(benched: Fleet) -> None:
    for name in HOSTS:
        owned = benched.lab[name].sh("find /home/bench/.mlperf-fleet ! -user bench | head -3")
        assert owned == ""
        assert "bench" not in benched.lab[name].sh("getent group sudo")


def test_a_second_provision_changes_nothing(benched: Fleet) -> None:
    done = benched("provision", "--json", timeout=120)
    assert done.returncode == 0, done.stderr
    assert [(host["host"], host["changed"]) for host in json.loads(done.stdout)] == [(name, 0) for name in HOSTS]


def test_the_check_says_that_the_run_was_quick_and_nothing_else(benched: Fleet) -> None:
    done = benched("submission", "check", "--json")
    assert done.returncode == 5
    findings = [finding for finding in json.loads(done.stdout) if finding["severity"] == "error"]
    assert len(findings) == 1
    assert "quick" in findings[0]["message"]


def test_a_bench_again_in_the_same_session_measures_nothing_twice(benched: Fleet) -> None:
    before = {path: path.read_bytes() for path in benched.session.glob("collect/*/*/manifest.json")}
    done = benched("bench", "--session", benched.session.name, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in benched.session.glob("collect/*/*/manifest.json")} == before


def test_the_later_stages_need_no_host(benched: Fleet, tmp_path: Path) -> None:
    shutil.copytree(benched.folder / "sessions", tmp_path / "sessions")
    alone = Fleet(benched.lab, tmp_path)
    for name in HOSTS:
        benched.lab[name].link(up=False)
    for stage in ("results", "submission", "report"):
        done = alone(stage)
        assert done.returncode == 0, done.stderr
    assert "3 of 3 hosts" in (alone.session / "report" / "index.html").read_text(encoding="utf-8")


def test_collected_files_that_were_changed_are_refused(benched: Fleet, tmp_path: Path) -> None:
    """A manifest that lies, seen from here: the host's file is not what its manifest says."""
    unit = "h01.tiny-bert.Offline.performance"
    shutil.copytree(benched.folder / "sessions", tmp_path / "sessions")
    again = Fleet(benched.lab, tmp_path)
    shutil.rmtree(again.session / "collect")
    token = json.loads((again.session / "session.json").read_text(encoding="utf-8"))["token"]
    log = f"/home/bench/.mlperf-fleet/runs/{token}/{unit}/mlperf_log_summary.txt"
    benched.lab["h01"].sh(f"cp -p {log} /tmp/kept && echo faster >> {log}")
    try:
        done = again("collect", timeout=120)
    finally:
        benched.lab["h01"].sh(f"cp -p /tmp/kept {log}")
    assert done.returncode == 3
    said(done, "11 of 12 units home and verified", "mlperf_log_summary.txt")


def test_killed_controller_units_go_on_and_the_session_goes_on(benched: Fleet, tmp_path: Path) -> None:
    fleet = Fleet(benched.lab, tmp_path, benchmarks=NULL, run={"quick_seconds": 8, "lost_after_s": 20})
    process = fleet.start("bench", "--quick", "--session", "kept")
    _until_running(fleet, process)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    done = fleet("bench", "--session", "kept", timeout=180)
    # Nothing that the null backend answers may be submitted, which is said, and is code 5.
    assert done.returncode == 5, done.stderr
    said(done, "3 of 3 hosts, 6 of 6 units", "submission: none", "simulated")
    rows(fleet, ["done"] * 6)
    for name in HOSTS:
        # Each unit ran once: the second controller found it, it did not start it again.
        assert len(list(fleet.session.glob(f"collect/{name}/*/manifest.json"))) == 2
        assert not [process for process in fleet.lab[name].processes() if "harness" in process.command]


def test_ctrl_c_says_how_to_go_on_and_loses_nothing(benched: Fleet, tmp_path: Path) -> None:
    fleet = Fleet(benched.lab, tmp_path, benchmarks=NULL, run={"quick_seconds": 8, "lost_after_s": 20})
    # Into a file: ssh's connection masters outlive the command, and would hold a pipe open.
    with (tmp_path / "said").open("w") as stream:
        process = fleet.start("bench", "--quick", "--session", "kept", stdout=stream, stderr=stream)
    _until_running(fleet, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    text = (tmp_path / "said").read_text(encoding="utf-8")
    assert "next:  fleet bench --session kept" in text
    assert "Traceback" not in text
    for path in fleet.session.rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    assert not list((fleet.session / "run").rglob("*.partial"))
    done = fleet("bench", "--session", "kept", timeout=180)
    # Nothing that the null backend answers may be submitted, which is said, and is code 5.
    assert done.returncode == 5, done.stderr
    said(done, "3 of 3 hosts, 6 of 6 units", "submission: none", "simulated")
    rows(fleet, ["done"] * 6)


def _until_running(fleet: Fleet, process: "subprocess.Popen[str]") -> None:
    """Wait until the controller has seen a unit run on a host; fails when it ends before."""
    while process.poll() is None:
        units = list((fleet.folder / "sessions").glob("*/run/units/*.json"))
        if any('"running"' in path.read_text(encoding="utf-8") for path in units):
            return
        time.sleep(0.1)
    pytest.fail(f"it ended with {process.returncode} before a unit was seen running")
