"""Who starts a supervisor: the user's service manager where it lasts, else setsid. The manager here is two scripts."""

import getpass
import os
import subprocess
from pathlib import Path

import pytest

from fleet.harness import detach, unit_queue
from fleet.harness.contract import UnitState
from tests.unit.harness.hosting import ended, idle, pids, status, unit, wait
from tests.unit.harness.units import queue

RUN = """#!/usr/bin/env python3
import json, os, subprocess, sys
command = sys.argv[sys.argv.index("--") + 1:]
json.dump(sys.argv[1:], open(os.environ["SEEN"], "w"))
if os.environ["ANSWER"] == "refused":
    sys.exit("Failed to start transient service unit")
subprocess.Popen(command, start_new_session=True)
"""


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A manager that answers `running`, and a user whose services linger; the file that systemd-run was seen in."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "systemctl").write_text("#!/bin/sh\necho $STATE\ntest $STATE = running\n")
    (programs / "systemd-run").write_text(RUN)
    for program in programs.iterdir():
        program.chmod(0o755)
    seen = tmp_path / "seen.json"
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(seen))
    monkeypatch.setenv("ANSWER", "")
    monkeypatch.setenv("STATE", "running")
    monkeypatch.setattr(detach, "_LINGER", tmp_path / "linger")
    (tmp_path / "linger").mkdir()
    (tmp_path / "linger" / getpass.getuser()).touch()
    return seen


@pytest.mark.parametrize("state", ["running", "degraded"])
def test_a_lasting_manager_runs_the_units(
    work: Path, manager: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setenv("STATE", state)
    monkeypatch.setenv("A_SECRET", "of mine")
    unit_queue.start(work, queue(unit(work, "one", "assert os.environ['A_SECRET'] == 'of mine'")))
    wait(ended(work, "one"))
    assert status(work, "one").state is UnitState.DONE
    asked = manager.read_text(encoding="utf-8")
    assert "--property=KillMode=control-group" in asked
    assert "--property=OOMPolicy=continue" in asked
    # Whoever lists processes sees arguments.
    assert "--setenv=A_SECRET" in asked
    assert "of mine" not in asked
    wait(idle(work))


@pytest.mark.parametrize("lack", ["linger", "manager", "program", "refused"])
def test_without_one_the_units_run_all_the_same(
    work: Path, manager: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    if lack == "linger":
        (tmp_path / "linger" / getpass.getuser()).unlink()
    if lack == "manager":
        monkeypatch.setenv("STATE", "offline")
    if lack == "program":
        (tmp_path / "bin" / "systemctl").write_text("#!/no/such/interpreter\n")
    if lack == "refused":
        monkeypatch.setenv("ANSWER", "refused")
    unit_queue.start(work, queue(unit(work, "one", "time.sleep(0.5)")))
    wait(ended(work, "one"))
    assert status(work, "one").state is UnitState.DONE
    assert manager.exists() is (lack == "refused")
    wait(idle(work))
    assert len(pids(work)) == 2


def test_a_supervisor_is_in_a_session_of_its_own(work: Path) -> None:
    unit_queue.start(work, queue(unit(work, "one", "time.sleep(60)")))
    wait(lambda: len(pids(work)) == 2)
    assert os.getsid(pids(work)[0]) == pids(work)[0] != os.getsid(0)
    said = subprocess.run(["ps", "-o", "tty=", "-p", str(pids(work)[0])], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "?"
    unit_queue.cancel(work, "s")
    wait(idle(work))
