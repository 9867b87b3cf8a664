"""Every command in the documentation is run: a page whose commands fail is a bug."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.lab.outing import ROOT, Fleet

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BY_THE_FIXTURE = "fleet bench --quick"


def blocks(page: Path, kind: str) -> list[str]:
    """The lines of a page's fenced blocks of one kind."""
    found = re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [line for block in found for line in block.splitlines() if line.strip()]


@pytest.mark.lab
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "console")], ids=lambda page: page.name)
def test_the_commands_of_a_page_work_one_after_another(benched: Fleet, tmp_path: Path, page: Path) -> None:
    shutil.copytree(benched.folder, tmp_path / "user")
    fleet = Fleet(benched.lab, tmp_path / "user")
    # Other tests may have left the hosts with the environment of other campaigns.
    assert fleet("provision").returncode == 0
    for line in blocks(page, "console"):
        assert line.startswith("$ fleet "), line
        if line.removeprefix("$ ") == BY_THE_FIXTURE:
            continue
        done = fleet(*shlex.split(line.removeprefix("$ fleet "), comments=True))
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=lambda page: page.name)
def test_commands_that_only_a_user_can_run_exist(page: Path) -> None:
    """Commands that need a user's own files or network: their verbs and options must be real."""
    for line in blocks(page, "sh"):
        for command in line.partition("#")[0].split("&&"):
            words = shlex.split(command)
            if words[0] == "make":
                planned = subprocess.run(
                    ["make", "-n", words[1]], cwd=ROOT, capture_output=True, text=True, check=False
                )
                assert planned.returncode == 0, planned.stderr
            elif words[0] == "fleet":
                verbs = [word for word in words[1:] if word.isalpha()]
                shown = _help(verbs)
                for option in (word for word in words if word.startswith("--")):
                    assert option in shown, f"{page.name}: {command}"


def _help(verbs: list[str]) -> str:
    from click.testing import CliRunner

    from fleet.cli.main import cli

    result = CliRunner().invoke(cli, [*verbs, "--help"])
    assert result.exit_code == 0, f"{verbs}: {result.output}"
    return result.output


def test_every_verb_is_in_the_documentation() -> None:
    from fleet.cli.main import VERBS

    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [verb for verb in VERBS if f"fleet {verb}" not in text] == []


def test_every_key_of_the_campaign_is_in_the_example_that_init_writes() -> None:
    from fleet.campaign import BenchmarkEntry, Campaign, HostEntry, RunSettings
    from fleet.cloud_settings import CloudSettings, InstanceEntry, ResultsBucket

    text = (ROOT / "fleet" / "cli" / "templates" / "example.yml").read_text(encoding="utf-8")
    models = (Campaign, BenchmarkEntry, HostEntry, RunSettings, CloudSettings, InstanceEntry, ResultsBucket)
    keys = {field.alias or name for model in models for name, field in model.model_fields.items()}
    assert sorted(key for key in keys if f"{key}:" not in text) == []
