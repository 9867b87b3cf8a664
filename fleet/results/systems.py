"""systems/<id>.json: measured facts and the owner's notes become the checker's names. Pure; facts are not trusted.

Required names and traps: policies/submission_rules and the checker's SYSTEM_DESC_REQUIRED_FIELDS at
mlcommons/inference b66003e1. Every value is a string, because the checkers concatenate them.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from fleet.harness.contract import Accelerator, SystemFacts

NOT_STATED = "not stated by the owner"
NOT_APPLICABLE = "N/A"
MAX_TEXT = 500
FIXED = frozenset({"division", "submitter", "status", "system_type", "number_of_nodes", "is_network"})
"""Names that follow from the campaign; is_network's mere presence makes the checker demand network fields."""
MAY_BE_EMPTY = frozenset(
    {
        "host_processor_frequency",
        "host_processor_caches",
        "host_processor_interconnect",
        "accelerator_frequency",
        "accelerator_interconnect_topology",
        "accelerator_on-chip_memories",
        "hw_notes",
        "sw_notes",
        "system_type_detail",
    }
)
_FRAMEWORKS = {
    "torch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "tensorflow": "TensorFlow",
    "tensorrt": "TensorRT",
}


def describe(
    facts: SystemFacts,
    notes: Mapping[str, str],
    *,
    submitter: str,
    division: str,
    category: str,
    availability: str,
    framework: str,
    system_name: str,
) -> dict[str, str]:
    """The 35 required names and fleet's own, all text.

    A note fills what no probe can know. Over a measured value it wins too, but then the measured value stays
    readable under `fleet_owner_overrides`. A note for a name that follows from the campaign is not taken and is
    listed under `fleet_notes_ignored`.
    """
    measured = _host(facts) | _memory_and_disks(facts) | _accelerators(facts.accelerators) | _software(facts)
    fixed = {
        "division": division,
        "submitter": submitter,
        "status": availability,
        "system_type": category,
        "number_of_nodes": "1",
    }
    unknown = {
        "system_name": system_name,
        "framework": framework or NOT_STATED,
        "host_processor_interconnect": "",
        "host_networking_topology": "N/A (single node)",
        "accelerator_interconnect_topology": "",
        "accelerator_on-chip_memories": "",
        "cooling": NOT_STATED,
        "hw_notes": _virtual_text(facts.virtualization),
        "sw_notes": "",
        "system_type_detail": "",
    }
    given = {key: _clean(value) for key, value in notes.items() if _clean(value)}
    taken = {key: value for key, value in given.items() if key not in FIXED}
    return unknown | measured | taken | fixed | _fleet_keys(facts, measured, given)


def framework_text(versions: Mapping[str, str]) -> str:
    """`PyTorch 2.13.0` from a manifest's or the facts' versions; empty when no framework is among them."""
    return ", ".join(f"{title} {_clean(versions[name])}" for name, title in _FRAMEWORKS.items() if versions.get(name))


def identity_hash(facts: SystemFacts) -> str:
    """Stands for machine-id and GPU UUIDs in files that are shown around; empty where neither is known.

    machine-id(5) asks not to publish the id itself.
    """
    if not facts.machine_id and not facts.accelerators:
        return ""
    return hashlib.sha256(f"mlperf-fleet:{facts.identity}".encode()).hexdigest()


def assign_ids(hosts: Iterable[tuple[str, SystemFacts | None, Mapping[str, str]]]) -> dict[str, str]:
    """Host to system id: file-safe, readable, and never the same for two hosts.

    The owner's `system_name` note, else the host's name; where two would be equal (also in letter case alone, for
    file systems that fold it) each gets a short suffix of its identity, or of its name when it was never described.
    """
    rows = list(hosts)
    bases = {host: _file_safe(notes.get("system_name") or host) for host, _, notes in rows}
    ids = dict(bases)
    for suffix in (_identity_suffix, _host_suffix):
        clashing = _clashing(ids)
        for host, facts, _ in rows:
            if host in clashing:
                ids[host] = f"{bases[host]}-{suffix(host, facts)}"
    return ids


def _clashing(ids: Mapping[str, str]) -> set[str]:
    counts = Counter(value.casefold() for value in ids.values())
    return {host for host, value in ids.items() if counts[value.casefold()] > 1}


def _identity_suffix(host: str, facts: SystemFacts | None) -> str:
    return (identity_hash(facts) if facts else "")[:6] or _host_suffix(host, facts)


def _host_suffix(host: str, _: SystemFacts | None) -> str:
    return hashlib.sha256(host.encode()).hexdigest()[:12]


