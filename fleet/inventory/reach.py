"""The control channel: a shell command on a host, over paramiko with the host's key checked, or right here.

The probe before any Ansible says why a host cannot be used; the run stage polls over the same connections.
"""

import base64
import contextlib
import hashlib
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

import paramiko
import tenacity

from fleet import threads
from fleet.errors import FleetError
from fleet.inventory import ssh_config
from fleet.inventory.hosts import Host, Reachability
from fleet.terms import HostState

PYTHON_MINIMUM = (3, 11)
ANSWER_LIMIT = 4 * 1024 * 1024
"""Bytes read from one command: a host is not trusted to stop."""
PROBE_TIMEOUT = 20.0
STALLED_S = 15.0
"""A transfer in which nothing came for so long has broken off."""
UNACKNOWLEDGED_S = 20.0
"""What a host has not acknowledged for so long ends the connection: keepalives only send, and notice nothing."""
LOOK_AROUND_S = 1.0
"""So long paramiko waits for a packet before it sees whether a keepalive is due."""
SILENT = re.compile("protocol banner|No existing session")
"""What paramiko says of a frozen host, whose kernel still takes connections."""
ANSIBLE_NEEDS_KIB = 16 * 1024
"""Below this Ansible itself fails on a host, with words that do not say why."""
AGAIN_S = 2.0
"""Between two attempts to reach an instance that was just launched."""
REFUSES_S = 45.0
"""So long an instance that boots may answer and refuse the login: sshd is up before the user, and before boot ends."""

# Its threads log what also becomes an answer here, with a traceback: for who asks for logs, not onto every screen.
logging.getLogger("paramiko").addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a command said."""

    rc: int
    out: str
    err: str


class Unreachable(Exception):  # noqa: N818 - a state of a host, not a mistake
    """A host that cannot be reached, with the state, cause and next command."""

    def __init__(self, state: HostState, cause: str, hint: str = "", *, silent: bool = False) -> None:
        super().__init__(cause)
        self.state = state
        self.cause = cause
        self.hint = hint
        self.silent = silent
        """No ssh server has said anything: on a machine that boots, one will."""


class Connection(Protocol):
    """An open way to a host."""

    def run(self, command: str, *, timeout: float, stdin: bytes = b"", stalled: float | None = None) -> Answer:
        """Run a shell command, `stdin` to its standard input.

        Raises Unreachable when the host does not answer in `timeout` seconds, or prints nothing for `stalled` seconds.
        """

    def copy(self, command: str, sink: BinaryIO, *, limit: int, stalled: float = STALLED_S) -> None:
        """Write at most `limit` bytes of what a shell command prints into `sink`, as they come.

        Raises Unreachable when nothing comes for `stalled` seconds, and ValueError when more than `limit` does.
        """

    def close(self) -> None:
        """Close it; closing twice is fine."""


class LocalConnection:
    """The controller's own machine as a host."""

    def run(self, command: str, *, timeout: float, stdin: bytes = b"", stalled: float | None = None) -> Answer:
        """Run a shell command here; this machine does not stall."""
        del stalled
        pipe = subprocess.PIPE
        with subprocess.Popen(
            ["/bin/sh", "-c", command], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        ) as process:
            try:
                out, err = process.communicate(stdin, timeout=timeout)
            except subprocess.TimeoutExpired as error:
                os.killpg(process.pid, signal.SIGKILL)
                raise Unreachable(HostState.UNREACHABLE, f"no answer in {timeout:.0f} s") from error
        return Answer(rc=process.returncode, out=out.decode(errors="replace"), err=err.decode(errors="replace"))

    def copy(self, command: str, sink: BinaryIO, *, limit: int, stalled: float = STALLED_S) -> None:
        """Write what a shell command prints here into `sink`."""
        del stalled
        with subprocess.Popen(["/bin/sh", "-c", command], stdout=subprocess.PIPE) as process:
            try:
                _pour(process.stdout.read if process.stdout else lambda _: b"", sink, limit)
            finally:
                process.kill()

    def close(self) -> None:
        """Nothing to close."""


class _RefuseUnknown(paramiko.MissingHostKeyPolicy):
    def __init__(self, host: Host) -> None:
        self._host = host

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        del client, hostname
        if self._host.instance is not None and self._host.instance.known_hosts:
            raise _impostor(self._host, key)
        raise Unreachable(
            HostState.UNKNOWN_KEY,
            f"its {key.get_name()} host key {fingerprint(key)} is not in your known_hosts",
            "compare the fingerprint, then: " + _ssh_command(self._host, "-o", "StrictHostKeyChecking=accept-new"),
        )


