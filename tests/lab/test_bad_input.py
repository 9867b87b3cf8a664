"""What a user gets wrong, and what is wrong with hosts: a message with host, cause and next command, and an exit code."""

import json
from pathlib import Path

import pytest

from tests.conftest import MakeLab
from tests.lab.hosts import Lab
from tests.lab.outing import NULL, Fleet, rows, said

pytestmark = pytest.mark.lab


@pytest.fixture
def fleet(lab: Lab, tmp_path: Path) -> Fleet:
    return Fleet(lab, tmp_path, benchmarks=NULL)


def test_unknown_key(fleet: Fleet) -> None:
    fleet.write(submiter="Lab")
    done = fleet("bench", "--quick")
    assert done.returncode == 2
    said(done, "fleet.yml: submiter: unknown key, did you mean 'submitter'?", "next: edit fleet.yml")
    assert not (fleet.folder / "sessions").exists()


def test_duplicate_host(fleet: Fleet) -> None:
    fleet.write(hosts=[{"name": "h[01-03]", "kind": "server"}, {"name": "h02", "kind": "laptop"}])
    done = fleet("check")
    assert done.returncode == 2
    said(done, "h02 is given twice", "next: edit fleet.yml")


def test_an_unreachable_host_is_named_and_holds_nobody(fleet: Fleet) -> None:
    fleet.lab["h02"].link(up=False)
    done = fleet("bench", "--quick", timeout=600)
    assert done.returncode == 3
    said(done, "2 of 3 hosts, 4 of 6 units", "h02: no answer")
    rows(fleet, ["done", "done", "unreachable", "unreachable", "done", "done"])
    units = {unit["unit"]: unit for unit in fleet.read("results", "results.json")["units"]}
    assert "no answer" in units["h02.tiny-bert.Offline.performance"]["cause"]
    first = (fleet.session / "report" / "index.html").read_text(encoding="utf-8")
    assert "2 of 3 hosts" in first


def test_wrong_key(fleet: Fleet, tmp_path: Path) -> None:
    key = tmp_path / "stranger"
    fleet.lab.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    fleet.write(hosts=[{"name": "h01", "kind": "server", "user": "bench", "identity_file": str(key)}])
    done = fleet("check")
    assert done.returncode == 3
    said(done, "h01", "login as bench refused", f"-i {key}")


def test_unknown_host_key(fleet: Fleet) -> None:
    fleet.lab.forget("h03")
    done = fleet("check")
    assert done.returncode == 3
    said(done, "2 of 3 hosts ready", "h03 │ unknown-host-key", "SHA256:", "StrictHostKeyChecking=accept-new")


def test_the_command_that_accepts_a_key_accepts_it(fleet: Fleet) -> None:
    fleet.lab.forget("h03")
    found = json.loads(fleet("inventory", "--json").stdout)
    command = next(item["hint"] for item in found if item["host"] == "h03").partition("then: ")[2]
    fleet.lab.run(["sh", "-c", command], check=True)
    assert fleet("check").returncode == 0


def test_changed_host_key(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(2)
    fleet = Fleet(lab, tmp_path, benchmarks=NULL, hosts=[{"name": "h[01-02]", "kind": "server", "user": "bench"}])
    known = Path(lab.ssh_dir / "known_hosts").read_text(encoding="utf-8")
    lab["h02"].change_host_key()
    (lab.ssh_dir / "known_hosts").write_text(known, encoding="utf-8")
    done = fleet("check")
    assert done.returncode == 3
    said(done, "h02 │ changed-host-key", "ssh-keygen", "-R")


def test_no_python_on_the_host(fleet: Fleet) -> None:
    fleet.lab["h01"].remove_python()
    done = fleet("check")
    assert done.returncode == 3
    said(done, "no Python 3 on the host", "install Python 3.11 on h01")


def test_full_disk(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(2, disk_mb={"h01": 64})
    fleet = Fleet(lab, tmp_path, benchmarks=NULL, hosts=[{"name": "h[01-02]", "kind": "server", "user": "bench"}])
    done = fleet("check")
    assert done.returncode == 3
    said(done, "1 of 2 hosts ready", "h01 │ not-ready", "GiB free", "3 GiB needed")
    lab["h01"].fill_disk()
    done = fleet("check")
    assert done.returncode == 3
    said(done, "1 of 2 hosts ready", "h01 │ not-ready", "disk full", "h01: next: free some space on h01")


def test_a_host_without_the_memory_that_a_benchmark_needs(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(2, meminfo_mb={"h02": 500})
    fleet = Fleet(lab, tmp_path, benchmarks=NULL, hosts=[{"name": "h[01-02]", "kind": "server", "user": "bench"}])
    done = fleet("check")
    assert done.returncode == 3
    said(done, "h02 │ not-ready", "tiny-bert: 0.5 GiB memory, 0.75 GiB needed")


def test_two_controllers_on_one_session(fleet: Fleet) -> None:
    assert fleet("inventory", "--session", "one").returncode == 0
    first = fleet.start("bench", "--quick", "--session", "one")
    try:
        for _ in range(100):
            if (fleet.session / "controller.json").exists():
                break
            fleet.lab.run(["sleep", "0.05"])
        done = fleet("provision", "--session", "one")
        assert done.returncode == 1
        said(done, f"in use by pid {first.pid} on")
    finally:
        first.terminate()
        assert first.wait(timeout=60) == 130


def test_no_session_no_campaign(lab: Lab, tmp_path: Path) -> None:
    fleet = Fleet(lab, tmp_path)
    (tmp_path / "fleet.yml").unlink()
    done = fleet("bench")
    assert done.returncode == 2
    said(done, "fleet.yml: no such file", "next: fleet init")
    done = fleet("report")
    assert done.returncode == 1
    said(done, "no session in sessions", "next: fleet bench")
