"""One host of the lab, and what can be done to it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tests.lab import commands, disk, network, simulated, tmpfs
from tests.lab.cgroups import Cgroup
from tests.lab.commands import LabError
from tests.lab.record import NETNS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_T = TypeVar("_T")
_HOSTINIT = Path(__file__).with_name("hostinit.sh")
_ROOT = Path(__file__).parents[2]
_MASKED = "/root/masked-python"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclasses.dataclass(frozen=True)
class HostOptions:
    """What one host has of its own; see Lab."""

    hostname: str = ""
    disk_mb: int | None = None
    memory_mb: int | None = None
    meminfo_mb: int | None = None
    mounts: Mapping[Path, str] = dataclasses.field(default_factory=dict)
    layers: tuple[Path, ...] = ()


@dataclasses.dataclass(frozen=True)
class Wiring:
    """What all hosts of a lab share."""

    lab: str
    hub: str
    base: Path
    user: str
    addresses: Mapping[str, str]
    controller_key: str


class HostProcess(NamedTuple):
    """A process of a host."""

    pid: int  # as the host counts
    command: str
    machine_pid: int  # as this machine counts
    inside: bool  # on a host, not beside it


def processes(cgroup: Cgroup) -> list[HostProcess]:
    """The processes of a control group."""
    found = []
    for pid in cgroup.pids():
        with suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            numbers = next(line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:"))
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found.append(HostProcess(int(numbers[-1]), command.strip(), pid, len(numbers) > 1))
    return found


class LabHost:
    """A host. Its controls are undone by ``heal``, apart from files that a test has written."""

    def __init__(
        self, name: str, index: int, *, state: Path, wiring: Wiring, options: HostOptions, host_key: Path
    ) -> None:
        self.name = name
        self.hostname = options.hostname or name
        self.address = network.address(index)
        self._index = index
        self._state = state
        self._wiring = wiring
        self._options = options
        self._host_key = host_key
        self._cgroup = Cgroup(f"{wiring.lab}/{name}")
        self._launcher: subprocess.Popen[bytes] | None = None
        self._relay: subprocess.Popen[bytes] | None = None
        self._shown: dict[str, str] = {}
        self._broken: set[str] = set()
        self.public_key = host_key.with_suffix(".pub").read_text()

    @property
    def _namespace(self) -> str:
        return f"{self._wiring.lab}-{self.name}"

    @property
    def upper(self) -> Path:
        """The host's own layer of its disk, as this machine sees it: for reading, while the host is up."""
        return self._state / "disk" / "upper"

    # --- install and boot

    def install(self) -> None:
        """Give it an empty disk with its name, user and keys on it."""
        directory = self._state / "disk"
        directory.mkdir(parents=True)
        (self._state / "root").mkdir()
        shutil.copy(_HOSTINIT, self._state / "hostinit.sh")
        size = self._options.disk_mb
        # An overlay cannot be the upper layer of another: inside a container the disk must be memory.
        if size is not None or _filesystem(directory) == "overlayfs":
            tmpfs.mount(directory, size)
        if self._options.meminfo_mb is not None:
            (self._state / "meminfo").write_text(disk.smaller_meminfo(self._options.meminfo_mb))
        mounts = [f"{source} {target}\n" for source, target in self._options.mounts.items()]
        (self._state / "mounts").write_text("".join(mounts))
        self._cgroup.create(self._options.memory_mb)
        self._write_disk()

    def _write_disk(self) -> None:
        with commands.readable_files():
            self._fill_upper()

    def _fill_upper(self) -> None:
        self.upper.mkdir()
        disk.write(
            self.upper,
            self._wiring.base,
            hostname=self.hostname,
            hosts=dict(self._wiring.addresses),
            user=self._wiring.user,
            host_key=self._host_key,
            public_key=self._wiring.controller_key,
        )
        for source, target in self._options.mounts.items():
            place = self.upper / target.lstrip("/")
            if source.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()

    def launch(self) -> None:
        """Start its first process; does not wait."""
        work = self._state / "disk" / "work"
        # A volatile overlay marks its work directory and refuses it after a power cut: a new one each time.
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
        (self._state / "pid").unlink(missing_ok=True)
        (self._state / "boot_id").write_text(f"{uuid.uuid4()}\n")
        layers = [*self._options.layers, self._wiring.base]
        environment = {
            "PATH": _PATH,
            "LAB_NAME": self.hostname,
            "LAB_STATE": str(self._state),
            "LAB_LOWER": ":".join(map(str, layers)),
            "LAB_UPPER": str(self.upper),
            "LAB_WORK": str(work),
        }
        spaces = ["--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        command = ["nsenter", f"--net={NETNS / self._namespace}", "unshare", *spaces]
        command += ["sh", str(self._state / "hostinit.sh"), "boot"]
        with (self._state / "console.log").open("ab") as console:
            self._launcher = subprocess.Popen(
                self._cgroup.joined(command),
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,  # Ctrl-C at the tests is not a power cut
            )

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Return when its sshd greets; what the host said while booting is in the error if it does not."""
        deadline = time.monotonic() + timeout
        while not network.inside(self._wiring.hub, self._greets, timeout=10):
            dead = self._launcher is None or self._launcher.poll() is not None
            if dead or time.monotonic() > deadline:
                said = (self._state / "console.log").read_text()
                raise LabError(f"{self.name} {'died' if dead else 'has no sshd'} while booting:\n{said}")
            time.sleep(0.02)

    def _greets(self) -> bool:
        try:
            with socket.create_connection((self.address, 22), timeout=1) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def reap(self) -> None:
        """Collect the exit status of the launcher, once the host is dead."""
        if self._launcher is not None:
            self._launcher.wait(10)
            self._launcher = None

    def end(self) -> None:
        """Collect what is left of it on this machine, once the lab is down."""
        self.reap()
        if self._relay is not None:
            self._relay.wait(10)
            self._relay = None

    # --- look inside

    def memory(self) -> int:
        """Bytes of memory that its processes take, and the files that they have written and read."""
        return self._cgroup.memory()

    def exec(
        self,
        args: Sequence[str],
        *,
        timeout: float = 60.0,
        check: bool = False,
        input: str = "",  # noqa: A002 - as in subprocess.run
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the host as root, past sshd and the network."""
        enter = [shutil.which("nsenter") or "nsenter", "--target", str(self._first_process())]
        enter += ["--mount", "--uts", "--ipc", "--net", "--pid", "--", *args]
        environment = {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8"}

        def start(**streams: Any) -> subprocess.Popen[str]:
            return subprocess.Popen(self._cgroup.joined(enter), env=environment, text=True, umask=0o022, **streams)

        return commands.finish(start, args, input, timeout, check=check)

    def sh(self, script: str, *, timeout: float = 60.0) -> str:
        """Run a shell script on the host as root; returns what it printed and raises if it fails."""
        return self.exec(["sh", "-ec", script], timeout=timeout, check=True).stdout

    def processes(self) -> list[HostProcess]:
        """What runs on it, its PID 1 included; works on a frozen host too."""
        # The launcher is in the group but not on the host: it has only this machine's number.
        return [process for process in processes(self._cgroup) if process.inside]

    def _first_process(self) -> int:
        if self._launcher is None or self._launcher.poll() is not None:
            raise LabError(f"{self.name} is switched off")
        return int((self._state / "pid").read_text())

    # --- what can happen to a host

    def link(self, up: bool) -> None:
        """Plug its network cable in or out."""
        network.plug(self._wiring.hub, self._index, up)
        self._note("link", broken=not up)

    def cut(self, seconds: float) -> None:
        """Leave its cable out for so long."""
        self.link(up=False)
        time.sleep(seconds)
        self.link(up=True)

    def slow(self, latency_ms: float = 200.0, loss: float = 0.05) -> None:
        """Make its cable a bad one: so much time for a round trip, and each frame is lost with this probability."""
        if self._relay is not None:
            self.fast()
        ends = network.divert(self._wiring.hub, self._index, self._namespace)
        self._note("relay", broken=True)
        enter = ["nsenter", f"--net={NETNS / self._wiring.hub}", sys.executable, "-m", "tests.lab.relay"]
        # In the controller's group, as everything that is neither of a host nor of this process: so it ends with the lab.
        command = Cgroup(f"{self._wiring.lab}/controller").joined([*enter, *ends, f"{latency_ms / 2000}", f"{loss}"])
        self._relay = subprocess.Popen(
            command, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._relay.stdout is not None
        if self._relay.stdout.readline() != b"ready\n":
            raise LabError(f"the relay of {self.name} does not start")
        self._relay.stdout.close()

    def fast(self) -> None:
        """Give it a good cable again."""
        if self._relay is not None:
            self._relay.kill()
            self._relay.wait(10)
            self._relay = None
        network.join(self._wiring.hub, self._index, self._namespace)
        self._note("relay", broken=False)

    def freeze(self) -> None:
        """Hang it: it still takes TCP connections (the kernel does) and never says a word."""
        self._cgroup.freeze(frozen=True)
        self._note("frozen", broken=True)

    def thaw(self) -> None:
        """Let it go on."""
        self._cgroup.freeze(frozen=False)
        self._note("frozen", broken=False)

    def hang(self, seconds: float) -> None:
        """Freeze it for so long."""
        self.freeze()
        time.sleep(seconds)
        self.thaw()

    def power_off(self) -> None:
        """Cut its power: everything stops at once, nobody is told, the disk keeps what it has."""
        network.plug(self._wiring.hub, self._index, up=False)
        self._cgroup.kill()
        self.reap()
        self._broken -= {"frozen", "sshd", "link"}
        self._note("power", broken=True)

    def power_on(self, timeout: float = 30.0) -> None:
        """Boot it from the same disk; returns when sshd answers."""
        network.plug(self._wiring.hub, self._index, up=True)
        self.launch()
        self.wait_ready(timeout)
        if self._shown:
            simulated.show(self.sh, self._shown)
        self._note("power", broken=False)

    def reboot(self, timeout: float = 30.0) -> None:
        """Cut its power and boot it again, with a new boot id; returns when sshd answers."""
        self.power_off()
        self.power_on(timeout)

    def reinstall(self) -> None:
        """Give it a fresh disk, as on the first day: same keys, new machine id, nothing that tests have written."""
        self.power_off()
        shutil.rmtree(self.upper)
        self._write_disk()
        self._broken -= {"python", "clock"}
        self.power_on()

    def renew(self, change: Callable[[Path], None]) -> None:
        """Give it, while it is off, a fresh disk, with what `change` does to that before it first boots."""
        shutil.rmtree(self.upper)
        self._write_disk()
        with commands.readable_files():
            change(self.upper)
        self.public_key = (self.upper / "etc/ssh/ssh_host_ed25519_key.pub").read_text()

    def inside(self, function: Callable[[], _T], timeout: float = 60.0) -> _T:
        """Call a function of this process on a thread that lives in its network."""
        return network.inside(self._namespace, function, timeout)

    def answer_at(self, address: str) -> None:
        """Have a further address, that nobody but itself reaches."""
        network.own(self._namespace, address)

    def kill(self, word: str, number: signal.Signals = signal.SIGKILL) -> list[HostProcess]:
        """Send the signal to every process with the word in its command line; returns them, and it must be some."""
        found = [process for process in self.processes() if word in process.command and process.pid != 1]
        if not found:
            raise LabError(f"no process of {self.name} has {word!r} in its command line")
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process.machine_pid, number)
        return found

    def kill_sshd(self, *, sessions: bool = False) -> None:
        """Kill the listening sshd, and its open sessions if asked to; what they have detached lives on."""
        daemon = int(self.sh("cat /run/sshd.pid"))
        os.kill(next(process.machine_pid for process in self.processes() if process.pid == daemon), signal.SIGKILL)
        if sessions:
            self._end_sessions()
        self._note("sshd", broken=True)

    def _end_sessions(self) -> None:
        for process in self.processes():
            # The daemon, too, has "sshd:" there, and then the command that it was started by.
            if process.command.startswith("sshd: ") and "[listener]" not in process.command:
                with suppress(ProcessLookupError):
                    os.kill(process.machine_pid, signal.SIGKILL)

    def start_sshd(self) -> None:
        """Start it again; returns when it answers."""
        self.sh("/usr/sbin/sshd -E /run/sshd.log")
        self.wait_ready()
        self._note("sshd", broken=False)

    def change_host_key(self, *, sessions: bool = False) -> None:
        """Give it another ssh host key, as if another machine had its address; stays so after ``heal``.

        Open connections live on, unless ``sessions`` says that they are ended.
        """
        key = "/etc/ssh/ssh_host_ed25519_key"
        self.sh(f"rm {key} {key}.pub; ssh-keygen -q -t ed25519 -N '' -f {key}")
        self.public_key = self.sh(f"cat {key}.pub")
        self.kill_sshd(sessions=sessions)
        self.start_sshd()

    def fill_disk(self) -> None:
        """Leave no byte free, whatever writes just now; only for hosts with ``disk_mb``."""
        if self._options.disk_mb is None:
            raise LabError(f"{self.name} has no disk of a size: it would fill this machine's")
        tmpfs.fill(self._state / "disk")
        self._note("disk", broken=True)

    def free_disk(self) -> None:
        """Give the space back."""
        tmpfs.resize(self._state / "disk", self._options.disk_mb)
        self._note("disk", broken=False)

    def litter(self, folder: str, files: int = 10_000) -> None:
        """Leave an old work folder there, as the lab's user: files of units, transfers and installations long gone."""
        simulated.litter(self.exec, folder, files, self._wiring.user)

    def shift_clock(self, seconds: float) -> None:
        """Set its wall clock off by so much, for every process of an ssh login from now on; none else has moved.

        Processes that were started under an earlier shift, be it 0, follow at once: a clock that is set. Times of
        files stay true.
        """
        simulated.shift_clock(self.sh, seconds)
        if "clock" not in self._broken:
            # An open connection is an old login: through ssh's masters, new commands would come by it.
            self._end_sessions()
        self._note("clock", broken=True)

    def right_clock(self) -> None:
        """Set it right, and start no further process under a shift."""
        simulated.right_clock(self.sh)
        self._note("clock", broken=False)

    def show(self, values: Mapping[str, str]) -> None:
        """Have these files in its /sys, by their path there, until ``heal``; a reboot keeps them, as hardware is kept."""
        self._shown |= values
        simulated.show(self.sh, values)
        self._note("sysfs", broken=True)

    def show_nothing(self) -> None:
        """Have this machine's own /sys there again."""
        self._shown.clear()
        simulated.show_nothing(self.sh)
        self._note("sysfs", broken=False)

    def remove_python(self) -> None:
        """Make it a host without Python."""
        self.sh(f"mkdir -p {_MASKED}; mv /usr/bin/python3* {_MASKED}")
        self._note("python", broken=True)

    def restore_python(self) -> None:
        """Give it back."""
        self.sh(f"mv {_MASKED}/* /usr/bin")
        self._note("python", broken=False)

    def _note(self, what: str, *, broken: bool) -> None:
        (self._broken.add if broken else self._broken.discard)(what)

    def heal(self) -> None:
        """Undo the above."""
        repairs = {
            "power": self.power_on,
            "frozen": self.thaw,
            "link": lambda: self.link(up=True),
            "relay": self.fast,
            "clock": self.right_clock,
            "sysfs": self.show_nothing,
            "sshd": self.start_sshd,
            "disk": self.free_disk,
            "python": self.restore_python,
        }
        for what, repair in repairs.items():
            if what in self._broken:
                repair()


def _filesystem(path: Path) -> str:
    done = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