def _impostor(host: Host, key: paramiko.PKey) -> Unreachable:
    """A host key that is not the one which the instance was launched with; nothing was said to whoever has it."""
    number = host.instance.id if host.instance is not None else ""
    return Unreachable(
        HostState.CHANGED_KEY,
        f"its {key.get_name()} host key {fingerprint(key)} is not the one that {number} was launched with",
        f"see whether {host.address} is still the address of {number}: fleet down ends it",
    )


class _Awaited(threading.Event):
    """A host's answer to a request. paramiko would wait for that of a frozen host for ever: its kernel still acknowledges."""

    def __init__(self, patience: float) -> None:
        super().__init__()
        self._patience = patience

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for it. Raises TimeoutError when nobody said how long, and it does not come."""
        came = super().wait(self._patience if timeout is None else timeout)
        if not came and timeout is None:
            raise TimeoutError
        return came


class SshConnection:
    """One paramiko session with keepalives; its host key was checked against the user's known_hosts."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._client = _connect(host)

    def run(self, command: str, *, timeout: float, stdin: bytes = b"", stalled: float | None = None) -> Answer:
        """Run a shell command on the host."""
        end = time.monotonic() + timeout
        patience = min(timeout, stalled or timeout)
        with self._lost_in(patience):
            channel = self._open_channel(patience)
            channel.exec_command(command)
            if stdin:
                channel.sendall(stdin)
                channel.shutdown_write()
            out = _drain(channel, end)
            err = channel.recv_stderr(65536) if channel.recv_stderr_ready() else b""
            while not channel.exit_status_ready():
                if time.monotonic() > end:
                    raise TimeoutError
                time.sleep(0.01)
            rc = channel.recv_exit_status()
            channel.close()
        return Answer(rc=rc, out=out.decode(errors="replace"), err=err.decode(errors="replace"))

    def copy(self, command: str, sink: BinaryIO, *, limit: int, stalled: float = STALLED_S) -> None:
        """Write what a shell command on the host prints into `sink`."""
        with self._lost_in(stalled):
            channel = self._open_channel(stalled)
            channel.exec_command(command)

        def receive(size: int) -> bytes:
            # Around the network alone: a full disk here is not the host's fault.
            with self._lost_in(stalled):
                return channel.recv(size)

        try:
            _pour(receive, sink, limit)
        finally:
            # Of a connection that is lost, close raises as well, and would hide what was the matter.
            with contextlib.suppress(paramiko.SSHException, OSError, EOFError):
                channel.close()

    def _open_channel(self, timeout: float) -> paramiko.Channel:
        transport = self._client.get_transport()
        if transport is None:
            raise Unreachable(HostState.UNREACHABLE, "the connection is closed")
        channel = transport.open_session(timeout=timeout)
        channel.settimeout(timeout)
        # Which is for data alone.
        channel.event = _Awaited(timeout)
        return channel

    @contextlib.contextmanager
    def _lost_in(self, timeout: float) -> Iterator[None]:
        """What the network raises, as Unreachable."""
        try:
            yield
        except (TimeoutError, paramiko.SSHException, OSError, EOFError) as error:
            stalled = isinstance(error, TimeoutError)
            reason = f"no answer in {timeout:.0f} s" if stalled else f"connection lost ({_words(error)})"
            raise Unreachable(HostState.UNREACHABLE, reason, _ssh_command(self._host)) from error

    def close(self) -> None:
        """Close the session."""
        self._client.close()


def _pour(read: Callable[[int], bytes], sink: BinaryIO, limit: int) -> None:
    left = limit
    while piece := read(1 << 17):
        left -= len(piece)
        if left < 0:
            raise ValueError("it sends more than it announced")
        sink.write(piece)


def _drain(channel: paramiko.Channel, end: float) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while piece := channel.recv(65536):
        pieces.append(piece)
        size += len(piece)
        if size > ANSWER_LIMIT or time.monotonic() > end:
            raise TimeoutError
    return b"".join(pieces)


def fingerprint(key: paramiko.PKey) -> str:
    """SHA256 fingerprint as OpenSSH prints it."""
    digest = hashlib.sha256(key.asbytes()).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def connect(host: Host) -> Connection:
    """Open a connection to `host`.

    Raises Unreachable with the state, cause and next command.
    """
    if host.missing:
        had = host.instance is not None and host.instance.id
        state = HostState.UNREACHABLE if had else HostState.NOT_READY
        raise Unreachable(state, host.missing, "fleet up" if host.launched else "fleet inventory")
    return LocalConnection() if host.connection == "local" else SshConnection(host)


