"""docs/scaling.md, word for word: a play that runs from a lab host against others, and comes home as a stream."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from fleet import provision
from tests.lab import rootfs
from tests.lab.hosts import Lab
from tests.lab.outing import NULL, ROOT, Fleet

if TYPE_CHECKING:
    import subprocess

PAGE = ROOT / "docs" / "scaling.md"
FAR = ("far01", "far02")


def blocks() -> list[str]:
    """The page's shell blocks: getting the packages, installing them, laying the play out, playing it."""
    return re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def pins() -> list[str]:
    """What the first block downloads."""
    return re.findall(r"\S+==\S+", blocks()[0])


def test_the_worker_runs_the_controllers_ansible() -> None:
    text = (ROOT / "requirements" / "controller.txt").read_text(encoding="utf-8").splitlines()
    assert [pin.partition("==")[0] for pin in pins()] == ["ansible-core", "ansible-runner"]
    assert [pin for pin in pins() if pin not in text] == []
    assert blocks()[0].strip() == f"pip download -d wheels {' '.join(pins())}"


class Desk:
    """The user's folder, and a shell at the controller's place in which ssh, fleet and ansible-runner are found."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.fleet = Fleet(
            lab, folder, benchmarks=NULL, hosts=[{"name": "far[01-02]", "kind": "server", "user": "bench"}]
        )
        programs = folder / "bin"
        programs.mkdir()
        # ssh takes its configuration from the password database's home, not from HOME: the lab's must be named.
        (programs / "ssh").write_text('#!/bin/sh\nexec /usr/bin/ssh -F "$FLEET_SSH_CONFIG" "$@"\n')
        (programs / "ssh").chmod(0o755)
        self.path = f"{programs}:{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"

    def shell(self, script: str) -> "subprocess.CompletedProcess[str]":
        """Run it with an agent that holds the user's key, as a login session has one."""
        inside = f"set -euo pipefail\nssh-add -q {self.lab.ssh_dir}/id_ed25519\n{script}"
        return self.lab.run(
            ["ssh-agent", "bash", "-c", inside], cwd=self.fleet.folder, env={"PATH": self.path}, timeout=300
        )

    def events(self) -> list[dict[str, Any]]:
        """What the play told, from the files that `ansible-runner process` wrote."""
        found = (self.fleet.folder / "play" / "artifacts" / "job_events").glob("*.json")
        return [json.loads(path.read_text(encoding="utf-8")) for path in found]


@pytest.fixture(scope="module")
def desk(lab_possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:  # noqa: ARG001 - it skips
    """A controller, a worker with its packages installed as the page says, and two hosts that the worker knows."""
    folder = tmp_path_factory.mktemp("user")
    wanted = folder / "worker.txt"
    wanted.write_text("\n".join(pins()) + "\n", encoding="utf-8")
    shutil.copytree(rootfs.wheelhouse([wanted]), folder / "wheels")
    for name in ("playbooks", "roles"):
        shutil.copytree(ROOT / name, folder / name)
    with Lab(names=["worker", *FAR]) as lab:
        made = Desk(lab, folder)
        known = (lab.ssh_dir / "known_hosts").read_text(encoding="utf-8")
        lab["worker"].exec(["sh", "-c", "cat > /home/bench/.ssh/known_hosts"], input=known, check=True)
        done = made.shell(blocks()[1])
        assert done.returncode == 0, done.stdout + done.stderr
        yield made


@pytest.mark.lab
@pytest.mark.scale
def test_a_play_runs_from_the_worker_and_comes_home(desk: Desk) -> None:
    done = desk.shell(blocks()[2] + blocks()[3])
    assert done.returncode == 0, done.stdout + done.stderr
    looked = {
        event["event_data"]["host"]: event["event_data"]["res"]
        for event in desk.events()
        if event["event"] == "runner_on_ok" and event["event_data"]["task"] == provision.PREFLIGHT
    }
    assert sorted(looked) == list(FAR)
    for name in FAR:
        assert looked[name]["work_dir"] == "/home/bench/.mlperf-fleet"
        assert looked[name]["memory_bytes"] > 0
        last = desk.lab[name].sh("grep Accepted /run/sshd.log | tail -1")
        assert f"from {desk.lab['worker'].address} port" in last
    inventory = yaml.safe_load((desk.fleet.folder / "play/inventory/hosts.yml").read_text(encoding="utf-8"))
    assert list(inventory["all"]["children"]["sut"]["children"]["servers"]["hosts"]) == list(FAR)


@pytest.mark.lab
@pytest.mark.scale
def test_a_host_that_the_worker_cannot_reach_is_named_at_home(desk: Desk) -> None:
    shutil.rmtree(desk.fleet.folder / "play" / "artifacts", ignore_errors=True)
    desk.lab["far02"].link(up=False)
    try:
        done = desk.shell(blocks()[3])
    finally:
        desk.lab["far02"].link(up=True)
    assert done.returncode == 4, done.stdout + done.stderr
    kinds = {
        (event["event_data"].get("host"), event["event"])
        for event in desk.events()
        if event["event"] in {"runner_on_ok", "runner_on_unreachable"}
    }
    assert ("far02", "runner_on_unreachable") in kinds
    assert ("far01", "runner_on_ok") in kinds
