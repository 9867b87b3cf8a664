"""The main promise: `fleet bench` from nothing but a campaign to a submission and a report, and nothing left at AWS."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cloud.bridge import Bridge
from tests.cloud.outing import HOSTS, NOTHING, Campaign
from tests.conftest import WHEELHOUSE
from tests.lab.outing import NULL, said

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def bridge(lab_possible: None, wheelhouse: Path) -> Iterator[Bridge]:  # noqa: ARG001 - it skips
    with Bridge(4, mounts={wheelhouse: WHEELHOUSE}) as made:
        yield made


@pytest.fixture(autouse=True)
def _empty(bridge: Bridge) -> None:
    bridge.reset()


def test_from_a_campaign_to_submission_and_report_and_nothing_is_left(bridge: Bridge, tmp_path: Path) -> None:
    campaign = Campaign(bridge, tmp_path)
    done = campaign("bench", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    said(done, "3 of 3 hosts", "submission:", "report:")
    # Nothing runs, nothing stands, nobody could log in any more.
    assert bridge.cloud.counts(ours=False) == NOTHING
    assert bridge.until(lambda: not bridge.up())
    assert list((tmp_path / "xdg_state_home/mlperf-fleet").iterdir()) == []
    # It was three instances, and each did its work.
    launched = bridge.cloud.instances()
    assert sorted(one["lifecycle"] for one in launched) == ["on-demand", "on-demand", "spot"]
    results = campaign.read("results", "results.json")
    assert {unit["host"] for unit in results["units"]} == set(HOSTS)
    tree = campaign.session / "submission/open/Lab"
    assert sorted(path.stem for path in (tree / "systems").glob("*.json")) == list(HOSTS)
    assert len(list(tree.glob("results/*/tiny-bert/*/performance/run_1/mlperf_log_detail.txt"))) == len(HOSTS)
    assert "3 of 3 hosts" in (campaign.session / "report/index.html").read_text(encoding="utf-8")
    inventory = (campaign.session / "inventory/hosts.yml").read_text(encoding="utf-8")
    assert all(f"{host}:" in inventory for host in HOSTS)
    assert "type_g5_xlarge:" in inventory


@pytest.mark.thorough
def test_hosts_put_their_results_into_the_bucket_and_the_controller_takes_them(bridge: Bridge, tmp_path: Path) -> None:
    s3 = bridge.cloud.client("s3")
    bridge.lab.inside(lambda: s3.create_bucket(Bucket="fleet-results"))
    campaign = Campaign(bridge, tmp_path, {"results": {"bucket": "fleet-results"}}, benchmarks=NULL)
    done = campaign("bench", "--quick")
    assert done.returncode == 5, done.stdout + done.stderr  # null computes nothing: no result can be submitted
    assert set(campaign.states().values()) == {"done"}
    asked = [(call["action"], call["parameters"].get("path", "")) for call in bridge.cloud.calls(service="s3")]
    put = {path for action, path in asked if action == "PUT" and path.endswith(".tar")}
    taken = {path for action, path in asked if action == "GET" and path in put}
    assert len(put) == 2 * len(HOSTS)
    assert taken == put
    assert bridge.cloud.counts(ours=False) == NOTHING
