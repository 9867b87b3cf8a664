"""What this host is: SystemFacts, measured as an ordinary user with the standard library and, where installed, pynvml.

Reads /proc and /sys and starts a program only for what they do not tell. The parsers are in probes.py. A probe that
cannot answer leaves its field empty and says why in `probe_errors`; `describe` itself does not fail.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fleet.harness import accelerators, probes
from fleet.harness.contract import Disk, NetworkInterface, SystemFacts, write_json
from fleet.harness.probes import ProbeError

_COMMAND_TIMEOUT_S = 5.0

_PACKAGES = ("torch", "numpy", "mlcommons-loadgen", "nvidia-ml-py", "safetensors", "tokenizers", "mlperf-fleet")

_T = TypeVar("_T")

Commands = Callable[[Sequence[str]], str]


def describe(root: Path = Path("/"), *, commands: Commands | None = None, nvml: Any = None) -> SystemFacts:
    """The facts of the host whose /proc, /sys and /etc lie under `root`. Never raises.

    commands: runs an argument list and returns its stdout, OSError when it cannot; without one, programs are started,
    each for at most 5 seconds. nvml: a module like pynvml; without one, the installed pynvml, given up on after 30 s.
    """
    host = _Host(root, commands or run_command)
    ask = host.ask
    folders: list[str] = ask("cpu_online", [], lambda: _cpu_folders(host))
    processors: list[dict[str, str]] = ask("cpuinfo", [], lambda: probes.cpuinfo(host.read("proc/cpuinfo")))
    sockets, cores = ask("cpu_topology", (0, 0), lambda: _cores(host, folders, processors))
    memory_bytes = ask("memory", 0, lambda: probes.memory_total(host.read("proc/meminfo")))
    ask("cgroup", None, lambda: _note_limits(host, memory_bytes))
    gpus = ask("accelerators", accelerators.Gpus(), lambda: _accelerators(host, nvml))
    return SystemFacts(
        hostname=ask("hostname", "", lambda: host.read("proc/sys/kernel/hostname")),
        machine_id=ask("machine_id", "", lambda: _machine_id(host)),
        boot_id=ask("boot_id", "", lambda: host.read("proc/sys/kernel/random/boot_id")),
        os_name=ask("os", "", lambda: probes.os_name(host.first("etc/os-release", "usr/lib/os-release"))),
        kernel=ask("kernel", "", lambda: host.read("proc/sys/kernel/osrelease")),
        # Before Linux 6.1 /proc does not tell.
        architecture=host.peek("proc/sys/kernel/arch") or platform.machine(),
        cpu_model=ask("cpu_model", "", lambda: _cpu_model(host, processors)),
        cpu_sockets=sockets,
        cpu_cores=cores,
        cpu_threads=ask("cpu_threads", os.cpu_count() or 0, lambda: _threads(host)),
        cpu_max_mhz=ask("cpu_max_mhz", None, lambda: _max_mhz(host)),
        cpu_caches=ask("cpu_caches", {}, lambda: _caches(host, folders)),
        memory_bytes=memory_bytes,
        memory_configuration=ask("memory_configuration", "", lambda: _memory_configuration(host)),
        disks=ask("disks", (), lambda: _disks(host)),
        network=ask("network", (), lambda: _network(host)),
        accelerators=gpus.found,
        driver_version=gpus.driver_version,
        cuda_version=gpus.cuda_version,
        virtualization=ask("virtualization", "", lambda: _virtualization(host, processors)),
        on_battery=ask("on_battery", None, lambda: _on_battery(host)),
        software=ask("software", {}, _software),
        probe_errors=host.errors,
    )


def write(path: Path) -> None:
    """Describe this host into the JSON file `path`, by rename. Raises OSError when it cannot be written."""
    write_json(path, describe())


def run_command(arguments: Sequence[str]) -> str:
    """Stdout of a program, whatever its exit status: systemd-detect-virt says `none` and exits 1.

    Raises OSError when it cannot be started or does not end within 5 seconds.
    """
    try:
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{arguments[0]} did not end within {_COMMAND_TIMEOUT_S:.0f} s") from error
    return done.stdout.decode("utf-8", "replace")


class _Host:
    """A root folder, a way to run programs, and the errors met so far."""

    def __init__(self, root: Path, commands: Commands) -> None:
        self.root = root
        self.commands = commands
        self.errors: dict[str, str] = {}

    def ask(self, probe: str, default: _T, answer: Callable[[], _T]) -> _T:
        """What `answer` returns; `default` and an entry in `errors` when it cannot."""
        try:
            return answer()
        except ProbeError as error:
            self.errors[probe] = str(error)
        except OSError as error:
            name = str(error.filename or "").removeprefix(str(self.root).rstrip("/"))
            self.errors[probe] = f"{name}: {error.strerror}" if name else str(error)
        except Exception as error:  # noqa: BLE001 - one odd file must not cost the host all its other facts
            self.errors[probe] = f"{type(error).__name__}: {error}"
        return default

    def read(self, path: str) -> str:
        """A file's text without surrounding space. Raises OSError."""
        return (self.root / path).read_text(encoding="utf-8", errors="replace").strip(" \t\n\0")

    def peek(self, path: str) -> str:
        """A file's text, empty when it cannot be read: sysfs answers EINVAL and ENODEV for `not known`."""
        try:
            return self.read(path)
        except OSError:
            return ""

    def first(self, *paths: str) -> str:
        """The first file with text. Raises OSError about the last one when there is none."""
        return next(filter(None, map(self.peek, paths)), "") or self.read(paths[-1])

    def names(self, folder: str) -> list[str]:
        """What lies in a folder, sorted; nothing when there is no such folder."""
        try:
            return sorted(entry.name for entry in (self.root / folder).iterdir())
        except OSError:
            return []

    def exists(self, path: str) -> bool:
        """Whether a file, folder or dangling link is there."""
        return os.path.lexists(self.root / path)


