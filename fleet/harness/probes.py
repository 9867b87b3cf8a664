"""Pure parsers of what Linux says about itself: text in, value out, no file is opened here.

describe.py reads the files and calls these; tests feed them text from real and documented hosts.
"""

import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_ARM_PARTS = {
    # (implementer, part) to the name that lscpu uses; only server cores and the boards people own.
    ("0x41", "0xd03"): "Cortex-A53",
    ("0x41", "0xd05"): "Cortex-A55",
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1",
    ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd41"): "Cortex-A78",
    ("0x41", "0xd42"): "Cortex-A78AE",
    ("0x41", "0xd49"): "Neoverse-N2",
    ("0x41", "0xd4f"): "Neoverse-V2",
    ("0x41", "0xd84"): "Neoverse-V3",
    ("0x41", "0xd8e"): "Neoverse-N3",
    ("0x46", "0x001"): "A64FX",
    ("0x48", "0xd01"): "TaiShan-v110",
    ("0xc0", "0xac3"): "Ampere-1",
    ("0xc0", "0xac4"): "Ampere-1a",
}

_DMI_VENDORS = (
    # Start of a DMI string to systemd-detect-virt's word, in systemd's order.
    ("KVM", "kvm"),
    ("OpenStack", "kvm"),
    ("KubeVirt", "kvm"),
    ("Amazon EC2", "amazon"),
    ("QEMU", "qemu"),
    ("VMware", "vmware"),
    ("VMW", "vmware"),
    ("innotek GmbH", "oracle"),
    ("VirtualBox", "oracle"),
    ("Xen", "xen"),
    ("Bochs", "bochs"),
    ("Parallels", "parallels"),
    ("BHYVE", "bhyve"),
    ("Hyper-V", "microsoft"),
    ("Apple Virtualization", "apple"),
    ("Google Compute Engine", "google"),
)

_DIMM_TYPES = {
    0x13: "DDR2",
    0x18: "DDR3",
    0x1A: "DDR4",
    0x1D: "LPDDR3",
    0x1E: "LPDDR4",
    0x20: "HBM",
    0x21: "HBM2",
    0x22: "DDR5",
    0x23: "LPDDR5",
    0x24: "HBM3",
}

_NO_DISK = re.compile(r"(loop|ram|zram|sr|fd|nbd|dm-|md|drbd)\d|nvme\d+c\d+n\d+|mmcblk\d+(boot|rpmb)")

_VIRTUAL_DISK = re.compile(
    # A network volume that speaks NVMe is not a local NVMe SSD: EBS, Google's and Azure's remote disks.
    r"virtual|qemu|vbox|vmware|elastic block store|persistentdisk|nvme_card-pd|nvme accelerator",
    re.IGNORECASE,
)


class ProbeError(Exception):
    """A probe has no answer, and the text says why in words for people."""


def os_name(os_release: str) -> str:
    """PRETTY_NAME of os-release, else NAME, else empty."""
    fields: dict[str, str] = dict(re.findall(r"^(\w+)=[\"']?(.*?)[\"']?$", os_release, re.MULTILINE))
    return fields.get("PRETTY_NAME") or fields.get("NAME", "")


def cpuinfo(text: str) -> list[dict[str, str]]:
    """The blocks of /proc/cpuinfo that are processors; the trailing board block of ARM boards is left out."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        if "processor" in fields:
            blocks.append(fields)
    return blocks


def cpu_model(processors: Iterable[Mapping[str, str]]) -> str:
    """The processor's name; big.LITTLE names joined with ` + `; empty when cpuinfo does not tell."""
    names: dict[str, None] = {}
    for fields in processors:
        part = (fields.get("CPU implementer", ""), fields.get("CPU part", ""))
        # `cpu` is POWER's key; ARM kernels name no model at all.
        name = fields.get("model name") or fields.get("cpu") or _ARM_PARTS.get(part, "")
        if name:
            names[" ".join(name.split())] = None
    return " + ".join(names)


def cpuinfo_topology(processors: Iterable[Mapping[str, str]]) -> list[tuple[str, str]]:
    """One (socket, core) per processor, only from blocks that tell both."""
    keys = ("physical id", "core id")
    return [(p[keys[0]], p[keys[1]]) for p in processors if all(key in p for key in keys)]


