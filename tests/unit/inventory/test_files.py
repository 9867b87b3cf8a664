"""hosts.yml is plain Ansible: Ansible itself reads it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleet import campaign as campaigns
from fleet.inventory import files, static
from fleet.inventory.hosts import Reachability
from fleet.session import Session
from fleet.terms import HostKind, HostState
from tests.unit.fakes import scene

CAMPAIGN = """
submitter: ExampleLab
benchmarks: [{name: tiny-bert}]
hosts:
- {name: a, kind: server, address: 10.0.0.1, user: me, port: 2222, identity_file: ~/.ssh/k}
- {name: 'b[1-2]', kind: laptop, python: /opt/python}
- {name: here, kind: ec2, connection: local}
role_variables: {python_env_index_url: 'file:///wheels', python_env_no_index: true}
"""


def listed(path: Path) -> dict[str, Any]:
    """What ansible-inventory makes of a file."""
    program = Path(sys.executable).with_name("ansible-inventory")
    done = subprocess.run([program, "-i", path, "--list"], capture_output=True, text=True, check=True)
    assert "WARNING" not in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_ansible_reads_what_fleet_writes(tmp_path: Path) -> None:
    made = scene(tmp_path, CAMPAIGN)
    found = listed(made.session.inventory / "hosts.yml")
    assert set(found["sut"]["children"]) == {"servers", "laptops", "ec2"}
    assert found["laptops"]["hosts"] == ["b1", "b2"]
    variables = found["_meta"]["hostvars"]
    assert set(variables) == {"a", "b1", "b2", "here"}
    assert variables["a"]["ansible_host"] == "10.0.0.1"
    assert variables["a"]["ansible_port"] == 2222
    assert variables["a"]["ansible_user"] == "me"
    assert variables["a"]["ansible_ssh_private_key_file"] == "~/.ssh/k"
    assert variables["a"]["ansible_python_interpreter"] == "/usr/bin/python3"
    assert variables["a"]["fleet_work_dir"] == "/home/me/.mlperf-fleet"
    assert variables["here"]["ansible_connection"] == "local"
    assert "ansible_host" not in variables["here"]
    assert all(values["python_env_no_index"] is True for values in variables.values())


def test_an_unreached_host_is_in_the_inventory_all_the_same(tmp_path: Path) -> None:
    campaign = campaigns.load_text(CAMPAIGN, "fleet.yml")
    hosts = static.hosts(campaign, base=tmp_path, source="fleet.yml")
    groups = files.to_ansible(hosts, [], campaign)["all"]["children"]["sut"]["children"]
    assert groups["laptops"]["hosts"]["b2"]["ansible_python_interpreter"] == "/opt/python"
    assert "ansible_python_interpreter" not in groups["servers"]["hosts"]["a"]
    assert groups["servers"]["hosts"]["a"]["fleet_work_dir"] == "~/.mlperf-fleet"


@pytest.mark.parametrize(
    ("home", "given", "expected"),
    [
        ("/home/me/", "~/.mlperf-fleet", "/home/me/.mlperf-fleet"),
        ("/home/me", "/srv/fleet", "/srv/fleet"),
        ("", "~/x", "~/x"),
    ],
)
def test_the_work_folder_is_absolute_once_home_is_known(home: str, given: str, expected: str) -> None:
    campaign = campaigns.load_text(CAMPAIGN + f"work_dir: {given}\n", "fleet.yml")
    found = Reachability(host="a", kind=HostKind.SERVER, state=HostState.READY, home=home)
    assert files.work_dir(found, campaign) == expected


def test_files_are_read_back_as_written(tmp_path: Path) -> None:
    made = scene(tmp_path, CAMPAIGN, states={"b1": HostState.UNREACHABLE})
    again = Session(made.session.root)
    assert [host.name for host in files.hosts(again)] == ["a", "b1", "b2", "here"]
    assert files.reachability(again)[1].cause == "b1 is away"


FROM_FILE = CAMPAIGN.partition("hosts:")[0] + "hosts: [{file: lab.txt, kind: server, connection: local}]\n"


def test_a_host_that_its_file_does_not_name_any_more_stays_left_out(tmp_path: Path) -> None:
    named = tmp_path / "lab.txt"
    named.write_text("h[01-02]\n", encoding="utf-8")
    made = scene(tmp_path, FROM_FILE)
    before = files.hosts(made.session)

    def inventory() -> dict[str, tuple[HostState, str]]:
        found = files.make(made.session, made.campaign, base=tmp_path, source="fleet.yml")
        return {item.host: (item.state, item.cause) for item in found}

    named.write_text("h01\n", encoding="utf-8")
    for _ in range(2):
        assert inventory() == {"h01": (HostState.READY, ""), "h02": (HostState.LEFT_OUT, "not in lab.txt any more")}
        assert files.gone(made.session) == {"h02": "not in lab.txt any more"}
        # What is known of it stays known.
        assert files.hosts(made.session) == (before[0], replace(before[1], gone="not in lab.txt any more"))
        assert files.reachability(made.session)[1].state is HostState.READY
    named.write_text("h[01-02]\n", encoding="utf-8")
    assert inventory()["h02"] == (HostState.READY, "")
    assert files.gone(made.session) == {}


def test_an_alias_that_left_the_ssh_config_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config"
    monkeypatch.setenv("FLEET_SSH_CONFIG", str(config))
    text = CAMPAIGN.partition("hosts:")[0] + "hosts: [{ssh_config: 'lab-*', kind: server, connection: local}]\n"
    config.write_text("Host lab-1 lab-2\n", encoding="utf-8")
    made = scene(tmp_path, text)
    config.write_text("Host lab-2\n", encoding="utf-8")
    files.make(made.session, made.campaign, base=tmp_path, source="fleet.yml")
    assert files.gone(made.session) == {"lab-1": f"not in {config} any more"}


def test_the_stage_probes_this_machine_for_real(tmp_path: Path) -> None:
    text = CAMPAIGN.partition("hosts:")[0] + "hosts: [{name: me, kind: laptop, connection: local}]\n"
    made = scene(tmp_path, text)
    (found,) = files.make(made.session, made.campaign, base=tmp_path, source="fleet.yml")
    assert found.state is HostState.READY, found.cause
    assert found.home
    assert tuple(int(part) for part in found.python_version.split(".")[:2]) >= (3, 11)
    assert found.hostname == Path("/proc/sys/kernel/hostname").read_text(encoding="utf-8").strip()
    assert files.reachability(made.session) == (found,)
