"""Where playbooks, roles and requirement files lie: at the top of a checkout, inside the package in a wheel."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fleet.errors import FleetError


@cache
def root() -> Path:
    """The folder that holds playbooks/, roles/ and requirements/.

    Raises FleetError when the installation carries none.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "_content", package.parent):
        if (candidate / "playbooks").is_dir() and (candidate / "roles").is_dir():
            return candidate
    raise FleetError("this installation carries no playbooks", hint="pip install --force-reinstall mlperf-fleet")


def playbook(name: str) -> Path:
    """The playbook of a stage."""
    return root() / "playbooks" / f"{name}.yml"


def requirements(name: str) -> Path:
    """A pinned requirements file, `harness` or `backend-pytorch`."""
    return root() / "requirements" / f"{name}.txt"


@cache
def role_variables() -> frozenset[str]:
    """Every variable that a role documents in its meta/argument_specs.yml."""
    names: set[str] = set()
    for path in sorted((root() / "roles").glob("*/meta/argument_specs.yml")):
        specs: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["argument_specs"]
        names.update(*(entry.get("options", {}) for entry in specs.values()))
    return frozenset(names)
