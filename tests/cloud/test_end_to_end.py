"""The main promise: `fleet bench` from nothing but a campaign to a submission and a report, and nothing left at AWS."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.cloud.bridge import Bridge
from tests.conftest import WHEELHOUSE
from tests.lab import network
from tests.lab.outing import FLEET, said

if TYPE_CHECKING:
    import subprocess

pytestmark = pytest.mark.lab
TORCH = [
    {"name": "tiny-bert", "backend": "pytorch", "backend_options": {"threads": 1}, "scenarios": ["Offline"]},
]
HOSTS = ("g5-1", "g5-2", "spot-1")


class Campaign:
    """A user's folder with a fleet.yml that names three g5.xlarge, one of them spot, and what he types there."""

    def __init__(self, bridge: Bridge, folder: Path, cloud: Mapping[str, Any], **changes: Any) -> None:
        self.bridge, self.folder = bridge, folder
        data = {
            "submitter": "Lab",
            "benchmarks": TORCH,
            "run": {"quick_seconds": 1, "lost_after_s": 20},
            "role_variables": {"python_env_find_links": WHEELHOUSE, "python_env_no_index": True},
            "cloud": {
                "max_cost": 20,
                "user": bridge.lab.user,
                "address": "private",
                "ssh_from": f"{network.router()}/32",
                "instances": [
                    {"name": "g5", "count": 2, "types": ["g5.xlarge"]},
                    {"name": "spot", "types": ["g5.xlarge"], "market": "spot"},
                ],
                **cloud,
            },
            **changes,
        }
        (folder / "fleet.yml").write_text(yaml.safe_dump(data), encoding="utf-8")
        self.environment = {**bridge.environment, "HOME": str(folder / "home")}
        for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
            self.environment[name] = str(folder / name.lower())
        (folder / "home").mkdir()

    def __call__(self, *words: str, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
        """Type `fleet …` at the controller's place."""
        return self.bridge.lab.run([*FLEET, *words], cwd=self.folder, env=self.environment, timeout=timeout)

    @property
    def session(self) -> Path:
        """The only session."""
        (found,) = (path.parent for path in (self.folder / "sessions").glob("*/session.json"))
        return found


@pytest.fixture(scope="module")
def bridge(lab_possible: None, wheelhouse: Path) -> Iterator[Bridge]:  # noqa: ARG001 - it skips
    with Bridge(4, mounts={wheelhouse: WHEELHOUSE}) as made:
        yield made


@pytest.fixture(autouse=True)
def _empty(bridge: Bridge) -> None:
    bridge.reset()


def test_from_a_campaign_to_submission_and_report_and_nothing_is_left(bridge: Bridge, tmp_path: Path) -> None:
    campaign = Campaign(bridge, tmp_path, {})
    done = campaign("bench", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    said(done, "3 of 3 hosts", "submission:", "report:")
    # Nothing runs, nothing stands, nobody could log in any more.
    assert bridge.cloud.counts(ours=False) == {"instances": 0, "key_pairs": 0, "groups": 0, "volumes": 0}
    assert bridge.until(lambda: not bridge.up())
    assert list((tmp_path / "xdg_state_home/mlperf-fleet").iterdir()) == []
    # It was three instances, and each did its work.
    launched = bridge.cloud.instances()
    assert sorted(one["lifecycle"] for one in launched) == ["on-demand", "on-demand", "spot"]
    results = json.loads((campaign.session / "results/results.json").read_text(encoding="utf-8"))
    assert {unit["host"] for unit in results["units"]} == set(HOSTS)
    tree = campaign.session / "submission/open/Lab"
    assert sorted(path.stem for path in (tree / "systems").glob("*.json")) == list(HOSTS)
    assert len(list(tree.glob("results/*/tiny-bert/*/performance/run_1/mlperf_log_detail.txt"))) == len(HOSTS)
    assert "3 of 3 hosts" in (campaign.session / "report/index.html").read_text(encoding="utf-8")
    inventory = (campaign.session / "inventory/hosts.yml").read_text(encoding="utf-8")
    assert all(f"{host}:" in inventory for host in HOSTS)
    assert "type_g5_xlarge:" in inventory
