"""Many hosts that fleet has provisioned already: what was installed on one is laid under every other's disk."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

from tests.lab.hosts import Lab, LabError
from tests.lab.outing import Fleet

if TYPE_CHECKING:
    from pathlib import Path

WHEELHOUSE = "/opt/wheelhouse"
WORK_DIR = "home/bench/.mlperf-fleet"


def null(**options: float) -> list[dict[str, Any]]:
    """A benchmark entry that needs neither torch nor time: a performance unit of the null backend."""
    return [
        {
            "name": "tiny-bert",
            "backend": "null",
            "backend_options": options,
            "scenarios": ["SingleStream"],
            "modes": ["performance"],
        }
    ]


def entry(hosts: int) -> list[dict[str, str]]:
    """The campaign's `hosts` for h01 to that number."""
    return [{"name": f"h[01-{hosts:02}]" if hosts > 1 else "h01", "kind": "server", "user": "bench"}]


def layer(wheels: Path, folder: Path, benchmarks: list[dict[str, Any]]) -> Path:
    """A disk layer, below `folder`, with everything that `fleet provision` of these benchmarks installs on a host.

    Raises LabError when it cannot be made.
    """
    made = folder / "layer"
    home = made / WORK_DIR
    home.parent.mkdir(parents=True)
    with Lab(1, mounts={wheels: WHEELHOUSE}) as lab:
        done = Fleet(lab, folder, hosts=entry(1), benchmarks=benchmarks)("provision", timeout=900)
        if done.returncode:
            raise LabError(f"the host to copy could not be provisioned:\n{done.stdout}{done.stderr}")
        there = lab["h01"].upper / WORK_DIR
        owner = there.stat()
        subprocess.run(["cp", "-a", str(there), str(home)], check=True, timeout=300)
        os.chown(home.parent, owner.st_uid, owner.st_gid)
    return made
