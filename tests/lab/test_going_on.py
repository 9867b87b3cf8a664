"""A session whose controller is gone: status, attach, the same command again; and stopping or leaving out a part of it."""

import json
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.lab.outing import NULL, Fleet, rows, said

if TYPE_CHECKING:
    import subprocess

pytestmark = pytest.mark.lab
SLOW = {"quick_seconds": 12, "lost_after_s": 20}


def running(fleet: Fleet, process: "subprocess.Popen[str]", host: str = "") -> None:
    """Wait until the controller has seen a unit run, on `host` if it is given; fails when it ends before."""
    while process.poll() is None:
        units = (fleet.folder / "sessions").glob(f"*/run/units/{host}*.json")
        if any('"running"' in path.read_text(encoding="utf-8") for path in units):
            return
        time.sleep(0.1)
    pytest.fail(f"it ended with {process.returncode} before a unit was seen running")


def test_attach_goes_on_where_a_killed_controller_left_off(benched: Fleet, tmp_path: Path) -> None:
    fleet = Fleet(benched.lab, tmp_path, benchmarks=NULL, run=SLOW)
    process = fleet.start("bench", "--quick")
    running(fleet, process)
    held = fleet("status")
    assert held.returncode == 3
    said(held, f"controller: pid {process.pid} on", "fleet bench --quick in run")
    refused = fleet("attach")
    assert refused.returncode == 1
    said(refused, f"is in use by pid {process.pid}")
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    said(fleet("status"), f"its controller is gone, it was pid {process.pid}")
    done = fleet("attach", timeout=180)
    # Nothing that the null backend answers may be submitted, which is said, and is code 5.
    assert done.returncode == 5, done.stderr
    said(done, "3 of 3 hosts, 6 of 6 units")
    rows(fleet, ["done"] * 6)
    assert all(spec["attempt"] == 1 for spec in fleet.read("run", "plan.json")["units"])


@pytest.mark.faults
def test_the_same_command_again_goes_on_with_what_was_cancelled_or_left_out(benched: Fleet, tmp_path: Path) -> None:
    # No accuracy units: with null they are over before anybody can cancel them.
    long = [{**NULL[0], "modes": ["performance"], "scenarios": ["SingleStream", "Offline"]}]
    fleet = Fleet(benched.lab, tmp_path, benchmarks=long, run=SLOW)
    process = fleet.start("bench", "--quick", "--exclude", "h03")
    running(fleet, process, "h01")
    stopped = fleet("cancel", "h01")
    assert stopped.returncode == 0, stopped.stderr
    said(stopped, "2 of 2 units stopped")
    assert not [found for found in fleet.lab["h01"].processes() if " run " in found.command]
    assert process.wait(timeout=120) == 3
    rows(fleet, ["interrupted", "interrupted", "done", "done", "left-out", "left-out"])
    first = fleet.session
    kept = {path: path.read_bytes() for path in first.glob("collect/h02/*/manifest.json")}
    assert len(kept) == 2
    done = fleet("bench", "--quick", timeout=180)
    assert done.returncode == 5, done.stderr
    said(done, f"session {first.name} goes on: 4 of 6 units are missing", "again: h01.", "3 of 3 hosts, 6 of 6 units")
    assert fleet.session == first
    rows(fleet, ["done"] * 6)
    assert {path: path.read_bytes() for path in kept} == kept
    locks = [spec["lock"] for spec in fleet.read("run", "plan.json")["units"]]
    assert all(lock["fleet"] == locks[0]["fleet"] and lock["environment"] for lock in locks)
    listed = json.loads(fleet("sessions", "--json").stdout)
    assert [row["units"] for row in listed] == ["6 of 6 units done"]
