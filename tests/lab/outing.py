"""fleet as its user has it: a folder with a fleet.yml, a home, and the command, run from the controller's place."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tests.lab.hosts import Lab

if TYPE_CHECKING:
    import subprocess

FLEET = (sys.executable, "-m", "fleet")
ROOT = Path(__file__).resolve().parent.parent.parent


class Fleet:
    """One user's folder and what he types there."""

    def __init__(self, lab: Lab, folder: Path, **changes: Any) -> None:
        self.lab = lab
        self.folder = folder
        self.write(**changes)

    def write(self, **changes: Any) -> None:
        """fleet.yml: inventories/lab.yml with `changes` over it; seconds-long units unless they say otherwise."""
        data = yaml.safe_load((ROOT / "inventories" / "lab.yml").read_text(encoding="utf-8"))
        data["run"] = {"quick_seconds": 1, "lost_after_s": 20}
        data.update(changes)
        (self.folder / "fleet.yml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")

    def __call__(self, *arguments: str, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
        """Run `fleet …` and wait."""
        return self.lab.run([*FLEET, *arguments], cwd=self.folder, timeout=timeout)

    def start(self, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
        """Run `fleet …` and go on; its process id is the command's own."""
        return self.lab.popen([*FLEET, *arguments], cwd=self.folder, **options)

    @property
    def session(self) -> Path:
        """The only, or newest, session's folder."""
        return max((self.folder / "sessions").glob("*/session.json"), key=lambda path: path.stat().st_mtime).parent

    def read(self, *parts: str) -> Any:
        """A JSON file of the session."""
        return json.loads(self.session.joinpath(*parts).read_text(encoding="utf-8"))


NULL = [{"name": "tiny-bert", "backend": "null", "scenarios": ["Offline"]}]
"""A benchmark entry that costs no computing: faults are about hosts, not about models."""


def said(done: "subprocess.CompletedProcess[str]", *words: str) -> None:
    """The command's words to people hold each of `words`, and no traceback."""
    text = done.stdout + done.stderr
    assert "Traceback" not in text, text
    for word in words:
        assert word in " ".join(text.split()), f"{word!r} not in:\n{text}"


def rows(fleet: Fleet, states: Sequence[str]) -> None:
    """The session's units are in these states, in the plan's order."""
    planned = [unit["unit"] for unit in fleet.read("run", "plan.json")["units"]]
    found = [fleet.read("run", "units", f"{unit}.json")["state"] for unit in planned]
    assert found == list(states)
