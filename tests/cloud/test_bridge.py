"""Instances of moto as real hosts: what launches them by hand gets verified ssh, a timer, metadata, and an end."""

import json
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cloud.bridge import Bridge
from tests.cloud.test_middleware import image

pytestmark = pytest.mark.lab
USER_DATA = """\
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="=="

--==
Content-Type: text/cloud-boothook; charset="us-ascii"

#cloud-boothook
#!/bin/sh
echo armed >/run/armed
setsid sh -c 'sleep {seconds}; shutdown -P now' </dev/null >/dev/null 2>&1 &

--==
Content-Type: text/cloud-config; charset="us-ascii"

#cloud-config
ssh_deletekeys: true
ssh_keys:
  ed25519_public: {public}
  ed25519_private: |
{private}

--==--
"""


@pytest.fixture(scope="module")
def bridge(lab_possible: None) -> Iterator[Bridge]:  # noqa: ARG001 - it skips
    with Bridge(2) as made:
        yield made


@pytest.fixture(autouse=True)
def _empty(bridge: Bridge) -> None:
    bridge.reset()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """login and host_key, with their public halves."""
    for name in ("login", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "x", "-f", tmp_path / name], check=True)
    return tmp_path


def user_data(keys: Path, *, seconds: float) -> str:
    private = "\n".join(f"    {line}" for line in (keys / "host_key").read_text().splitlines())
    return USER_DATA.format(seconds=seconds, public=(keys / "host_key.pub").read_text().strip(), private=private)


def launch(bridge: Bridge, keys: Path, *, seconds: float = 600, **more: Any) -> dict[str, Any]:
    """One instance by hand: as DescribeInstances has it when it is up."""

    def launched() -> str:
        ec2 = bridge.cloud.client("ec2")
        ec2.import_key_pair(KeyName="login", PublicKeyMaterial=(keys / "login.pub").read_bytes())
        made = ec2.run_instances(
            ImageId=image(bridge.cloud), InstanceType="g5.xlarge", MinCount=1, MaxCount=1, KeyName="login",
            UserData=user_data(keys, seconds=seconds), InstanceInitiatedShutdownBehavior="terminate", **more,
        )  # fmt: skip
        return str(made["Instances"][0]["InstanceId"])

    id_ = bridge.lab.inside(launched)
    bridge.until(lambda: bridge.host(id_))
    return described(bridge, id_)


def described(bridge: Bridge, id_: str) -> dict[str, Any]:
    found: dict[str, Any] = bridge.lab.inside(
        lambda: bridge.cloud.client("ec2").describe_instances(InstanceIds=[id_])["Reservations"][0]["Instances"][0]
    )
    return found


def ssh(bridge: Bridge, keys: Path, address: str, command: str) -> subprocess.CompletedProcess[str]:
    """With the made keys alone."""
    known = keys / "known_hosts"
    known.write_text(f"{address} {' '.join((keys / 'host_key.pub').read_text().split()[:2])}\n")
    options = ["StrictHostKeyChecking=yes", f"UserKnownHostsFile={known}", "IdentitiesOnly=yes", "BatchMode=yes"]
    words = [word for option in options for word in ("-o", option)]
    return bridge.lab.run(["ssh", "-F", "none", *words, "-i", keys / "login", f"bench@{address}", command])


def test_an_instance_is_a_host_with_the_keys_that_it_was_given(bridge: Bridge, keys: Path) -> None:
    one = launch(bridge, keys)
    address = one["PrivateIpAddress"]
    done = ssh(bridge, keys, address, "hostname; cat /run/armed; id -un")
    assert (done.returncode, done.stdout.split()) == (0, [f"ip-{address.replace('.', '-')}", "armed", "bench"])
    (keys / "other").mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / "other/host_key"], check=True)
    (keys / "other/login").write_bytes((keys / "login").read_bytes())
    (keys / "other/login").chmod(0o600)
    assert "verification failed" in ssh(bridge, keys / "other", address, "true").stderr
    bridge.lab.inside(lambda: bridge.cloud.client("ec2").terminate_instances(InstanceIds=[one["InstanceId"]]))
    bridge.until(lambda: not bridge.up())
    assert ssh(bridge, keys, address, "true").returncode == 255


def test_a_host_that_shuts_itself_down_is_terminated(bridge: Bridge, keys: Path) -> None:
    one = launch(bridge, keys, seconds=1)
    bridge.until(lambda: not bridge.up())
    gone = described(bridge, one["InstanceId"])
    assert gone["State"]["Name"] == "terminated"
    assert gone["StateReason"]["Code"] == "Client.InstanceInitiatedShutdown"


def test_a_place_is_used_again_by_a_new_instance(bridge: Bridge, keys: Path) -> None:
    first = launch(bridge, keys, seconds=1)
    bridge.until(lambda: not bridge.up())
    bridge.lab.inside(lambda: bridge.cloud.client("ec2").delete_key_pair(KeyName="login"))
    addresses = {first["PrivateIpAddress"]}
    for _ in range(2):
        one = launch(bridge, keys)
        bridge.lab.inside(lambda: bridge.cloud.client("ec2").delete_key_pair(KeyName="login"))
        addresses.add(one["PrivateIpAddress"])
        assert ssh(bridge, keys, one["PrivateIpAddress"], "true").returncode == 0
    assert addresses == {host.address for host in bridge.lab.hosts.values()}


def test_a_spot_instance_hears_two_minutes_before(bridge: Bridge, keys: Path) -> None:
    one = launch(bridge, keys, InstanceMarketOptions={"MarketType": "spot"})
    address, id_ = one["PrivateIpAddress"], one["InstanceId"]
    base = "http://169.254.169.254/latest"
    script = f"""
import json, sys, urllib.error, urllib.request
def ask(path, headers={{}}, method="GET"):
    try:
        with urllib.request.urlopen(urllib.request.Request("{base}/" + path, headers=headers, method=method)) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code
token = ask("api/token", {{"X-aws-ec2-metadata-token-ttl-seconds": "60"}}, "PUT")
mine = {{"X-aws-ec2-metadata-token": token}}
paths = ["meta-data/instance-id", "meta-data/instance-life-cycle", "meta-data/spot/instance-action"]
print(json.dumps([ask(paths[0]), *[ask(path, mine) for path in paths]]))
"""
    asked = f"python3 -c {shlex.quote(script)}"
    assert json.loads(ssh(bridge, keys, address, asked).stdout) == [401, id_, "spot", 404]
    bridge.interrupt(id_, after_s=2)
    said = json.loads(json.loads(ssh(bridge, keys, address, asked).stdout)[3])
    assert said["action"] == "terminate"
    assert time.strptime(said["time"], "%Y-%m-%dT%H:%M:%SZ")
    bridge.until(lambda: not bridge.up())
    assert described(bridge, id_)["StateReason"]["Code"] == "Server.SpotInstanceTermination"
