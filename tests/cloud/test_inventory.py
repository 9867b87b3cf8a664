"""`fleet inventory` over instances that fleet launched: every one of them, in files that Ansible reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from fleet.cli import main
from fleet.inventory import files, reach
from fleet.inventory.hosts import Host
from fleet.session import Session
from tests.cloud.cloud import Cloud
from tests.cloud.conftest import CAMPAIGN, MakeSession
from tests.cloud.launched import ids, launched
from tests.unit.fakes import FakeConnection
from tests.unit.inventory.test_files import listed


@pytest.fixture
def reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Host]:
    """Everybody answers; hosts that were connected to."""
    found: list[Host] = []

    def connect(host: Host) -> FakeConnection:
        found.append(host)
        return FakeConnection(["hostname h\nhome /home/ubuntu\npython 3.12.1 /usr/bin/python3\n"])

    monkeypatch.setattr(reach, "SshConnection", connect)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleet.yml").write_text(CAMPAIGN, encoding="utf-8")
    return found


def inventory(*words: str) -> dict[str, Any]:
    """Host to its row."""
    result = CliRunner().invoke(main.cli, ["inventory", "--json", *words], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return {row["host"]: row for row in json.loads(result.stdout)}


@pytest.mark.usefixtures("reached")
def test_before_anything_is_launched_every_host_says_what_to_do() -> None:
    rows = inventory()
    assert [(name, row["state"], row["cause"], row["hint"]) for name, row in rows.items()] == [
        (f"g5-{number}", "not-ready", "not launched yet", "fleet up") for number in (1, 2, 3)
    ]


def test_launched_ones_are_reached_by_the_key_that_was_made(
    cloud: Cloud, make_session: MakeSession, reached: list[Host]
) -> None:
    session, _ = make_session()
    lease = launched(cloud, session)
    rows = inventory("--session", "s1")
    assert {name: row["state"] for name, row in rows.items()} == {"g5-1": "ready", "g5-2": "ready", "g5-3": "not-ready"}
    one, two = sorted(reached, key=lambda host: host.name)
    assert [one.address, two.address] == [item.private_address for item in lease.instances]
    assert one.instance is not None
    known = Path(one.instance.known_hosts).read_text(encoding="ascii")
    assert known.startswith(f"{one.instance.key_alias} ssh-ed25519 ")
    assert Path(one.identity_file or "").stat().st_mode & 0o077 == 0
    found = listed(session.inventory / "hosts.yml")
    assert found["type_g5_xlarge"]["hosts"] == ["g5-1", "g5-2"]
    assert found["ec2"]["hosts"] == ["g5-1", "g5-2", "g5-3"]
    variables = found["_meta"]["hostvars"]
    assert sorted(variables[name]["ec2_instance_id"] for name in ("g5-1", "g5-2")) == ids(lease)
    assert variables["g5-3"]["ec2_missing"] == "not launched yet"


def test_the_dynamic_inventory_filters_by_what_instances_carry(
    cloud: Cloud, make_session: MakeSession, reached: list[Host]
) -> None:
    del reached
    session, _ = make_session()
    lease = launched(cloud, session)
    other, _ = make_session(name="s2")
    launched(cloud, other)
    inventory("--session", "s1")
    written = yaml.safe_load((session.inventory / "aws_ec2.yml").read_text(encoding="utf-8"))
    filters = [{"Name": key, "Values": [value]} for key, value in written["filters"].items()]
    said = cloud.client("ec2").describe_instances(Filters=filters)["Reservations"]
    assert sorted(item["InstanceId"] for part in said for item in part["Instances"]) == ids(lease)


def test_a_part_of_the_instances_by_name(cloud: Cloud, make_session: MakeSession, reached: list[Host]) -> None:
    session, _ = make_session()
    launched(cloud, session, count=3)
    rows = inventory("--session", "s1", "--limit", "g5-[1-2]", "--exclude", "*-2")
    assert {name: row["state"] for name, row in rows.items()} == {
        "g5-1": "ready",
        "g5-2": "left-out",
        "g5-3": "left-out",
    }
    assert [host.name for host in reached] == ["g5-1"]
    assert [host.name for host in files.hosts(Session(session.root))] == ["g5-1", "g5-2", "g5-3"]