def lscpu(text: str) -> dict[str, str]:
    """`lscpu -J` as a flat mapping without the colons; newer versions nest fields under `children`.

    Raises ValueError when the text is not lscpu's JSON.
    """

    def flatten(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        flat: dict[str, str] = {}
        for entry in entries:
            flat[str(entry["field"]).rstrip(":")] = str(entry.get("data") or "")
            flat |= flatten(entry.get("children", ()))
        return flat

    try:
        return flatten(json.loads(text)["lscpu"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"not lscpu's JSON: {error!r}") from error


def cpu_list(text: str) -> set[int]:
    """The kernel's list format, `0-3,8`, as numbers. Raises ValueError on anything else."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def cache_bytes(size: str) -> int:
    """A cache size of sysfs, `2048K`, in bytes. Raises ValueError on anything else."""
    match = re.fullmatch(r"(\d+)([KMG]?)", size.strip())
    if match is None:
        raise ValueError(f"cache size {size!r}")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def cache_texts(instances: Iterable[tuple[str, int]]) -> dict[str, str]:
    """Cache instances, (name, bytes) each, as lscpu prints them: the sum and how many."""
    total: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for name, size in instances:
        total[name] += size
        count[name] += 1
    return {
        name: f"{binary_size(total[name])} ({count[name]} instance{'s' * (count[name] > 1)})" for name in sorted(total)
    }


def binary_size(size: int) -> str:
    """Bytes as `96 KiB` or `1.5 MiB`: one decimal, none where it would be 0."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):  # noqa: B007 - the unit at which the loop ends is the answer
        if value < 1024:  # noqa: PLR2004 - the step of binary units
            break
        value /= 1024
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def memory_total(meminfo: str) -> int:
    """MemTotal in bytes. Raises ValueError when it is not there."""
    match = re.search(r"^MemTotal:\s+(\d+) kB$", meminfo, re.MULTILINE)
    if match is None:
        raise ValueError("no MemTotal in /proc/meminfo")
    return int(match[1]) * 1024


def dmi_dimms(table: bytes) -> list[str]:
    """The memory devices (type 17) of an SMBIOS table, one text per DIMM that is plugged in."""
    dimms = []
    position = 0
    while position + 4 <= len(table):
        kind, length = table[position], table[position + 1]
        # A structure is never shorter than its header, and never ends after the table: it is broken from here.
        if length < 4 or position + length > len(table):  # noqa: PLR2004
            break
        if kind == 17:  # noqa: PLR2004 - SMBIOS' number of Memory Device
            dimms.append(_dimm(table[position : position + length].ljust(0x24, b"\0")))
        # The strings follow the structure and end with two NULs.
        end = table.find(b"\0\0", position + length)
        if end < 0:
            break
        position = end + 2
    return [dimm for dimm in dimms if dimm]


def _dimm(structure: bytes) -> str:
    """One SMBIOS memory device as `64 GiB DDR5 4800 MT/s`; empty for an empty slot."""
    (size,) = struct.unpack_from("<H", structure, 0x0C)
    (extended,) = struct.unpack_from("<I", structure, 0x1C)
    speed, configured = (struct.unpack_from("<H", structure, offset)[0] for offset in (0x15, 0x20))
    if size in {0, 0xFFFF}:
        return ""
    megabytes = extended & 0x7FFFFFFF if size == 0x7FFF else size  # noqa: PLR2004 - "see the extended size"
    size_bytes = (size & 0x7FFF) << 10 if size & 0x8000 else megabytes << 20
    words = [binary_size(size_bytes), _DIMM_TYPES.get(structure[0x12], ""), f"{configured or speed} MT/s"]
    return " ".join(word for word in words if word and word != "0 MT/s")


def dimm_text(dimms: Iterable[str]) -> str:
    """DIMMs as `16x 64 GiB DDR5 4800 MT/s`, unlike ones joined with ` + `."""
    return " + ".join(f"{count}x {dimm}" for dimm, count in Counter(dimms).items())


def is_disk(name: str) -> bool:
    """Whether a name of /sys/block may be a disk: no loop, RAM, optical, mapped or hidden multipath device."""
    return _NO_DISK.match(name) is None


def disk_kind(name: str, model: str, *, rotational: bool) -> str:
    """`NVMe SSD`, `SSD`, `HDD` or `virtual`; `model` is vendor and model together."""
    if name.startswith(("vd", "xvd")) or _VIRTUAL_DISK.search(model):
        return "virtual"
    if name.startswith("nvme"):
        return "NVMe SSD"
    return "HDD" if rotational else "SSD"


def link_speed(text: str) -> int | None:
    """A network card's speed in Mbit/s; None where the driver says -1, in either spelling, or nothing."""
    speed = int(text) if re.fullmatch(r"-?\d+", text.strip()) else -1
    return speed if 0 < speed < 2**31 else None


def on_battery(supplies: Iterable[Mapping[str, str]]) -> bool | None:
    """Whether the machine runs on its battery, from sysfs's type, scope, online and status; None without one."""
    # A mouse's battery is a power supply too, with scope Device.
    system = [supply for supply in supplies if supply.get("scope") != "Device"]
    batteries = [supply for supply in system if supply.get("type") == "Battery"]
    mains = [supply for supply in system if supply.get("type") in {"Mains", "USB"}]
    if not batteries:
        return None
    if any(supply.get("online") == "1" for supply in mains):
        return False
    return any(supply.get("status") == "Discharging" for supply in batteries) or any(
        supply.get("type") == "Mains" for supply in mains
    )


def cpu_quota(text: str) -> float | None:
    """Processors' worth of time a cgroup allows: `max 100000` (v2) or quota and period (v1); None without a limit."""
    quota, _, period = text.strip().partition(" ")
    if quota in {"max", "-1", ""} or int(quota) <= 0:
        return None
    return int(quota) / int(period or 100_000)


def virtualization(*, container: str, kernel: str, dmi: Sequence[str], xen: str, hypervisor: bool | None) -> str:
    """systemd-detect-virt's word from what any user can read, for hosts without that program.

    container: the container manager's name, or empty. dmi: product name, then vendors. xen: /proc/xen/capabilities.
    hypervisor: the CPU's flag, None on an architecture that has no such flag.
    """
    if container or "microsoft" in kernel.lower():
        return container or "wsl"
    if "control_d" in xen or any(".metal" in text for text in dmi[:1]):
        return "none"  # Xen's first domain, and EC2's bare metal, whose DMI still says Amazon EC2
    if hypervisor is not False:
        for text in dmi:
            for start, word in _DMI_VENDORS:
                if text.startswith(start):
                    return word
        if "Virtual Machine" in dmi[:1]:
            return "microsoft"
    if hypervisor is None:
        return "none" if any(dmi) else ""
    return "vm-other" if hypervisor else "none"


def cuda_version(number: int) -> str:
    """NVML's CUDA driver version, 12080, as `12.8`."""
    return f"{number // 1000}.{number % 1000 // 10}"
