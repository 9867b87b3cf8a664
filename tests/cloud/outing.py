"""A user's folder whose campaign launches three instances in the bridge's lab, and what he types there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tests.cloud.bridge import Bridge
from tests.conftest import WHEELHOUSE
from tests.lab import network
from tests.lab.outing import FLEET

if TYPE_CHECKING:
    import subprocess

TORCH = [
    {"name": "tiny-bert", "backend": "pytorch", "backend_options": {"threads": 1}, "scenarios": ["Offline"]},
]
"""A benchmark of seconds whose results can be submitted."""
HOSTS = ("g5-1", "g5-2", "spot-1")
NOTHING = {"instances": 0, "key_pairs": 0, "groups": 0, "volumes": 0}


class Campaign:
    """A fleet.yml that names three g5.xlarge, one of them spot, with `cloud` over that section and `changes` over all."""

    def __init__(self, bridge: Bridge, folder: Path, cloud: Mapping[str, Any] = {}, **changes: Any) -> None:
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

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """Type it and go on; what it says goes to `said`."""
        with (self.folder / "said").open("a", encoding="utf-8") as said:
            return self.bridge.lab.popen(
                [*FLEET, *words], cwd=self.folder, env=self.environment, stdout=said, stderr=said
            )

    @property
    def said(self) -> str:
        """What started commands have said so far."""
        return (self.folder / "said").read_text(encoding="utf-8")

    def read(self, *parts: str) -> Any:
        """A JSON file of the session."""
        return json.loads(self.session.joinpath(*parts).read_text(encoding="utf-8"))

    def instance(self, host: str) -> str:
        """The id of a host's newest instance, by the ledger; empty while there is none."""
        leases = [json.loads(path.read_text()) for path in self.session.glob("cloud/leases/*.json")]
        leases.sort(key=lambda lease: lease["written_at"])
        ids = [one["id"] for lease in leases for one in lease["instances"] if one["host"] == host]
        return str(ids[-1]) if ids else ""

    def states(self) -> dict[str, str]:
        """Unit to its state."""
        found = [json.loads(path.read_text()) for path in (self.session / "run/units").glob("*.json")]
        return {unit["unit"]: unit["state"] for unit in found}

    @property
    def session(self) -> Path:
        """The only session."""
        (found,) = (path.parent for path in (self.folder / "sessions").glob("*/session.json"))
        return found
