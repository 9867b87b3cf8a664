"""The lab: a controller's place and hosts that answer real ssh, each with its own disk, name, processes and network."""

from __future__ import annotations

import atexit
import dataclasses
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tests.lab import commands, network, rootfs, tmpfs
from tests.lab.cgroups import Cgroup
from tests.lab.commands import LabError
from tests.lab.host import HostOptions, HostProcess, LabHost, Wiring, processes
from tests.lab.record import NETNS, Record, clean_stale

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

__all__ = ["Lab", "LabError", "LabHost"]

_T = TypeVar("_T")
_BOOT_SECONDS = 60.0


@dataclasses.dataclass
class _Key:
    path: Path

    @property
    def public(self) -> str:
        return self.path.with_suffix(".pub").read_text()


class Lab:
    """Hosts h01, h02, ... and a hub namespace, from where the controller reaches them; a context manager.

    ``names`` replaces the default names. ``mounts`` maps a directory of this machine to an absolute path in every
    host, read-only. ``extra_layers`` are directories laid under every host's disk, over the base system. Per host
    name: ``hostname`` is what the host calls itself, ``disk_mb`` is a disk of that size, ``memory_mb`` a limit on what its processes get, ``meminfo_mb`` what
    its /proc/meminfo shows. ``unknown`` names hosts whose key the controller does not know.
    """

    def __init__(
        self,
        count: int = 3,
        *,
        user: str = "bench",
        names: Sequence[str] | None = None,
        mounts: Mapping[Path, str] | None = None,
        extra_layers: Sequence[Path] = (),
        hostname: Mapping[str, str] | None = None,
        disk_mb: Mapping[str, int] | None = None,
        memory_mb: Mapping[str, int] | None = None,
        meminfo_mb: Mapping[str, int] | None = None,
        unknown: Collection[str] = (),
    ) -> None:
        self.user = user
        self.name = f"lab{secrets.token_hex(4)}"
        self.hub = f"{self.name}-hub"
        self._names = list(names) if names is not None else [f"h{index:02}" for index in range(1, count + 1)]
        named = {*(hostname or {}), *(disk_mb or {}), *(memory_mb or {}), *(meminfo_mb or {}), *unknown}
        if strangers := named - set(self._names):
            raise LabError(f"no host of this lab: {', '.join(sorted(strangers))}")
        self._options = {
            name: HostOptions(
                hostname=(hostname or {}).get(name, ""),
                disk_mb=(disk_mb or {}).get(name),
                memory_mb=(memory_mb or {}).get(name),
                meminfo_mb=(meminfo_mb or {}).get(name),
                mounts=dict(mounts or {}),
                layers=tuple(extra_layers),
            )
            for name in self._names
        }
        self._unknown = set(unknown)
        self._owner = os.getpid()
        self._record: Record | None = None
        self._homes: dict[int, Path] = {}
        self.hosts: dict[str, LabHost] = {}
        self.directory = Path()
        self.ready_seconds = 0.0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __getitem__(self, name: str) -> LabHost:
        return self.hosts[name]

    # --- up and down

    def start(self) -> None:
        """Bring everything up; returns when every sshd answers."""
        if reason := rootfs.missing():
            raise LabError(reason)
        clean_stale()
        base = rootfs.base()
        begun = time.monotonic()
        # Short, because ssh puts its control sockets below the home and their paths end at 108 characters.
        self.directory = Path(tempfile.gettempdir()) / self.name
        self._record = self._new_record()
        atexit.register(self.stop)
        try:
            self._record.save()
            with commands.readable_files():
                self.directory.mkdir()
                self._build(base)
        except BaseException:
            self.stop()
            raise
        self.ready_seconds = time.monotonic() - begun

    def _new_record(self) -> Record:
        names = [f"{self.name}-{name}" for name in self._names]
        groups = [f"{self.name}/{name}" for name in ("controller", *self._names)]
        disks = [str(self.directory / "hosts" / name / "disk") for name in self._names]
        return Record(self.name, str(self.directory), namespaces=[self.hub, *names], cgroups=groups, mounts=disks)

    def _build(self, base: Path) -> None:
        self._controller = Cgroup(f"{self.name}/controller")
        self._controller.create()
        network.create(self.hub, {i: f"{self.name}-{name}" for i, name in enumerate(self._names, 1)})
        addresses = {name: network.address(index) for index, name in enumerate(self._names, 1)}
        keys = self._make_keys()
        wiring = Wiring(self.name, self.hub, base, self.user, addresses, keys["controller"].public)
        for index, (name, options) in enumerate(self._options.items(), 1):
            state = self.directory / "hosts" / name
            self.hosts[name] = LabHost(
                name, index, state=state, wiring=wiring, options=options, host_key=keys[name].path
            )
        for host in self.hosts.values():
            host.install()
            host.launch()
        self._key = keys["controller"]
        self.home = self.home_of(0)
        self.ssh_dir = self.home / ".ssh"
        self.ssh_config = self.ssh_dir / "config"
        for host in self.hosts.values():
            host.wait_ready(_BOOT_SECONDS)

    def _make_keys(self) -> dict[str, _Key]:
        keys = {name: _Key(self.directory / "keys" / name) for name in ("controller", *self._names)}
        (self.directory / "keys").mkdir(mode=0o700)
        makers = [
            subprocess.Popen(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(key.path)])
            for name, key in keys.items()
        ]
        if sum(maker.wait(timeout=30) for maker in makers):
            raise LabError("ssh-keygen failed")
        return keys

    def stop(self) -> None:
        """Take everything down; may be called twice."""
        if self._record is None or os.getpid() != self._owner:
            return
        atexit.unregister(self.stop)
        self._record.clean()
        for host in self.hosts.values():
            host.end()
        self._record = None

    @property
    def record(self) -> Record:
        """Names of everything that this lab has put on the machine."""
        if self._record is None:
            raise LabError("the lab is not up")
        return self._record

    def heal(self) -> None:
        """Undo what a test has done to hosts through their controls; fast when there is nothing to undo."""
        for host in self.hosts.values():
            host.heal()
        self._write_known_hosts(without=self._unknown)

    # --- the controller's place

    def home_of(self, user: int | str) -> Path:
        """A home directory from which this user (id or name) reaches every host; made when first asked for."""
        uid = pwd.getpwnam(user).pw_uid if isinstance(user, str) else user
        if uid in self._homes:
            return self._homes[uid]
        home = self.directory / "home" / str(uid)
        with commands.readable_files():
            home.mkdir(parents=True)
        ssh = home / ".ssh"
        ssh.mkdir(mode=0o700)
        shutil.copy(self._key.path, ssh / "id_ed25519")
        shutil.copy(self._key.path.with_suffix(".pub"), ssh / "id_ed25519.pub")
        places = [f"Host {host.name}\n  HostName {host.address}\n" for host in self.hosts.values()]
        # ssh takes ~ from the password database and not from HOME, so every path is spelled out. The key exchange is
        # the cheapest one: with ssh's own default, a large lab measures the post-quantum exchange and little else.
        everyone = f"""\
Host *
  User {self.user}
  IdentityFile {ssh}/id_ed25519
  IdentitiesOnly yes
  UserKnownHostsFile {ssh}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  UpdateHostKeys no
  KexAlgorithms curve25519-sha256
"""
        (ssh / "config").write_text("".join([*places, everyone]))
        self._homes[uid] = home
        self._write_known_hosts(without=self._unknown)
        for path in (home, *home.rglob("*")):
            os.chown(path, uid, uid)
        return home

    def _write_known_hosts(self, *, without: Collection[str]) -> None:
        known = [host for host in self.hosts.values() if host.name not in without]
        lines = [f"{host.name},{host.address} {' '.join(host.public_key.split()[:2])}\n" for host in known]
        for home in self._homes.values():
            (home / ".ssh/known_hosts").write_text("".join(lines))

    def forget(self, name: str) -> None:
        """Take one host's key out of the controller's known hosts, until the next ``heal``."""
        self._write_known_hosts(without={*self._unknown, name})

    def small_disk(self, folder: Path, size_mb: int) -> None:
        """Lay an empty disk of that size over a folder of the controller's place, until the lab is down."""
        self.record.mounts.append(str(folder))
        self.record.save()
        tmpfs.mount(folder, size_mb)

    def processes(self) -> list[HostProcess]:
        """What runs at the controller's place."""
        return processes(self._controller)

    def popen(
        self,
        args: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        user: int | str = 0,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Start a command at the controller's place; its process id is the command's own, so signals reach it.

        HOME and FLEET_SSH_CONFIG are set; ``env`` comes on top of this process's environment. What it leaves
        running, such as ssh masters, dies with the lab.
        """
        home = self.home_of(user)
        uid = home.stat().st_uid
        enter = [shutil.which("nsenter") or "nsenter", f"--net={NETNS / self.hub}"]
        if uid:
            enter += [f"--setuid={uid}", f"--setgid={uid}"]
        environment = {**os.environ, "HOME": str(home), "FLEET_SSH_CONFIG": str(home / ".ssh/config"), **(env or {})}
        command = self._controller.joined([*enter, "--", *map(str, args)])
        return subprocess.Popen(command, env=environment, text=True, **options)

    def run(
        self,
        args: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 60.0,
        user: int | str = 0,
        input: str = "",  # noqa: A002 - as in subprocess.run
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command at the controller's place; after ``timeout`` it and its process group are killed."""

        def start(**streams: Any) -> subprocess.Popen[str]:
            return self.popen(args, env=env, user=user, cwd=cwd, **streams)

        return commands.finish(start, args, input, timeout, check=check)

    def ssh(
        self, host: str, command: str, *options: str, connect_timeout: int = 5, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host through real ssh, as the lab's user; ``options`` go to ssh."""
        fixed = ["-F", str(self.ssh_config), "-o", "BatchMode=yes", "-o", f"ConnectTimeout={connect_timeout}"]
        return self.run(["ssh", *fixed, *options, host, command], timeout=timeout)

    def inside(self, function: Callable[[], _T], timeout: float = 60.0) -> _T:
        """Call a function of this process on a thread that lives in the controller's network."""
        return network.inside(self.hub, function, timeout)

    def answers(self, name: str, port: int = 22, timeout: float = 1.0) -> bool:
        """Whether a TCP connection to the host's port opens."""

        def connect() -> bool:
            try:
                socket.create_connection((self.hosts[name].address, port), timeout).close()
            except OSError:
                return False
            return True

        return self.inside(connect, timeout + 5)