def _file_safe(text: str) -> str:
    """No spaces and no leading dot: the older checkers refuse both in submission trees."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:64] or "system"


def _clean(text: str) -> str:
    """One line of bounded length: probe output may hold anything."""
    printable = "".join(char if char.isprintable() else " " for char in str(text))
    return " ".join(printable.split())[:MAX_TEXT]


def _host(facts: SystemFacts) -> dict[str, str]:
    sockets = max(1, facts.cpu_sockets)
    cards = [_clean(f"{card.name}{_speed(card.speed_mbps)}") for card in facts.network]
    return {
        # the policy's core count is per processor, facts count all sockets
        "host_processor_model_name": _clean(facts.cpu_model) or _unprobed(facts, "cpu_model"),
        "host_processors_per_node": str(sockets),
        "host_processor_core_count": str(max(1, facts.cpu_cores // sockets)),
        "host_processor_frequency": f"{facts.cpu_max_mhz:.0f} MHz" if facts.cpu_max_mhz else "",
        "host_processor_caches": _clean(", ".join(f"{level} {size}" for level, size in facts.cpu_caches.items())),
        "host_networking": ", ".join(cards)[:MAX_TEXT] or NOT_APPLICABLE,
        "host_network_card_count": str(len(cards)),
        "operating_system": _clean(facts.os_name) or _unprobed(facts, "os_name"),
    }


def _speed(mbps: int | None) -> str:
    if not mbps or mbps < 0:
        return ""
    return f" {mbps / 1000:g} Gb/s" if mbps >= 1000 else f" {mbps} Mb/s"  # noqa: PLR2004


def _memory_and_disks(facts: SystemFacts) -> dict[str, str]:
    total = sum(disk.bytes for disk in facts.disks)
    kinds = Counter(_clean(disk.kind) or "unknown" for disk in facts.disks)
    return {
        "host_memory_capacity": f"{facts.memory_bytes / 2**30:.4g} GiB" if facts.memory_bytes else "not probed",
        "host_memory_configuration": _clean(facts.memory_configuration) or "not probed (needs root)",
        "host_storage_capacity": _bytes_text(total) if total else _unprobed(facts, "disks"),
        "host_storage_type": ", ".join(f"{count}x {kind}" for kind, count in kinds.items())
        or _unprobed(facts, "disks"),
    }


def _bytes_text(count: int) -> str:
    return f"{count / 1e12:.3g} TB" if count >= 1e12 else f"{count / 1e9:.4g} GB"  # noqa: PLR2004


def _accelerators(gpus: tuple[Accelerator, ...]) -> dict[str, str]:
    if not gpus:
        names = (
            "accelerator_model_name",
            "accelerator_memory_capacity",
            "accelerator_host_interconnect",
            "accelerator_interconnect",
            "accelerator_memory_configuration",
        )
        # "0" is text because the checker takes the number 0 for a missing field
        return {"accelerators_per_node": "0", "accelerator_frequency": "", **dict.fromkeys(names, NOT_APPLICABLE)}
    buses = [
        f"PCIe Gen{gpu.pcie_generation} x{gpu.pcie_width}" for gpu in gpus if gpu.pcie_generation and gpu.pcie_width
    ]
    clocks = [f"{gpu.max_sm_clock_mhz} MHz" for gpu in gpus if gpu.max_sm_clock_mhz]
    return {
        "accelerators_per_node": str(len(gpus)),
        "accelerator_model_name": _each(gpu.name or "not probed" for gpu in gpus),
        "accelerator_memory_capacity": _each(f"{gpu.memory_bytes / 2**30:.4g} GiB" for gpu in gpus),
        "accelerator_frequency": _each(clocks),
        "accelerator_host_interconnect": _each(buses) or "not probed",
        "accelerator_interconnect": "not probed" if len(gpus) > 1 else NOT_APPLICABLE,
        "accelerator_memory_configuration": "not probed",
    }


def _each(texts: Iterable[str]) -> str:
    """One text where all are alike, else each with its count."""
    counts = Counter(_clean(text) for text in texts)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{count}x {text}" for text, count in counts.items())


def _software(facts: SystemFacts) -> dict[str, str]:
    parts = [f"{name} {version}" for name, version in sorted(facts.software.items()) if version]
    parts += [f"NVIDIA driver {facts.driver_version}"] if facts.driver_version else []
    parts += [f"CUDA {facts.cuda_version}"] if facts.cuda_version else []
    parts += [f"Linux {facts.kernel}"] if facts.kernel else []
    return {"other_software_stack": _clean(", ".join(parts)) or "not probed"}


def _unprobed(facts: SystemFacts, probe: str) -> str:
    why = _clean(facts.probe_errors.get(probe, ""))
    return f"not probed ({why})" if why else "not probed"


def _virtual_text(word: str) -> str:
    return f"virtualised ({_clean(word)})" if word and word != "none" else ""


def _fleet_keys(facts: SystemFacts, measured: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """Extra names, which every checker tolerates."""
    overrides = [
        f"{key}: measured {measured[key]!r}, owner says {value!r}"
        for key, value in sorted(given.items())
        if _was_measured(measured.get(key, "")) and measured[key] != value
    ]
    extra = {
        "fleet_identity_sha256": identity_hash(facts),
        "fleet_architecture": _clean(facts.architecture),
        "fleet_host_threads": str(facts.cpu_threads),
        "fleet_virtualization": _clean(facts.virtualization) or "unknown",
        "fleet_on_battery": {True: "yes", False: "no", None: ""}[facts.on_battery],
        "fleet_probe_errors": _clean("; ".join(f"{probe}: {why}" for probe, why in sorted(facts.probe_errors.items()))),
        "fleet_owner_overrides": "; ".join(overrides),
        "fleet_notes_ignored": ", ".join(sorted(key for key in given if key in FIXED)),
    }
    return {key: value for key, value in extra.items() if value}


def _was_measured(text: str) -> bool:
    return bool(text) and not text.startswith("not probed")