def _machine_id(host: _Host) -> str:
    text = host.first("etc/machine-id", "var/lib/dbus/machine-id")
    if not re.fullmatch(r"[0-9a-f]{32}", text):
        raise ProbeError(f"/etc/machine-id is {text or 'empty'}: this host cannot be told from its clones")
    return text


def _cpu_folders(host: _Host) -> list[str]:
    """The folders of processors that are online, in numerical order; sysfs keeps offline ones without topology."""
    base = "sys/devices/system/cpu"
    online = probes.cpu_list(host.peek(f"{base}/online"))
    return [f"{base}/cpu{number}" for number in sorted(online)]


def _cores(host: _Host, folders: Sequence[str], processors: Sequence[dict[str, str]]) -> tuple[int, int]:
    """Sockets and physical cores: from sysfs, else /proc/cpuinfo, else lscpu."""
    pairs = []
    for folder in folders:
        # core_id repeats between dies; the list of sibling threads names a core everywhere.
        siblings = host.peek(f"{folder}/topology/core_cpus_list") or host.peek(
            f"{folder}/topology/thread_siblings_list"
        )
        if siblings:
            pairs.append((host.peek(f"{folder}/topology/physical_package_id"), siblings))
    pairs = pairs or probes.cpuinfo_topology(processors)
    if pairs:
        return len({socket for socket, _ in pairs}), len(set(pairs))
    fields = probes.lscpu(host.commands(["lscpu", "-J"]))
    try:
        sockets = int(fields["Socket(s)"])
        return sockets, sockets * int(fields["Core(s) per socket"])
    except (KeyError, ValueError):  # lscpu prints `-` for what it does not know
        raise ProbeError("neither /sys, /proc/cpuinfo nor lscpu tell sockets and cores") from None


def _cpu_model(host: _Host, processors: Sequence[dict[str, str]]) -> str:
    name = probes.cpu_model(processors)
    if name:
        return name
    name = probes.lscpu(host.commands(["lscpu", "-J"])).get("Model name", "")
    if name in {"", "-"}:
        raise ProbeError("neither /proc/cpuinfo nor lscpu name the processor")
    return name


def _threads(host: _Host) -> int:
    match = re.search(r"^Cpus_allowed_list:\s*(\S+)$", host.read("proc/self/status"), re.MULTILINE)
    if match is None:
        raise ProbeError("no Cpus_allowed_list in /proc/self/status: all processors are counted")
    # The mask may name processors that the machine does not have, and a kernel without CPU sysfs has no online list.
    allowed = probes.cpu_list(match[1])
    return len(allowed & (probes.cpu_list(host.peek("sys/devices/system/cpu/online")) or allowed))


def _max_mhz(host: _Host) -> float:
    base = "sys/devices/system/cpu/cpufreq"
    speeds = [host.peek(f"{base}/{policy}/cpuinfo_max_freq") for policy in host.names(base)]
    if not any(speeds):
        raise ProbeError("the kernel offers no cpufreq here, as in most virtual machines")
    return max(int(speed) for speed in speeds if speed) / 1000


