"""System descriptions that every checker takes, and ids that never collide."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.results.systems import MAY_BE_EMPTY, assign_ids, describe, framework_text, identity_hash
from tests.unit.results.session_files import DATA, facts

REQUIRED = """division submitter status system_name number_of_nodes host_processor_model_name
host_processors_per_node host_processor_core_count host_memory_capacity host_storage_capacity host_storage_type
accelerators_per_node accelerator_model_name accelerator_memory_capacity framework operating_system system_type
other_software_stack host_processor_frequency host_processor_caches host_memory_configuration
host_processor_interconnect host_networking host_networking_topology accelerator_frequency
accelerator_host_interconnect accelerator_interconnect accelerator_interconnect_topology
accelerator_memory_configuration accelerator_on-chip_memories cooling hw_notes sw_notes host_network_card_count
system_type_detail""".split()  # noqa: SIM905 - one name per line would be 35 lines
HOSTS = sorted(path.parent.name for path in (DATA / "hosts").glob("*/expected.json"))


def described(name: str, notes: dict[str, str] | None = None, **changes: Any) -> dict[str, str]:
    return describe(
        facts(name, **changes),
        notes or {},
        submitter="ExampleLab",
        division="open",
        category="edge",
        availability="available",
        framework="PyTorch 2.13.0",
        system_name="s",
    )


@pytest.mark.parametrize("name", HOSTS)
def test_the_35_names_are_there_and_are_text(name: str) -> None:
    found = described(name)
    assert len(REQUIRED) == 35
    assert set(REQUIRED) <= set(found)
    assert all(isinstance(value, str) for value in found.values())
    assert [key for key in REQUIRED if not found[key] and key not in MAY_BE_EMPTY] == []
    assert int(found["accelerators_per_node"]) >= 0
    assert found["number_of_nodes"] == "1"
    assert "is_network" not in found


def test_a_host_that_no_probe_could_read_still_has_every_required_value() -> None:
    blank: dict[str, Any] = {
        "cpu_model": "",
        "os_name": "",
        "disks": (),
        "network": (),
        "memory_bytes": 0,
        "kernel": "",
        "cpu_sockets": 0,
        "cpu_cores": 0,
        "machine_id": "",
        "probe_errors": {"disks": "no lsblk"},
    }
    found = described("laptop-hybrid-cores", **blank)
    assert [key for key in REQUIRED if not found[key] and key not in MAY_BE_EMPTY] == []
    assert found["host_storage_type"] == "not probed (no lsblk)"
    assert "fleet_identity_sha256" not in found


def test_cores_are_per_processor() -> None:
    found = described("epyc-2-sockets-8-gpus")
    assert (found["host_processors_per_node"], found["host_processor_core_count"]) == ("2", "64")
    assert (found["accelerators_per_node"], found["accelerator_model_name"]) == ("8", "NVIDIA A100-SXM4-80GB")


def test_machine_id_stays_private() -> None:
    secret = "feedfacefeedfacefeedfacefeedface"
    assert secret not in str(described("wsl2", machine_id=secret))


def test_the_owner_fills_what_no_probe_knows() -> None:
    found = described("laptop-hybrid-cores", {"cooling": "air", "hw_notes": " under a desk\n"})
    assert (found["cooling"], found["hw_notes"]) == ("air", "under a desk")
    assert "fleet_owner_overrides" not in found


def test_an_override_of_a_measured_value_stays_visible() -> None:
    found = described("laptop-hybrid-cores", {"host_memory_capacity": "64 GB"})
    assert found["host_memory_capacity"] == "64 GB"
    assert found["fleet_owner_overrides"] == "host_memory_capacity: measured '15.25 GiB', owner says '64 GB'"


def test_notes_cannot_touch_what_the_campaign_says() -> None:
    found = described("wsl2", {"is_network": "false", "division": "closed", "cooling": ""})
    assert "is_network" not in found
    assert found["division"] == "open"
    assert found["cooling"] == "not stated by the owner"
    assert found["fleet_notes_ignored"] == "division, is_network"


def test_probe_text_becomes_one_bounded_line() -> None:
    found = described("wsl2", cpu_model="a\x00b\n" + "c" * 2000)
    assert found["host_processor_model_name"].startswith("a b c")
    assert len(found["host_processor_model_name"]) == 500


def test_framework_text() -> None:
    assert framework_text({"torch": "2.13.0", "python": "3.11"}) == "PyTorch 2.13.0"
    assert framework_text({"python": "3.11"}) == ""


def test_ids_come_from_the_note_or_the_host() -> None:
    one = facts("wsl2", machine_id="a")
    assert assign_ids([("h 1", one, {}), ("h2", None, {"system_name": "Big Box / v2"})]) == {
        "h 1": "h-1",
        "h2": "Big-Box-v2",
    }


def test_two_hosts_with_one_name_both_survive() -> None:
    one, two = facts("wsl2", machine_id="a"), facts("wsl2", machine_id="b")
    note = {"system_name": "box"}
    ids = assign_ids([("h1", one, note), ("h2", two, note), ("h3", None, {"system_name": "BOX"}), ("h4", one, {})])
    assert ids["h1"] == f"box-{identity_hash(one)[:6]}"
    assert ids["h2"] == f"box-{identity_hash(two)[:6]}"
    assert len({value.casefold() for value in ids.values()}) == 4


def test_even_clones_with_one_machine_id_stay_two() -> None:
    same = facts("wsl2", machine_id="a")
    ids = assign_ids([("h1", same, {"system_name": "x"}), ("h2", same, {"system_name": "x"})])
    assert len(set(ids.values())) == 2


@given(st.dictionaries(st.text(min_size=1), st.text(), max_size=6))
def test_ids_are_file_safe_and_distinct(hosts: dict[str, str]) -> None:
    ids = assign_ids((host, None, {"system_name": name}) for host, name in hosts.items())
    assert set(ids) == set(hosts)
    assert len({value.casefold() for value in ids.values()}) == len(hosts)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) for value in ids.values())
