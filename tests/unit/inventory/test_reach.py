"""The probe's answers, and shell commands on this machine."""

import errno
import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paramiko
import pytest
import yaml

from fleet.inventory import files, reach
from fleet.inventory.hosts import Host, Reachability
from fleet.inventory.reach import Answer, LocalConnection, SshConnection, Unreachable
from fleet.terms import HostKind, HostState
from tests.unit.fakes import FakeConnection, scene

HOST = Host(name="h", kind=HostKind.SERVER, connection="local", address="h")
FOUND = Reachability(host="h", kind=HostKind.SERVER, state=HostState.READY)


def read(out: str, host: Host = HOST) -> Reachability:
    return reach._read_probe(FOUND, host, Answer(rc=0, out=out, err=""))


def test_the_first_python_new_enough_is_taken() -> None:
    found = read(
        "hostname box\nhome /home/a.b\nmachine-id 0123\npython 3.9.2 /usr/bin/python3\n"
        "python 3.12.1 /usr/bin/python3.12\npython 3.13.0 /usr/bin/python3.13\n"
    )
    assert (found.hostname, found.home, found.machine_id) == ("box", "/home/a.b", "0123")
    assert (found.state, found.python, found.python_version) == (HostState.READY, "/usr/bin/python3.12", "3.12.1")


def test_versions_are_numbers_not_texts() -> None:
    assert read("python 3.9.99 /old\n").state is HostState.NOT_READY
    assert read("home /root\npython 3.11.0 /just\n").state is HostState.READY
    assert read("home /root\npython 3.11.0+ /vendor\n").python == "/vendor"


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


def test_a_full_disk_is_said_before_ansible_stumbles_over_it() -> None:
    full = "hostname box\nhome /home/me\nfree-kib {}\nmachine-id 0123\npython 3.12.1 /usr/bin/python3\n"
    with pytest.raises(Unreachable) as caught:
        read(full.format(1500), replace(HOST, user="me"))
    assert caught.value.state is HostState.NOT_READY
    assert caught.value.cause == "disk full: 1 MiB free for me's files or in /tmp"
    assert caught.value.hint == "free some space on h, then: fleet check"
    with pytest.raises(Unreachable, match="disk full: 0 MiB free for the user's files"):
        read(full.format(0))
    for plenty in (16 * 1024, 10**9, "", "?", "²"):
        assert read(full.format(plenty)).state is HostState.READY


def test_a_full_disk_is_the_probes_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "connect", lambda _: FakeConnection(["home /home/me\nfree-kib 0\npython 3.12.1 /p\n"]))
    found = reach.probe(HOST)
    assert (found.state, found.cause) == (HostState.NOT_READY, "disk full: 0 MiB free for the user's files or in /tmp")
    assert found.hint


def test_the_probe_prints_home_and_free_space() -> None:
    script = reach._PROBE.format(candidates=sys.executable, minimum=reach.PYTHON_MINIMUM)
    said = dict(line.partition(" ")[::2] for line in LocalConnection().run(script, timeout=20).out.splitlines())
    assert said["home"] == os.environ["HOME"]
    assert int(said["free-kib"]) > 0
    assert said["python"].endswith(sys.executable)


def test_chatter_of_a_login_shell_is_not_taken_for_facts() -> None:
    assert read("Welcome to box!\n\nhomes and pythons\n").state is HostState.NOT_READY


TEMPLATE = "{{ lookup('pipe', 'id') }}"


@pytest.mark.parametrize("path", [TEMPLATE, f"/home/{TEMPLATE}", "{% raw %}", "home", "~", "", "/a b", "/a\tb", "/é"])
@pytest.mark.parametrize("said", ["home {}\npython 3.12.1 /usr/bin/python3\n", "home /home/me\npython 3.12.1 {}\n"])
def test_only_a_plain_absolute_path_of_a_host_reaches_the_inventory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, path: str
) -> None:
    made = scene(tmp_path)
    monkeypatch.setattr(reach, "connect", lambda _: FakeConnection([said.format(path)]))
    (found,) = files.make(made.session, made.campaign, base=tmp_path, source="fleet.yml")
    assert (found.state, found.cause) == (HostState.NOT_READY, f"it names {path!r} as a path")
    assert found.hint
    assert (found.home, found.python) == ("", "")
    written = yaml.safe_load((made.session.inventory / "hosts.yml").read_text(encoding="utf-8"))
    variables = written["all"]["children"]["sut"]["children"]["servers"]["hosts"]["h01"]
    assert variables["fleet_work_dir"] == "~/.mlperf-fleet"
    assert "ansible_python_interpreter" not in variables
    assert "lookup" not in (made.session.inventory / "hosts.yml").read_text(encoding="utf-8")


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


