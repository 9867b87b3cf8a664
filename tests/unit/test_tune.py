"""Tuning a fleet: one host of a kind first, the others from where it ended, and a cause for whoever says nothing."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fleet import handoff, planning, tune
from fleet.harness.contract import SystemFacts
from fleet.inventory import reach
from fleet.inventory.hosts import Host
from fleet.terms import HostState, Mode, Scenario
from tests.unit.fakes import RecordingWatch, Scene, answer, scene, status

HOSTS = "[{name: 'h[01-03]', kind: server}]"
TEXT = (
    "submitter: ExampleLab\n"
    "benchmarks: [{name: tiny-bert, scenarios: [Offline, SingleStream], user_conf: {SingleStream: {target_latency: 4}}}]\n"
    f"hosts: {HOSTS}\n"
)


pytestmark = pytest.mark.usefixtures("quick_polls")


@dataclass
class Tuned:
    """A host whose tuning units end at once with what `tuning` says."""

    units: list[str]
    tuning: str
    asked: list[str] = field(default_factory=list)
    given: list[dict[str, Any]] = field(default_factory=list)

    def run(self, command: str, *, timeout: float, stdin: bytes = b"") -> reach.Answer:
        assert timeout > 0
        if stdin:
            self.given += json.loads(stdin)["specs"]
            return reach.Answer(rc=0, out="{}", err="")
        self.asked.append(command)
        out = self.tuning if command.startswith("cat ") else answer(*[status(unit) for unit in self.units])
        return reach.Answer(rc=0, out=out, err="")

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tuned]:
    found = {
        f"h0{n}": Tuned([f"h0{n}.tiny-bert.Offline.tuning"], json.dumps({"values": {"target_qps": 100.0 * n}}))
        for n in (1, 2, 3)
    }

    def opened(host: Host) -> Tuned:
        return found[host.name]

    monkeypatch.setattr(reach, "connect", opened)
    return found


def facts(made: Scene, host: str, cpu: str) -> None:
    value = SystemFacts(
        hostname=host, machine_id=host, boot_id="b", os_name="", kernel="", architecture="", cpu_model=cpu,
        cpu_sockets=1, cpu_cores=2, cpu_threads=2, cpu_max_mhz=None, cpu_caches={}, memory_bytes=1,
        memory_configuration="", disks=(), network=(), accelerators=(), driver_version="", cuda_version="",
        virtualization="", on_battery=None, software={"torch": "2.13.0"}, probe_errors={},
    )  # fmt: skip
    made.session.write(made.session.provision / "facts" / f"{host}.json", value)


def test_one_host_of_a_kind_goes_first_and_the_others_begin_where_it_ended(
    tmp_path: Path, hosts: dict[str, Tuned]
) -> None:
    made = scene(tmp_path, TEXT)
    for host, cpu in {"h01": "A", "h02": "A", "h03": "B"}.items():
        facts(made, host, cpu)
    found = tune.tune(made.session, made.campaign, RecordingWatch())
    starts = {name: [spec["start"] for spec in host.given] for name, host in hosts.items()}
    # h02 is of the same kind as h01, and begins where that one ended.
    assert starts == {"h01": [{}], "h02": [{"target_qps": 100.0}], "h03": [{}]}
    assert all(spec["tune_only"] for host in hosts.values() for spec in host.given)
    assert {item.host: item.values for item in found} == {
        f"h0{n}": {"tiny-bert": {Scenario.OFFLINE: {"target_qps": 100.0 * n}}} for n in (1, 2, 3)
    }
    token = f"{made.session.token}-tune"
    assert shlex.split(hosts["h01"].asked[1]) == [
        "cat", f"/home/me/.mlperf-fleet/runs/{token}/h01.tiny-bert.Offline.tuning/tuning.json",
    ]  # fmt: skip


def test_a_run_takes_what_tuning_found_and_the_campaigns_own_value_wins(
    tmp_path: Path, hosts: dict[str, Tuned]
) -> None:
    made = scene(tmp_path, TEXT)
    assert len(hosts) == 3
    tune.tune(made.session, made.campaign, RecordingWatch())
    units = {spec.unit: spec for spec in planning.plan(made.session, made.campaign, quick=False).units}
    assert units[f"h02.tiny-bert.Offline.{Mode.PERFORMANCE}"].user_conf == "*.Offline.target_qps = 200.0\n"
    single = units[f"h02.tiny-bert.SingleStream.{Mode.PERFORMANCE}"]
    assert single.user_conf == "*.SingleStream.target_latency = 4.0\n"


def test_a_host_that_says_nothing_has_a_cause_and_holds_nobody_up(tmp_path: Path, hosts: dict[str, Tuned]) -> None:
    made = scene(tmp_path, TEXT, states={"h03": HostState.UNREACHABLE})
    hosts["h01"].tuning = "{}"
    found = {item.host: item for item in tune.tune(made.session, made.campaign, RecordingWatch())}
    assert found["h01"].causes == {"h01.tiny-bert.Offline.tuning": "its tuning.json cannot be read"}
    assert found["h02"].values
    assert found["h03"].causes == {"h03.tiny-bert.Offline.tuning": "h03 is away"}
    assert set(handoff.tuned(made.session)) == {"h01", "h02", "h03"}


def test_tuning_again_begins_at_another_hosts_value_but_is_no_reason_to_run_again(
    tmp_path: Path, hosts: dict[str, Tuned]
) -> None:
    made = scene(tmp_path, TEXT)
    assert hosts
    (first, *_) = planning.plan(made.session, made.campaign, quick=False).units
    for host in ("h01", "h02"):
        facts(made, host, "A")
    values = {"tiny-bert": {Scenario.OFFLINE: {"target_qps": 7.0}}}
    made.session.write(made.session.tune / "h02.json", handoff.TunedFile(host="h02", values=values))
    (again, *_) = planning.plan(made.session, made.campaign, quick=False).units
    assert (first.start, again.start) == ({}, {"target_qps": 7.0})
    assert handoff.same_run(first, again)