def _caches(host: _Host, folders: Sequence[str]) -> dict[str, str]:
    covered: dict[str, set[int]] = {}
    instances = []
    for folder in folders:
        number = int(folder.rpartition("cpu")[2])
        for index in host.names(f"{folder}/cache"):
            entry = f"{folder}/cache/{index}"
            level = host.peek(f"{entry}/level")
            if not level:
                continue
            name = f"L{level}" + {"Data": "d", "Instruction": "i"}.get(host.peek(f"{entry}/type"), "")
            # Of a cache that many processors share, one is read: it saves most of the time on a large machine.
            if number in covered.setdefault(name, set()):
                continue
            covered[name] |= probes.cpu_list(host.peek(f"{entry}/shared_cpu_list")) | {number}
            size = host.peek(f"{entry}/size")
            if size:
                instances.append((name, probes.cache_bytes(size)))
    if not instances:
        raise ProbeError("the kernel does not tell cache sizes here")
    return probes.cache_texts(instances)


def _note_limits(host: _Host, memory_bytes: int) -> None:
    """Say in the errors when a cgroup gives this process less than the facts show: cpu_threads counts affinity only."""
    quotas = [
        quota
        for folder in _cgroups(host, "cpu")
        if (quota := probes.cpu_quota(_cpu_quota_text(host, folder))) is not None
    ]
    if quotas:
        host.errors["cpu_quota"] = f"a cgroup limits this process to the time of {min(quotas):g} processors"
    limits = [
        int(text)
        for folder in _cgroups(host, "memory")
        for text in (host.peek(f"{folder}/memory.max") or host.peek(f"{folder}/memory.limit_in_bytes"),)
        if text.isdecimal() and int(text) < memory_bytes
    ]
    if limits:
        host.errors["memory_limit"] = f"a cgroup limits this process to {probes.binary_size(min(limits))} of memory"


def _cpu_quota_text(host: _Host, folder: str) -> str:
    version_1 = f"{host.peek(f'{folder}/cpu.cfs_quota_us')} {host.peek(f'{folder}/cpu.cfs_period_us')}"
    return host.peek(f"{folder}/cpu.max") or version_1


