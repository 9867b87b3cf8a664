"""Hosts that are instances: patience while they boot, a cause where there are none, groups and variables for Ansible."""

import shlex
import time
from dataclasses import replace
from pathlib import Path

import paramiko
import pytest

from fleet import campaign as campaigns
from fleet.errors import CampaignError
from fleet.inventory import files, reach, ssh_config, static
from fleet.inventory.hosts import Host, Instance, Reachability
from fleet.inventory.reach import Unreachable
from fleet.terms import HostKind, HostState
from tests.unit.fakes import MINIMAL, FakeConnection, scene
from tests.unit.inventory.test_files import listed

HERE = Instance(
    id="i-1",
    lease="lease-1",
    type="g5.xlarge",
    region="us-east-1",
    zone="us-east-1a",
    market="spot",
    gpu="a10g",
    known_hosts="/s 1/known_hosts",
    key_alias="fleet-s1",
    patience_s=60.0,
)
HOST = Host(name="g5-1", kind=HostKind.EC2, connection="ssh", address="10.0.0.1", user="ubuntu",
            identity_file="/keys/login", instance=HERE)  # fmt: skip
NEVER = replace(HOST, name="g5-2", address="", instance=Instance(cause="not launched yet"))
ENDED = replace(HOST, name="g5-3", address="", instance=replace(HERE, id="i-3", cause="i-3 ended"))
FINISHED = replace(
    HOST, name="g5-4", address="", instance=replace(HERE, id="i-4", cause="finished: all home", home=True)
)
ANSWER = "hostname h\nhome /home/ubuntu\npython 3.12.1 /usr/bin/python3\n"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited between attempts, which take no time."""
    found: list[float] = []
    now = [time.monotonic()]

    def sleep(seconds: float) -> None:
        found.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("tenacity.nap.time.sleep", sleep)
    monkeypatch.setattr("tenacity.time.monotonic", lambda: now[0])
    return found


def answering(monkeypatch: pytest.MonkeyPatch, *errors: Exception, endless: bool = False) -> list[str]:
    """The host lets in after these errors, or never; returns whom it was asked for."""
    asked: list[str] = []

    def connect(host: Host) -> reach.Connection:
        asked.append(host.name)
        if endless or len(asked) <= len(errors):
            raise errors[min(len(asked), len(errors)) - 1]
        return FakeConnection([ANSWER])

    monkeypatch.setattr(reach, "connect", connect)
    return asked


def silent(cause: str = "refused") -> Unreachable:
    return Unreachable(HostState.UNREACHABLE, cause, silent=True)


def refused() -> Unreachable:
    error = Unreachable(HostState.UNREACHABLE, "login as ubuntu refused")
    error.__cause__ = paramiko.AuthenticationException()
    return error


def test_an_instance_that_boots_is_asked_until_it_answers(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    asked = answering(monkeypatch, *[silent()] * 7)
    found = reach.probe(HOST)
    assert (found.state, found.python, len(asked)) == (HostState.READY, "/usr/bin/python3", 8)
    assert waits == [reach.AGAIN_S] * 7


@pytest.mark.parametrize(("patience", "booting"), [(60.0, True), (0.0, False)])
def test_the_end_of_cloud_inits_work_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, patience: float, *, booting: bool
) -> None:
    connection = FakeConnection(["", ANSWER] if booting else [ANSWER])
    monkeypatch.setattr(reach, "connect", lambda _: connection)
    assert reach.probe(replace(HOST, instance=replace(HERE, patience_s=patience))).state is HostState.READY
    assert ["cloud-init status --wait" in command for command in connection.commands] == [True, False][not booting :]


def test_patience_ends(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    answering(monkeypatch, silent("no answer from 10.0.0.1 port 22 in 10 s"), endless=True)
    found = reach.probe(HOST)
    assert (found.state, found.cause) == (HostState.UNREACHABLE, "no answer from 10.0.0.1 port 22 in 10 s")
    assert HERE.patience_s - reach.AGAIN_S <= sum(waits) <= HERE.patience_s


@pytest.mark.parametrize("host", [replace(HOST, instance=None), replace(HOST, instance=replace(HERE, patience_s=0.0))])
def test_nobody_else_is_waited_for(monkeypatch: pytest.MonkeyPatch, waits: list[float], host: Host) -> None:
    asked = answering(monkeypatch, silent(), endless=True)
    assert reach.probe(host).state is HostState.UNREACHABLE
    assert (len(asked), waits) == (1, [])


@pytest.mark.parametrize("state", [HostState.CHANGED_KEY, HostState.UNKNOWN_KEY])
def test_a_wrong_host_key_is_final_at_once(
    monkeypatch: pytest.MonkeyPatch, waits: list[float], state: HostState
) -> None:
    asked = answering(monkeypatch, Unreachable(state, "another machine"), endless=True)
    assert reach.probe(HOST).state is state
    assert (len(asked), waits) == (1, [])


def test_a_login_is_refused_for_a_while_by_a_machine_that_boots(
    monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    answering(monkeypatch, silent(), refused(), silent("reset"), refused())
    assert reach.probe(HOST).state is HostState.READY
    assert len(waits) == 4


def test_a_wrong_user_is_not_waited_for_as_long_as_a_boot(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    answering(monkeypatch, refused(), endless=True)
    assert reach.probe(replace(HOST, instance=replace(HERE, patience_s=600.0))).cause == "login as ubuntu refused"
    assert sum(waits) <= reach.REFUSES_S + reach.AGAIN_S


@pytest.mark.parametrize(
    ("error", "waited_for"),
    [
        (ConnectionRefusedError(111, "Connection refused"), True),
        (TimeoutError(), True),
        (OSError(113, "No route to host"), True),
        (EOFError(), True),
        (paramiko.SSHException("Error reading SSH protocol banner"), True),
        (paramiko.ssh_exception.IncompatiblePeer("no key exchange"), False),
        (paramiko.PasswordRequiredException(), False),
        (paramiko.AuthenticationException(), False),
        (paramiko.BadHostKeyException("h", paramiko.RSAKey.generate(1024), paramiko.RSAKey.generate(1024)), False),
    ],
)
def test_what_is_the_silence_of_a_machine_that_boots(error: Exception, waited_for: bool) -> None:
    target = ssh_config.parse("hostname h\nuser u\nport 22\nidentitiesonly yes\n", HOST)
    assert reach._explain(error, HOST, target).silent is waited_for


def test_a_wrong_key_is_said_with_the_instance_and_no_way_to_accept_it() -> None:
    key, other = paramiko.RSAKey.generate(1024), paramiko.RSAKey.generate(1024)
    target = ssh_config.parse("hostname 10.0.0.1\nuser u\nport 22\n", HOST)
    changed = reach._explain(paramiko.BadHostKeyException("h", key, other), HOST, target)
    with pytest.raises(Unreachable) as unknown:
        reach._RefuseUnknown(HOST).missing_host_key(paramiko.SSHClient(), "h", key)
    for error in (changed, unknown.value):
        assert error.state is HostState.CHANGED_KEY
        assert error.cause == f"its ssh-rsa host key {reach.fingerprint(key)} is not the one that i-1 was launched with"
        assert "fleet down" in error.hint
        assert "-R" not in error.hint
        assert "accept" not in error.hint


@pytest.mark.parametrize(
    ("host", "state", "cause"),
    [
        (NEVER, HostState.NOT_READY, "not launched yet"),
        (ENDED, HostState.UNREACHABLE, "i-3 ended"),
    ],
)
def test_where_there_is_no_instance_nobody_is_asked(host: Host, state: HostState, cause: str) -> None:
    found = reach.probe(host)
    assert (found.state, found.cause, found.hint) == (state, cause, "fleet up")
    found = reach.probe(replace(host, instance=Instance(id="i-9", cause="i-9 is not among the running")))
    assert found.hint == "fleet inventory"


def test_the_stage_has_every_host_and_leaves_finished_ones_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "SshConnection", lambda _: FakeConnection([ANSWER]))
    made = scene(tmp_path, instances=[FINISHED])
    first, *_ = before = files.reachability(made.session)
    assert first.host == "h01"
    found = files.make(
        made.session, made.campaign, base=tmp_path, source="fleet.yml", instances=[HOST, NEVER, ENDED, FINISHED]
    )
    assert [(item.host, item.state, item.cause) for item in found] == [
        ("h01", HostState.READY, ""),
        ("g5-1", HostState.READY, ""),
        ("g5-2", HostState.NOT_READY, "not launched yet"),
        ("g5-3", HostState.UNREACHABLE, "i-3 ended"),
        ("g5-4", HostState.LEFT_OUT, "finished: all home"),
    ]
    assert [host.name for host in files.hosts(made.session)] == [item.host for item in found]
    # What was found out about it while it was there.
    assert files.reachability(made.session)[-1] == before[-1]


def test_instances_are_in_groups_and_their_host_key_is_ansibles_too(tmp_path: Path) -> None:
    ready = [
        Reachability(host="g5-1", kind=HostKind.EC2, state=HostState.READY, python="/usr/bin/python3", home="/home/u")
    ]
    made = scene(tmp_path)
    path = files.write(made.session, [HOST, NEVER, ENDED], ready, made.campaign)
    found = listed(path)
    assert found["ec2"]["hosts"] == ["g5-1", "g5-2", "g5-3"]
    for group in ("type_g5_xlarge", "zone_us_east_1a", "gpu_a10g"):
        assert found[group]["hosts"] == ["g5-1"]
    variables = found["_meta"]["hostvars"]
    assert variables["g5-1"]["ec2_instance_id"] == "i-1"
    assert variables["g5-1"]["ec2_instance_type"] == "g5.xlarge"
    assert (variables["g5-1"]["ec2_zone"], variables["g5-1"]["ec2_market"]) == ("us-east-1a", "spot")
    assert variables["g5-1"]["ansible_host"] == "10.0.0.1"
    arguments = shlex.split(variables["g5-1"]["ansible_ssh_common_args"])
    assert 'UserKnownHostsFile="/s 1/known_hosts"' in arguments
    assert {"HostKeyAlias=fleet-s1", "StrictHostKeyChecking=yes", "GlobalKnownHostsFile=/dev/null"} <= set(arguments)
    assert "ansible_host" not in variables["g5-2"]
    assert variables["g5-2"]["ec2_missing"] == "not launched yet"


def test_a_host_and_an_instance_may_not_have_one_name(tmp_path: Path) -> None:
    text = MINIMAL.replace("name: h01", "name: 'g5-[2-4]'")
    text += "cloud: {max_cost: 5, instances: [{name: g5, count: 2, types: [g5.xlarge]}]}\n"
    with pytest.raises(CampaignError, match=r"g5-2 is the name of an instance under cloud\.instances too") as caught:
        static.hosts(campaigns.load_text(text, "fleet.yml"), base=tmp_path, source="fleet.yml")
    assert caught.value.hint.startswith("edit fleet.yml")