def _connect(host: Host) -> paramiko.SSHClient:
    try:
        target = ssh_config.resolve(host)
    except FleetError as error:
        raise Unreachable(HostState.UNREACHABLE, error.message, error.hint) from error
    client = paramiko.SSHClient()
    for name in target.known_hosts:
        if Path(name).is_file():
            client.load_system_host_keys(name)
    client.set_missing_host_key_policy(_RefuseUnknown(host))
    keys = [name for name in target.identity_files if Path(name).is_file()]
    try:
        client.connect(
            # An alias stands in known_hosts without a port; the socket is open already, so the port only names the key.
            target.host_key_alias or target.hostname,
            port=paramiko.config.SSH_PORT if target.host_key_alias else target.port,
            username=target.user,
            key_filename=keys,  # type: ignore[arg-type]  # its documentation allows a list
            look_for_keys=False,
            allow_agent=not target.identities_only,
            timeout=target.connect_timeout,
            banner_timeout=target.connect_timeout,
            auth_timeout=target.connect_timeout,
            sock=_open_socket(target),
        )
    except Unreachable:
        client.close()
        raise
    except Exception as error:
        client.close()
        raise _explain(error, host, target) from error
    if transport := client.get_transport():
        transport.set_keepalive(5)
        # Its reader looks around between two packets, ten times a second: with many hosts that costs more than asking them.
        transport.sock.settimeout(LOOK_AROUND_S)
    return client


def _open_socket(target: ssh_config.Target) -> "socket.socket | paramiko.ProxyCommand":
    if target.proxy_command:
        return paramiko.ProxyCommand(shlex.join(["/bin/sh", "-c", f"exec {target.proxy_command}"]))
    opened = socket.create_connection((target.hostname, target.port), timeout=target.connect_timeout)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNACKNOWLEDGED_S * 1000))
    return opened


def _explain(error: Exception, host: Host, target: ssh_config.Target) -> Unreachable:
    where = f"{target.hostname} port {target.port}"
    lost = HostState.UNREACHABLE
    by_hand = _ssh_command(host)
    if isinstance(error, paramiko.BadHostKeyException):
        if host.instance is not None and host.instance.known_hosts:
            return _impostor(host, error.key)
        name = target.host_key_alias or target.hostname
        entry = name if target.host_key_alias or target.port == paramiko.config.SSH_PORT else f"[{name}]:{target.port}"
        held = next((known for known in target.known_hosts if Path(known).is_file()), "~/.ssh/known_hosts")
        return Unreachable(
            HostState.CHANGED_KEY,
            f"its {error.key.get_name()} host key changed to {fingerprint(error.key)}; known is {fingerprint(error.expected_key)}",
            f"if the host was reinstalled: ssh-keygen -f {shlex.quote(held)} -R {shlex.quote(entry)} && {by_hand}",
        )
    if isinstance(error, paramiko.PasswordRequiredException):
        return Unreachable(lost, "the private key has a passphrase and no agent holds it", "ssh-add, then again")
    if isinstance(error, paramiko.AuthenticationException):
        tried = ", ".join(name for name in target.identity_files if Path(name).is_file()) or "no key file"
        tried += "" if target.identities_only else " and the agent"
        return Unreachable(lost, f"login as {target.user} refused by {where} (tried {tried})", by_hand)
    if isinstance(error, socket.gaierror):
        return Unreachable(lost, f"the name {target.hostname} does not resolve", by_hand)
    said = f"{where}: {_words(error)}"
    if isinstance(error, TimeoutError):
        said = f"no answer from {where} in {target.connect_timeout:.0f} s"
    elif isinstance(error, paramiko.SSHException) and SILENT.search(str(error)):
        said = f"no answer from {where}: it takes the connection and says nothing"
    return Unreachable(lost, said, by_hand, silent=not isinstance(error, paramiko.ssh_exception.IncompatiblePeer))


def _words(error: Exception) -> str:
    """What an error says; some say nothing, such as the EOFError of a connection that was cut."""
    return str(error) or type(error).__name__


def _ssh_command(host: Host, *options: str) -> str:
    command = ["ssh", *ssh_config.ssh_arguments(), *ssh_config.trust(host), *options]
    command += ["-p", str(host.port)] if host.port else []
    command += ["-i", host.identity_file] if host.identity_file else []
    return shlex.join([*command, f"{host.user}@{host.address}" if host.user else host.address, "true"])


_PROBE = """
echo hostname "$(cat /proc/sys/kernel/hostname)"
echo home "$HOME"
echo free-kib "$(df -Pk "$HOME" /tmp 2>/dev/null | awk 'NR > 1 {{print $4}}' | sort -n | head -n 1)"
echo machine-id "$(cat /etc/machine-id 2>/dev/null)"
for python in {candidates}; do
  found=$(command -v "$python" 2>/dev/null) || continue
  version=$("$found" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
  echo python "$version" "$found"
  "$found" -c 'import sys; sys.exit(sys.version_info < {minimum})' && break
done
"""


