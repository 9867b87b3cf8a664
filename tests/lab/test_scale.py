"""Forty-eight hosts: each is in every answer, whatever becomes of some of them. `make test-scale`; times are elsewhere."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import converged, rootfs
from tests.lab.hosts import Lab
from tests.lab.outing import ROOT, Fleet, rows, said

pytestmark = [pytest.mark.lab, pytest.mark.scale]
HOSTS = 48
NAMES = [f"h{number:02}" for number in range(1, HOSTS + 1)]
GONE = ("h07", "h48")
FROZEN = ("h20", "h21", "h22")


@pytest.fixture(scope="module")
def many(lab_possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:  # noqa: ARG001 - it skips
    """The hosts, provisioned already."""
    wheels = rootfs.wheelhouse([ROOT / "requirements" / "harness.txt"])
    layer = converged.layer(wheels, tmp_path_factory.mktemp("one"), converged.null())
    with Lab(HOSTS, mounts={wheels: converged.WHEELHOUSE}, extra_layers=[layer]) as lab:
        yield lab


@pytest.fixture
def fleet(many: Lab, tmp_path: Path) -> Iterator[Fleet]:
    """A user's folder; what a test does to hosts is undone."""
    yield Fleet(many, tmp_path, hosts=converged.entry(HOSTS), benchmarks=converged.null())
    many.heal()


def test_converged_hosts_are_ready_without_ansible(fleet: Fleet) -> None:
    done = fleet("provision", "--json", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert [(host["host"], host["state"], host["changed"]) for host in found] == [(name, "ready", 0) for name in NAMES]
    assert sorted(path.stem for path in fleet.session.glob("provision/facts/*.json")) == NAMES
    assert not (fleet.session / "plays").exists()
    # Another campaign's environment would be made anew there: only this host needs a play.
    work_dir = f"/{converged.WORK_DIR}"
    fleet.lab["h05"].sh(f"runuser -u bench -- rm {work_dir}/harness/current {work_dir}/assets/tiny-bert/.complete")
    done = fleet("provision", "--json", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [host["host"] for host in json.loads(done.stdout) if host["changed"]] == ["h05"]
    played = {
        json.loads(path.read_text(encoding="utf-8"))["event_data"].get("host")
        for path in fleet.session.glob("plays/provision/artifacts/*/job_events/*.json")
    }
    assert played - {None} == {"h05"}


def test_hosts_that_are_gone_or_frozen_are_named_and_hold_nobody(fleet: Fleet) -> None:
    for name in GONE:
        fleet.lab[name].link(up=False)
    for name in FROZEN:
        fleet.lab[name].freeze()
    done = fleet("provision", "--json", timeout=300)
    assert done.returncode == 3
    found = {host["host"]: host for host in json.loads(done.stdout)}
    assert list(found) == NAMES
    away = {name for name, host in found.items() if host["state"] != "ready"}
    assert away == {*GONE, *FROZEN}
    for name in away:
        assert found[name]["state"] == "unreachable"
        assert found[name]["cause"], name
        assert found[name]["hint"], name


def test_every_host_runs_its_unit_and_comes_home(fleet: Fleet) -> None:
    fleet.lab["h33"].link(up=False)
    done = fleet("bench", "--quick", timeout=900)
    assert done.returncode == 3, done.stdout + done.stderr
    said(done, f"{HOSTS - 1} of {HOSTS} hosts, {HOSTS - 1} of {HOSTS} units", "simulated")
    rows(fleet, ["unreachable" if name == "h33" else "done" for name in NAMES])
    home = sorted(path.parent.parent.name for path in fleet.session.glob("collect/*/*/manifest.json"))
    assert home == [name for name in NAMES if name != "h33"]
    for name in NAMES:
        assert not [process for process in fleet.lab[name].processes() if "harness" in process.command]