def _cgroups(host: _Host, controller: str) -> Iterator[str]:
    """The cgroup folders that bind this process for a controller, v2 and v1, from its own up to the top."""
    for line in host.peek("proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 1 mounts `cpu` mostly as `cpu,cpuacct`, with a link `cpu` beside it.
        base = f"sys/fs/cgroup/{controller}" if controllers else "sys/fs/cgroup"
        parts = [part for part in path.split("/") if part not in {"", ".."}]
        for depth in range(len(parts), -1, -1):
            yield "/".join([base, *parts[:depth]])


def _memory_configuration(host: _Host) -> str:
    """DIMMs from the SMBIOS table, which only root may read, else from the kernel's error counters (EDAC)."""
    try:
        table = (host.root / "sys/firmware/dmi/tables/DMI").read_bytes()
    except OSError:
        table = b""
    dimms = probes.dmi_dimms(table)
    if not dimms:
        for path in sorted((host.root / "sys/devices/system/edac/mc").glob("mc*/dimm*")):
            folder = str(path.relative_to(host.root))
            megabytes = host.peek(f"{folder}/size")
            if megabytes.isdecimal() and int(megabytes):
                kind = host.peek(f"{folder}/dimm_mem_type")
                dimms.append(f"{probes.binary_size(int(megabytes) << 20)} {kind}".strip())
    if not dimms:
        raise ProbeError("the DIMM layout is readable only by root (/sys/firmware/dmi/tables/DMI), or there is none")
    return probes.dimm_text(dimms)


def _disks(host: _Host) -> tuple[Disk, ...]:
    disks = []
    for name in filter(probes.is_disk, host.names("sys/block")):
        folder = f"sys/block/{name}"
        size = int(host.peek(f"{folder}/size") or 0) * 512  # always in sectors of 512 bytes, whatever the disk's own
        if not size or not host.exists(f"{folder}/device"):
            continue
        model = host.peek(f"{folder}/device/model") or host.peek(f"{folder}/device/name")
        vendor = host.peek(f"{folder}/device/vendor")
        rotational = host.peek(f"{folder}/queue/rotational") == "1"
        kind = probes.disk_kind(name, f"{vendor} {model}", rotational=rotational)
        disks.append(Disk(name=name, bytes=size, kind=kind, model=model))
    if not disks:
        raise ProbeError("no disk in /sys/block")
    return tuple(disks)


def _network(host: _Host) -> tuple[NetworkInterface, ...]:
    base = "sys/class/net"
    # 1 is Ethernet, 32 InfiniBand; tunnels and loopback have other types.
    cards = [name for name in host.names(base) if host.peek(f"{base}/{name}/type") in {"1", "32"}]
    real = [name for name in cards if host.exists(f"{base}/{name}/device")]
    if not real:
        # A container sees nothing but one end of a veth pair, whose other end has another number.
        real = [
            name
            for name in cards
            if host.peek(f"{base}/{name}/iflink") != host.peek(f"{base}/{name}/ifindex")
            and not host.exists(f"{base}/{name}/tun_flags")
        ]
    if not real:
        raise ProbeError("no network card in /sys/class/net")
    return tuple(
        NetworkInterface(
            name=name,
            speed_mbps=probes.link_speed(host.peek(f"{base}/{name}/speed")),
            driver=_driver(host, f"{base}/{name}/device/driver"),
        )
        for name in real
    )


def _driver(host: _Host, link: str) -> str:
    try:
        return (host.root / link).readlink().name
    except OSError:
        return ""


def _accelerators(host: _Host, nvml: Any) -> accelerators.Gpus:
    """The GPUs; a host that has none has no error either, and one whose GPU nobody reads says so."""
    pci = [
        (host.peek(f"sys/bus/pci/devices/{device}/vendor"), host.peek(f"sys/bus/pci/devices/{device}/class"))
        for device in host.names("sys/bus/pci/devices")
    ]
    # PCI classes: 0x0300 VGA, 0x0302 3D, 0x0380 other display, 0x12 processing accelerator. A plain VGA device of
    # another maker is most often a processor's own graphics or a server's console: not worth a word.
    nvidia = sum(vendor == "0x10de" and kind.startswith(("0x03", "0x12")) for vendor, kind in pci)
    others = {vendor for vendor, kind in pci if kind.startswith(("0x0302", "0x0380", "0x12"))}
    others -= {"0x10de", "0x1414"}  # and Microsoft's is the stand-in through which WSL reaches the real GPU
    if others:
        host.errors["other_accelerators"] = f"PCI vendor {', '.join(sorted(others))}: only NVIDIA GPUs are described"
    try:
        gpus = accelerators.read(nvml)
    except ProbeError as error:
        if nvidia:
            raise ProbeError(f"{nvidia} NVIDIA GPU{'s' * (nvidia > 1)} on the PCI bus, but {error}") from error
        # WSL and NVIDIA's boards have GPUs that are not on the PCI bus.
        if pci and not host.exists("dev/dxg") and not host.exists("proc/driver/nvidia"):
            return accelerators.Gpus()
        raise
    host.errors.update(gpus.errors)
    return gpus


def _virtualization(host: _Host, processors: Sequence[dict[str, str]]) -> str:
    try:
        word = host.commands(["systemd-detect-virt"]).strip()
    except OSError:
        word = ""
    if word:
        return word
    container = host.peek("run/systemd/container")
    for marker, name in ((".dockerenv", "docker"), ("run/.containerenv", "podman")):
        container = container or (name if host.exists(marker) else "")
    dmi = "sys/class/dmi/id/"
    flags = next((fields["flags"] for fields in processors if "flags" in fields), None)
    word = probes.virtualization(
        container=container,
        kernel=host.peek("proc/sys/kernel/osrelease"),
        dmi=[host.peek(dmi + name) for name in ("product_name", "sys_vendor", "board_vendor", "bios_vendor")],
        xen=host.peek("proc/xen/capabilities"),
        hypervisor=None if flags is None else "hypervisor" in flags.split(),
    )
    if not word:
        raise ProbeError("no systemd-detect-virt, and neither DMI nor CPU flags tell")
    return word


def _on_battery(host: _Host) -> bool | None:
    base = "sys/class/power_supply"
    keys = ("type", "scope", "online", "status")
    return probes.on_battery({key: host.peek(f"{base}/{name}/{key}") for key in keys} for name in host.names(base))


def _software() -> dict[str, str]:
    """Versions from package metadata: importing torch would take seconds and memory."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