_BOOTED = "! command -v cloud-init >/dev/null 2>&1 || cloud-init status --wait >/dev/null 2>&1"
"""Ends when cloud-init has: sshd answers long before the last package of an instance's user data is installed."""


def _patiently(host: Host) -> Connection:
    """Open a connection to a host, again and again while an instance boots that was just launched.

    Raises Unreachable as `connect` does: at once for a host key that is not the right one.
    """
    patience = host.instance.patience_s if host.instance is not None else 0.0
    answers = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, Unreachable) and error.silent),
        stop=tenacity.stop_after_delay(patience),
        wait=tenacity.wait_fixed(AGAIN_S),
        reraise=True,
    )
    lets_in = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error.__cause__, paramiko.AuthenticationException)),
        stop=tenacity.stop_after_delay(min(patience, REFUSES_S)),
        wait=tenacity.wait_fixed(AGAIN_S),
        reraise=True,
    )
    connection: Connection = lets_in(answers, connect, host)
    return connection


def probe(host: Host) -> Reachability:
    """Reach one host, log in, and find its Python; every failure is an answer, none an exception."""
    started = time.monotonic()
    found = Reachability(host=host.name, kind=host.kind, state=HostState.READY)
    versions = [f"python3.{minor}" for minor in range(11, 16)]
    candidates = shlex.join([host.python] if host.python else ["python3", *versions])
    try:
        connection = _patiently(host)
        try:
            if host.instance is not None and host.instance.patience_s:
                connection.run(_BOOTED, timeout=host.instance.patience_s)
            answer = connection.run(_PROBE.format(candidates=candidates, minimum=PYTHON_MINIMUM), timeout=PROBE_TIMEOUT)
        finally:
            connection.close()
        found = _read_probe(found, host, answer)
    except Unreachable as error:
        found = replace(found, state=error.state, cause=error.cause, hint=error.hint)
    return replace(found, seconds=time.monotonic() - started)


def _read_probe(found: Reachability, host: Host, answer: Answer) -> Reachability:
    pythons: list[tuple[str, str]] = []
    for line in answer.out.splitlines():
        key, _, value = line.partition(" ")
        if key == "hostname":
            found = replace(found, hostname=value)
        elif key == "home":
            found = replace(found, home=value)
        elif key == "free-kib" and re.fullmatch("[0-9]{1,15}", value) and int(value) < ANSIBLE_NEEDS_KIB:
            raise Unreachable(
                HostState.NOT_READY,
                f"disk full: {int(value) / 1024:.0f} MiB free for {host.user or 'the user'}'s files or in /tmp",
                f"free some space on {host.name}, then: fleet check",
            )
        elif key == "machine-id":
            found = replace(found, machine_id=value)
        elif key == "python":
            version, _, path = value.partition(" ")
            pythons.append((version, path))
    wanted = ".".join(map(str, PYTHON_MINIMUM))
    for version, path in pythons:
        if _version(version) >= PYTHON_MINIMUM:
            return replace(found, python=_path(path), home=_path(found.home), python_version=version)
    install = f"install Python {wanted} on {host.name} (Debian, Ubuntu: sudo apt-get install python3 python3-venv)"
    if host.python:
        return replace(found, state=HostState.NOT_READY, cause=f"no usable Python at {host.python}", hint=install)
    cause = f"Python {pythons[0][0]} is too old, {wanted} is needed" if pythons else "no Python 3 on the host"
    return replace(
        found, state=HostState.NOT_READY, cause=cause, hint=f"{install}, or name one with `python:` in fleet.yml"
    )


def _path(text: str) -> str:
    """A path that a host names, as it goes into the inventory, where Ansible would run a template in it.

    Raises Unreachable when it is anything but a plain absolute path.
    """
    if not re.fullmatch(r"/[A-Za-z0-9._/+@-]{0,500}", text):
        raise Unreachable(HostState.NOT_READY, f"it names {text[:80]!r} as a path", "look at that host's HOME and PATH")
    return text


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall("[0-9]{1,3}", text)[:3])


def probe_all(hosts: Iterable[Host]) -> tuple[Reachability, ...]:
    """Probe hosts side by side; one answer per host, in order."""
    listed = list(hosts)
    found = dict(threads.each(lambda number: probe(listed[number]), range(len(listed))))
    return tuple(found[number] for number in range(len(listed)))