def test_a_host_that_takes_the_connection_and_says_nothing_is_an_answer_without_a_traceback(tmp_path: Path) -> None:
    """In a process of its own: pytest takes what is logged."""
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        config = tmp_path / "config"
        port = frozen.getsockname()[1]
        config.write_text(f"Host ice\n  HostName 127.0.0.1\n  Port {port}\n  ConnectTimeout 1\n", encoding="utf-8")
        code = (
            "from fleet.inventory import hosts, reach; from fleet.terms import HostKind; import time;"
            "found = reach.probe(hosts.Host(name='h', kind=HostKind.SERVER, connection='ssh', address='ice'));"
            "time.sleep(0.3); print(found.state, found.cause)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60,
            env={**os.environ, "FLEET_SSH_CONFIG": str(config)},
        )  # fmt: skip
    cause = f"no answer from 127.0.0.1 port {port}: it takes the connection and says nothing"
    assert (done.stdout, done.stderr) == (f"unreachable {cause}\n", "")


def test_a_local_command_says_all_three() -> None:
    answer = LocalConnection().run("echo out; echo err >&2; printf '\\377'; exit 3", timeout=10)
    assert answer == Answer(rc=3, out="out\n\N{REPLACEMENT CHARACTER}", err="err\n")


def test_a_local_command_that_hangs_is_unreachable_in_time() -> None:
    started = time.monotonic()
    with pytest.raises(Unreachable, match="no answer in 0 s") as caught:
        LocalConnection().run("sleep 30", timeout=0.3)
    assert caught.value.state is HostState.UNREACHABLE
    assert time.monotonic() - started < 5


def test_a_local_command_that_hangs_leaves_no_process(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(Unreachable):
        LocalConnection().run(f"sleep 20 & echo $! > {note}; wait", timeout=0.3)
    process = Path("/proc", note.read_text(encoding="ascii").strip())
    end = time.monotonic() + 5
    # Once killed it may be a zombie for as long as init likes.
    while process.exists() and process.joinpath("stat").read_text(encoding="ascii").rpartition(") ")[2][0] != "Z":
        assert time.monotonic() < end, "the command goes on"
        time.sleep(0.01)


@pytest.mark.parametrize("size", [0, 1, 2**17 - 1, 2**17, 2**17 + 1, 10**6])
def test_what_a_local_command_prints_is_copied_byte_for_byte(tmp_path: Path, size: int) -> None:
    (tmp_path / "sent").write_bytes(os.urandom(size))
    sink = io.BytesIO()
    LocalConnection().copy(f"cat {tmp_path / 'sent'}", sink, limit=size)
    assert sink.getvalue() == (tmp_path / "sent").read_bytes()


def test_bytes_are_added_to_what_the_sink_has() -> None:
    sink = io.BytesIO(b"begun, ")
    sink.seek(0, io.SEEK_END)
    LocalConnection().copy("printf 'begun, and gone on with' | tail -c +8", sink, limit=99)
    assert sink.getvalue() == b"begun, and gone on with"


def test_a_local_command_that_prints_too_much_is_cut_off() -> None:
    sink, started = io.BytesIO(), time.monotonic()
    with pytest.raises(ValueError, match="it sends more than it announced"):
        LocalConnection().copy("cat /dev/zero", sink, limit=3 * 2**17)
    assert len(sink.getvalue()) <= 3 * 2**17
    assert time.monotonic() - started < 5


def test_one_byte_too_many_is_too_much() -> None:
    LocalConnection().copy("printf 1234", io.BytesIO(), limit=4)
    with pytest.raises(ValueError, match="more than it announced"):
        LocalConnection().copy("printf 12345", io.BytesIO(), limit=4)


@dataclass
class Channel:
    """What paramiko opens: says its pieces one after another, then nothing; a piece may be an exception."""

    pieces: list[bytes | Exception]
    closing: Exception | None = None
    commands: list[str] = field(default_factory=list)
    closed: int = 0

    def settimeout(self, seconds: float) -> None:
        assert seconds == reach.STALLED_S

    def exec_command(self, command: str) -> None:
        self.commands.append(command)

    def recv(self, size: int) -> bytes:
        piece = self.pieces.pop(0) if self.pieces else b""
        if isinstance(piece, Exception):
            raise piece
        assert len(piece) <= size
        return piece

    def close(self) -> None:
        self.closed += 1
        if self.closing:
            raise self.closing


@pytest.fixture
def over(monkeypatch: pytest.MonkeyPatch) -> Callable[[Channel], SshConnection]:
    """An ssh connection whose next channel is the one given."""

    def opened(channel: Channel) -> SshConnection:
        transport = SimpleNamespace(open_session=lambda **_: channel)
        monkeypatch.setattr(reach, "_connect", lambda _: SimpleNamespace(get_transport=lambda: transport))
        return SshConnection(replace(HOST, connection="ssh"))

    return opened


def test_what_a_host_prints_is_copied_as_it_comes(over: Callable[[Channel], SshConnection]) -> None:
    channel, sink = Channel([b"one", b"\x00", b"three"]), io.BytesIO()
    over(channel).copy("tail -c +1 it", sink, limit=9)
    assert (sink.getvalue(), channel.commands, channel.closed) == (b"one\0three", ["tail -c +1 it"], 1)


@pytest.mark.parametrize("closing", [None, EOFError(), OSError("broken pipe"), paramiko.SSHException("gone")])
@pytest.mark.parametrize(
    ("lost", "cause"),
    [
        (TimeoutError(), "no answer in 15 s"),
        (EOFError(), "connection lost (EOFError)"),
        (OSError("reset"), "connection lost (reset)"),
        (paramiko.SSHException("no"), "connection lost (no)"),
    ],
)
def test_a_transfer_that_is_lost_keeps_what_came_and_its_cause(
    over: Callable[[Channel], SshConnection], lost: Exception, cause: str, closing: Exception | None
) -> None:
    channel, sink = Channel([b"begun", lost], closing), io.BytesIO()
    with pytest.raises(Unreachable) as caught:
        over(channel).copy("cat it", sink, limit=100)
    assert (caught.value.state, caught.value.cause) == (HostState.UNREACHABLE, cause)
    assert (sink.getvalue(), channel.closed) == (b"begun", 1)


class FreezesOnExec(paramiko.ServerInterface):
    """An ssh server that lets anybody in, opens channels, and stops dead when it is to run something."""

    def __init__(self) -> None:
        self.asked, self.thawed = threading.Event(), threading.Event()

    def check_auth_none(self, username: str) -> int:
        del username
        return paramiko.common.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        del kind, chanid
        return paramiko.common.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        del channel, command
        self.asked.set()
        self.thawed.wait()
        return False


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SshConnection, FreezesOnExec]]:
    """A connection, over this machine's own network, to a host that freezes when it is asked."""
    host = FreezesOnExec()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = paramiko.Transport(socket.create_connection(listening.getsockname()))
        far = paramiko.Transport(listening.accept()[0])
    far.add_server_key(paramiko.ECDSAKey.generate())
    far.start_server(server=host, event=threading.Event())
    near.start_client(timeout=20)
    near.auth_none("me")
    monkeypatch.setattr(reach, "_connect", lambda _: SimpleNamespace(get_transport=lambda: near, close=near.close))
    yield SshConnection(replace(HOST, connection="ssh")), host
    host.thawed.set()
    near.close()
    far.close()


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "ask",
    [
        lambda connection: connection.run("true", timeout=0.5),
        lambda connection: connection.run("true", timeout=600, stalled=0.5),
        lambda connection: connection.copy("cat it", io.BytesIO(), limit=9, stalled=0.5),
    ],
    ids=["run", "run with a shorter patience", "copy"],
)
def test_a_host_that_freezes_between_channel_and_command_is_not_waited_for(
    frozen: tuple[SshConnection, FreezesOnExec], ask: Callable[[SshConnection], Any]
) -> None:
    connection, host = frozen
    with pytest.raises(Unreachable) as caught:
        ask(connection)
    assert host.asked.is_set()
    assert caught.value.cause == "no answer in 0 s"
    connection.close()


