"""`fleet bench` on instances when something goes wrong in the middle: everything is measured or named, nothing is left."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cloud.bridge import Bridge
from tests.cloud.outing import HOSTS, NOTHING, Campaign
from tests.conftest import WHEELHOUSE
from tests.lab.outing import NULL

pytestmark = [pytest.mark.lab, pytest.mark.faults]
LONG = {"quick_seconds": 12, "lost_after_s": 20}
"""Units that are still running when something happens to them."""


@pytest.fixture(scope="module")
def bridge(lab_possible: None, wheelhouse: Path) -> Iterator[Bridge]:  # noqa: ARG001 - it skips
    with Bridge(4, mounts={wheelhouse: WHEELHOUSE}) as made:
        yield made


@pytest.fixture
def campaign(bridge: Bridge, tmp_path: Path) -> Campaign:
    bridge.reset()
    return Campaign(bridge, tmp_path, benchmarks=NULL, run=LONG)


def running(campaign: Campaign, host: str) -> bool:
    """Whether LoadGen measures there, as the command has seen it."""
    return f"{host}: tiny-bert.Offline.performance" in campaign.said


def test_a_spot_instance_is_taken_back_and_its_units_run_on_another(bridge: Bridge, campaign: Campaign) -> None:
    command = campaign.start("bench", "--quick")
    bridge.until(lambda: running(campaign, "spot-1"), 120)
    first = campaign.instance("spot-1")
    bridge.interrupt(first, after_s=20)
    assert command.wait(300) == 5, campaign.said  # null computes nothing: no result can be submitted
    assert set(campaign.states().values()) == {"done"}
    assert campaign.instance("spot-1") != first
    assert len(bridge.cloud.instances()) == 4
    assert bridge.cloud.counts(ours=False) == NOTHING
    # The unit that was interrupted is known to have been, and is in no result.
    attempts = campaign.read("run", "units", "spot-1.tiny-bert.Offline.performance.json")["attempts"]
    assert [attempt["reason"] for attempt in attempts][:1] == ["interrupted"]
    assert {unit["host"] for unit in campaign.read("results", "results.json")["units"]} == set(HOSTS)


def test_a_spot_instance_that_is_not_to_be_had_again_costs_the_others_nothing(
    bridge: Bridge, campaign: Campaign
) -> None:
    command = campaign.start("bench", "--quick")
    bridge.until(lambda: running(campaign, "spot-1"), 120)
    bridge.cloud.capacity("g5.xlarge", 0, market="spot")
    bridge.interrupt(campaign.instance("spot-1"), after_s=5)
    command.wait(300)
    said = " ".join(campaign.said.split())
    assert "Traceback" not in said
    assert "2 of 3 hosts" in said
    assert "InsufficientInstanceCapacity" in said
    states = campaign.states()
    assert {unit.partition(".")[0] for unit, state in states.items() if state == "done"} >= {"g5-1", "g5-2"}
    assert {state for unit, state in states.items() if unit.startswith("g5")} == {"done"}
    assert "interrupted" in states.values()
    assert campaign.read("results", "results.json")
    assert bridge.cloud.counts(ours=False) == NOTHING


def test_a_controller_that_was_killed_goes_on_with_the_same_instances(bridge: Bridge, campaign: Campaign) -> None:
    command = campaign.start("bench", "--quick")
    bridge.until(lambda: running(campaign, "g5-1"), 120)
    command.send_signal(signal.SIGKILL)
    command.wait(10)
    before = set(bridge.up())
    assert len(before) == 3
    done = campaign("bench", "--quick")
    assert done.returncode == 5, done.stdout + done.stderr
    assert {one["id"] for one in bridge.cloud.instances()} == before
    assert set(campaign.states().values()) == {"done"}
    assert bridge.cloud.counts(ours=False) == NOTHING


def test_instances_that_nobody_comes_back_to_end_themselves(bridge: Bridge, tmp_path: Path) -> None:
    bridge.reset()
    campaign = Campaign(bridge, tmp_path, {"lease_hours": 0.01}, benchmarks=NULL, run=LONG)
    assert campaign("up", "--session", "s1").returncode == 0
    assert len(bridge.up()) == 3 or bridge.until(lambda: len(bridge.up()) == 3)
    # 36 s: nobody does anything.
    bridge.until(lambda: not bridge.up(), 90)
    assert {one["state"] for one in bridge.cloud.instances()} == {"terminated"}
    assert bridge.cloud.counts(ours=False) == {**NOTHING, "key_pairs": 1, "groups": 1}
    done = campaign("reap", "--yes", "--region", "us-east-1")
    assert done.returncode == 0, done.stderr
    assert bridge.cloud.counts(ours=False) == NOTHING


def test_a_lease_that_ends_under_a_run_is_said_and_nothing_is_left(bridge: Bridge, tmp_path: Path) -> None:
    bridge.reset()
    campaign = Campaign(
        bridge, tmp_path, {"lease_hours": 0.015}, benchmarks=NULL, run={"quick_seconds": 60, "lost_after_s": 10}
    )
    done = campaign("bench", "--quick")
    assert done.returncode not in {0, 4}, done.stderr
    assert "Traceback" not in done.stderr
    assert "its lease ended" in " ".join((done.stdout + done.stderr).split())
    assert bridge.cloud.counts(ours=False) == NOTHING


def test_an_extension_reaches_the_timers_of_instances_that_measure(bridge: Bridge, tmp_path: Path) -> None:
    bridge.reset()
    campaign = Campaign(bridge, tmp_path, {"lease_hours": 0.05}, benchmarks=NULL, run=LONG)
    command = campaign.start("bench", "--quick")
    bridge.until(lambda: running(campaign, "g5-1"), 120)
    # Beside the controller that holds the session.
    done = campaign("extend", "--hours", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    ends = []
    for id_ in bridge.up():
        host = bridge.host(id_)
        assert host is not None
        ends.append(float(host.sh("cat /var/lib/mlperf-fleet/expires-at")))
    assert len(ends) == 3
    assert min(ends) > time.time() + 3000
    assert command.wait(300) == 5, campaign.said
    assert set(campaign.states().values()) == {"done"}
    assert bridge.cloud.counts(ours=False) == NOTHING


def test_credentials_that_expire_under_a_run_end_in_the_ids_of_what_runs(bridge: Bridge, campaign: Campaign) -> None:
    command = campaign.start("bench", "--quick")
    bridge.until(lambda: running(campaign, "g5-1"), 120)
    bridge.cloud.expire()
    code = command.wait(300)
    said = " ".join(campaign.said.split())
    assert code == 4, said
    assert "Traceback" not in said
    assert all(id_ in said for id_ in bridge.up())
    assert "renew your credentials" in said
    # All was measured and is home all the same; with new credentials what runs is ended, and nothing else is done.
    assert set(campaign.states().values()) == {"done"}
    bridge.cloud.heal()
    done = campaign("down")
    assert done.returncode == 0, done.stderr
    assert bridge.cloud.counts(ours=False) == NOTHING
