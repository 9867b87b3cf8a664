"""Real sshd behind hosts that are instances: a host key of our own, patience while they boot, none for a wrong key."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.inventory import files, reach
from fleet.inventory.hosts import Host, Instance, Reachability
from fleet.terms import HostKind, HostState
from tests.lab.hosts import Lab
from tests.unit.fakes import scene

pytestmark = pytest.mark.lab
ALIAS = "fleet-Spring-a1b2c3"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJRnWdGGBvKpyRcs2/qXT7E6UDUMXZdpY1JQ1kLhX2Zk"
"""Somebody else's."""


@pytest.fixture
def host(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """h01 as an instance whose host key is known under an alias alone, in a file that the user's ssh does not know."""
    monkeypatch.setenv("FLEET_SSH_CONFIG", str(lab.ssh_config))
    known = tmp_path / "with a space" / "known_hosts"
    known.parent.mkdir()
    known.write_text(f"{ALIAS} {' '.join(lab['h01'].public_key.split()[:2])}\n", encoding="ascii")
    given = Instance(
        id="i-1", lease="lease-1", type="g5.xlarge", known_hosts=str(known), key_alias=ALIAS, patience_s=40
    )
    return Host(
        name="g5-1",
        kind=HostKind.EC2,
        connection="ssh",
        address=lab["h01"].address,
        user="bench",
        identity_file=str(lab.ssh_dir / "id_ed25519"),
        instance=given,
    )


@contextmanager
def known_to_ssh_by_its_address(lab: Lab, key: str) -> Iterator[None]:
    """What the user's own known_hosts says of h01, which must not matter."""
    path = lab.ssh_dir / "known_hosts"
    before = path.read_text(encoding="ascii")
    path.write_text(f"{lab['h01'].address} {key}\n", encoding="ascii")
    try:
        yield
    finally:
        path.write_text(before, encoding="ascii")


def probe(lab: Lab, host: Host) -> Reachability:
    return lab.inside(lambda: reach.probe(host), timeout=120)


def ping(lab: Lab, host: Host, folder: Path) -> subprocess.CompletedProcess[str]:
    """Ansible alone, from hosts.yml."""
    made = scene(folder)
    path = files.write(made.session, [host], [], made.campaign)
    ansible = Path(sys.executable).with_name("ansible")
    return lab.run(
        [ansible, "-i", path, "type_g5_xlarge", "-m", "ping", "-e", "ansible_python_interpreter=/usr/bin/python3"],
        cwd=folder,
        env={"ANSIBLE_SSH_ARGS": f"-F {lab.ssh_config} -o ControlMaster=no"},
    )


def test_the_key_that_was_made_is_enough_for_fleet_and_for_ansible(lab: Lab, host: Host, tmp_path: Path) -> None:
    with known_to_ssh_by_its_address(lab, KEY):
        found = probe(lab, host)
        assert (found.state, found.cause) == (HostState.READY, "")
        done = ping(lab, host, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert '"ping": "pong"' in done.stdout


def test_another_key_is_refused_at_once_though_the_user_knows_it(
    lab: Lab, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host.instance is not None
    known = Path(host.instance.known_hosts)
    known.write_text(f"{ALIAS} {KEY}\n", encoding="ascii")
    asked = counted(monkeypatch)
    with known_to_ssh_by_its_address(lab, " ".join(lab["h01"].public_key.split()[:2])):
        found = probe(lab, host)
        assert found.state is HostState.CHANGED_KEY
        assert "is not the one that i-1 was launched with" in found.cause
        assert len(asked) == 1
        done = ping(lab, host, tmp_path)
        assert done.returncode != 0
        assert "UNREACHABLE" in done.stdout
        assert "pong" not in done.stdout
    known.write_text("", encoding="ascii")
    assert probe(lab, host).state is HostState.CHANGED_KEY


def test_an_instance_whose_sshd_comes_later_is_waited_for(
    lab: Lab, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab["h01"].kill_sshd(sessions=True)
    asked = counted(monkeypatch)
    timer = threading.Timer(5, lab["h01"].start_sshd)
    timer.start()
    try:
        found = probe(lab, host)
    finally:
        timer.join()
    assert (found.state, found.cause) == (HostState.READY, "")
    assert len(asked) > 1


def test_nobody_waits_where_there_is_no_patience(lab: Lab, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.instance is not None
    lab["h01"].kill_sshd(sessions=True)
    asked = counted(monkeypatch)
    found = probe(lab, replace(host, instance=replace(host.instance, patience_s=0.0)))
    assert found.state is HostState.UNREACHABLE
    assert "refused" in found.cause
    assert len(asked) == 1


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Attempts to connect, as they are made."""
    found: list[str] = []
    connect = reach.connect

    def counting(host: Host) -> reach.Connection:
        found.append(host.name)
        return connect(host)

    monkeypatch.setattr(reach, "connect", counting)
    return found
