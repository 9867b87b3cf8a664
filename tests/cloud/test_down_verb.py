"""fleet down as it is typed: what it prints, and the exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fleet.cli.main import cli
from fleet.cloud import keys
from fleet.errors import CampaignError, ExitCode
from fleet.session import Session
from tests.cloud.cloud import Cloud
from tests.cloud.conftest import MakeSession
from tests.cloud.launched import ids, launched

ROOT = Path(__file__).resolve().parents[2]


def arguments(session: Session, *more: str) -> list[str]:
    return ["down", "--session", session.id, "--sessions", str(session.root.parent), *more]


def test_it_says_what_became_of_each(
    cloud: Cloud, make_session: MakeSession, capsys: pytest.CaptureFixture[str]
) -> None:
    session, _ = make_session()
    lease = launched(cloud, session)
    cloud.end(lease.instances[0].id)
    assert cli.main(arguments(session), standalone_mode=False) is ExitCode.OK
    out = capsys.readouterr().out
    assert "2 instances of session s1 ended" in out
    (first,) = [line for line in out.splitlines() if lease.instances[0].id in line]
    (second,) = [line for line in out.splitlines() if lease.instances[1].id in line]
    assert "g5-1" in first
    assert "spot interruption" in first
    assert "taken down" in second
    assert cli.main(arguments(session, "--json"), standalone_mode=False) is ExitCode.OK
    assert json.loads(capsys.readouterr().out) == []


def test_one_host_and_a_slip_of_the_finger(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    lease = launched(cloud, session)
    with pytest.raises(CampaignError, match="--limit g6-1: no such host"):
        cli.main(arguments(session, "--limit", "g6-1"), standalone_mode=False)
    assert sorted(cloud.standing()["instances"]) == ids(lease)
    assert cli.main(arguments(session, "--limit", "g5-1"), standalone_mode=False) is ExitCode.OK
    assert cloud.standing()["instances"] == [lease.instances[1].id]


def test_ctrl_c_in_the_middle_is_a_leak_with_ids_and_the_next_command(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    lease = launched(cloud, session)
    cloud.slow(ending_s=600)
    process = subprocess.Popen(
        [sys.executable, "-m", "fleet", *arguments(session)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while "TerminateInstances" not in cloud.counted():
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == ExitCode.LEAK
    assert all(f"{one} in us-east-1" in said for one in ids(lease))
    assert f"next:  fleet down --session s1 --sessions {session.root.parent}" in said
    assert "Traceback" not in said
    assert keys.known()
