"""The probe's answers, and shell commands on this machine."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.inventory import reach
from fleet.inventory.hosts import Host, Reachability
from fleet.inventory.reach import Answer, LocalConnection, Unreachable
from fleet.terms import HostKind, HostState

HOST = Host(name="h", kind=HostKind.SERVER, connection="local", address="h")
FOUND = Reachability(host="h", kind=HostKind.SERVER, state=HostState.READY)


def read(out: str, host: Host = HOST) -> Reachability:
    return reach._read_probe(FOUND, host, Answer(rc=0, out=out, err=""))


def test_the_first_python_new_enough_is_taken() -> None:
    found = read(
        "hostname box\nhome /home/a b\nmachine-id 0123\npython 3.9.2 /usr/bin/python3\n"
        "python 3.12.1 /usr/bin/python3.12\npython 3.13.0 /usr/bin/python3.13\n"
    )
    assert (found.hostname, found.home, found.machine_id) == ("box", "/home/a b", "0123")
    assert (found.state, found.python, found.python_version) == (HostState.READY, "/usr/bin/python3.12", "3.12.1")


def test_versions_are_numbers_not_texts() -> None:
    assert read("python 3.9.99 /old\n").state is HostState.NOT_READY
    assert read("python 3.11.0 /just\n").state is HostState.READY
    assert read("python 3.11.0+ /vendor\n").python == "/vendor"


def test_an_old_python_is_named_with_the_way_out() -> None:
    found = read("hostname box\npython 3.9.2 /usr/bin/python3\n")
    assert found.state is HostState.NOT_READY
    assert found.cause == "Python 3.9.2 is too old, 3.11 is needed"
    assert "install Python 3.11 on h" in found.hint
    assert "fleet.yml" in found.hint
    assert found.hostname == "box"


def test_no_python_is_said() -> None:
    assert read("hostname box\n").cause == "no Python 3 on the host"


def test_a_python_named_in_the_campaign_is_the_only_one_meant() -> None:
    found = read("", replace(HOST, python="/opt/py"))
    assert (found.state, found.cause) == (HostState.NOT_READY, "no usable Python at /opt/py")
    assert "fleet.yml" not in found.hint


def test_chatter_of_a_login_shell_is_not_taken_for_facts() -> None:
    assert read("Welcome to box!\n\npython\n").state is HostState.NOT_READY


def test_a_local_probe_with_a_named_python_that_is_not_there() -> None:
    found = reach.probe(replace(HOST, python="/no/such/python"))
    assert (found.state, found.cause) == (HostState.NOT_READY, "no usable Python at /no/such/python")


def test_a_failing_probe_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Host) -> reach.Connection:
        raise Unreachable(HostState.UNKNOWN_KEY, "who is this", "compare it")

    monkeypatch.setattr(reach, "connect", refuse)
    found = reach.probe_all([HOST, replace(HOST, name="i")])
    assert [item.host for item in found] == ["h", "i"]
    assert {(item.state, item.cause, item.hint) for item in found} == {
        (HostState.UNKNOWN_KEY, "who is this", "compare it")
    }
    assert reach.probe_all([]) == ()


def test_an_ssh_host_that_does_not_exist_is_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config"
    config.write_text("Host gone\n  HostName 127.0.0.1\n  Port 1\n  ConnectTimeout 2\n", encoding="utf-8")
    monkeypatch.setenv("FLEET_SSH_CONFIG", str(config))
    found = reach.probe(replace(HOST, connection="ssh", address="gone"))
    assert found.state is HostState.UNREACHABLE
    assert "127.0.0.1 port 1" in found.cause
    assert found.hint.startswith("ssh -F ")


def test_a_local_command_says_all_three() -> None:
    answer = LocalConnection().run("echo out; echo err >&2; printf '\\377'; exit 3", timeout=10)
    assert answer == Answer(rc=3, out="out\n\N{REPLACEMENT CHARACTER}", err="err\n")


def test_a_local_command_that_hangs_is_unreachable_in_time() -> None:
    started = time.monotonic()
    with pytest.raises(Unreachable, match="no answer in 1 s") as caught:
        LocalConnection().run("sleep 30", timeout=1)
    assert caught.value.state is HostState.UNREACHABLE
    assert time.monotonic() - started < 5


@pytest.mark.xfail(
    strict=True,
    raises=pytest.fail.Exception,
    reason="on a timeout only the shell is killed: use start_new_session and killpg",
)
def test_a_local_command_that_hangs_leaves_no_process(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(Unreachable):
        LocalConnection().run(f"sleep 20 & echo $! > {note}; wait", timeout=1)
    pid = int(note.read_text(encoding="ascii"))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return
    os.kill(pid, 9)
    pytest.fail("the command goes on")


def test_connect_knows_local_hosts() -> None:
    connection = reach.connect(HOST)
    assert isinstance(connection, LocalConnection)
    connection.close()
    connection.close()