def test_an_ssh_host_that_sends_too_much_is_cut_off(over: Callable[[Channel], SshConnection]) -> None:
    channel, sink = Channel([b"12", b"34", b"56"], EOFError()), io.BytesIO()
    with pytest.raises(ValueError, match="it sends more than it announced"):
        over(channel).copy("cat it", sink, limit=3)
    assert (sink.getvalue(), channel.closed) == (b"12", 1)


def test_a_full_disk_here_is_not_the_hosts_fault(over: Callable[[Channel], SshConnection]) -> None:
    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        over(Channel([b"1"])).copy("cat it", Full(), limit=3)


def test_connect_knows_local_hosts() -> None:
    connection = reach.connect(HOST)
    assert isinstance(connection, LocalConnection)
    connection.close()
    connection.close()


def test_a_local_command_gets_its_standard_input_and_else_none() -> None:
    assert LocalConnection().run("cat", timeout=10, stdin=b"queue").out == "queue"
    assert LocalConnection().run("cat", timeout=10).out == ""


def test_many_silent_hosts_are_probed_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = threading.Barrier(101)

    def connect(_: Host) -> reach.Connection:
        # Whoever queues behind others never gets here, and the barrier breaks.
        silent.wait(20)
        raise Unreachable(HostState.UNREACHABLE, "no answer")

    monkeypatch.setattr(reach, "connect", connect)
    threading.Thread(target=silent.wait, args=(20,), daemon=True).start()
    found = reach.probe_all([replace(HOST, name=f"h{number}") for number in range(100)])
    assert [item.host for item in found] == [f"h{number}" for number in range(100)]
    assert {item.cause for item in found} == {"no answer"}
