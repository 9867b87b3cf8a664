"""Roles and playbooks: defaults are the manual, specs are the law, and names that code reads are really there."""

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fleet import content, plays, provision

TOP = Path(__file__).parents[2]
ROLES = sorted(path for path in (TOP / "roles").iterdir() if path.is_dir())
PLAYBOOKS = sorted((TOP / "playbooks").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def named(path: Path) -> str:
    return path.name


@pytest.fixture(params=ROLES, ids=named)
def role(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture(params=PLAYBOOKS, ids=named)
def playbook(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def options(role: Path) -> dict[str, Any]:
    found: dict[str, Any] = read(role / "meta" / "argument_specs.yml")["argument_specs"]["main"]["options"]
    return found


def tasks(role: Path) -> list[dict[str, Any]]:
    """Every task of a role, blocks opened."""
    waiting = [task for path in sorted((role / "tasks").glob("*.yml")) for task in read(path)]
    found: list[dict[str, Any]] = []
    while waiting:
        task = waiting.pop(0)
        found.append(task)
        waiting += [*task.get("block", []), *task.get("rescue", []), *task.get("always", [])]
    return found


def test_there_are_roles_and_playbooks() -> None:
    assert {role.name for role in ROLES} >= {"preflight", "python_env", "harness", "assets", "describe"}
    assert {path.stem for path in PLAYBOOKS} >= {"preflight", "provision", "run"}


def test_defaults_and_argument_specs_say_the_same(role: Path) -> None:
    assert set(read(role / "defaults" / "main.yml")) == set(options(role))


def test_every_variable_carries_its_roles_name_and_is_explained(role: Path) -> None:
    for name, spec in options(role).items():
        assert name.startswith(f"{role.name}_"), name
        assert spec["type"]
        assert spec["description"].endswith("."), name


def test_defaults_fit_their_types(role: Path) -> None:
    kinds: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict}
    defaults = read(role / "defaults" / "main.yml")
    for name, spec in options(role).items():
        assert isinstance(defaults[name], kinds[spec["type"]]), name
        assert defaults[name] in spec.get("choices", [defaults[name]]), name


def test_every_option_is_used(role: Path) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (role / "tasks").rglob("*.yml"))
    assert [name for name in options(role) if not re.search(rf"\b{name}\b", text)] == []


def test_every_role_has_a_readme(role: Path) -> None:
    text = (role / "README.md").read_text(encoding="utf-8")
    assert role.name in text


def test_every_task_has_a_name_and_a_full_module_name(role: Path) -> None:
    own = {path.stem for path in (role / "library").glob("*.py")}
    for task in tasks(role):
        assert task["name"][0].isupper(), task
        if "block" not in task:
            assert [key for key in task if key.startswith("ansible.builtin.") or key in own], task["name"]


def test_a_modules_documentation_is_its_argument_spec(role: Path) -> None:
    for path in (role / "library").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        documented = yaml.safe_load(text.partition('DOCUMENTATION = """')[2].partition('"""')[0])
        assert documented["module"] == path.stem
        for task in tasks(role):
            if path.stem in task:
                assert set(task[path.stem]) == set(documented["options"])


@pytest.mark.parametrize(
    ("role_name", "task"),
    [
        ("preflight", provision.PREFLIGHT),
        ("describe", provision.DESCRIBE),
        ("assets", provision.RESCUED),
    ],
)
def test_tasks_whose_results_are_read_are_there(role_name: str, task: str) -> None:
    assert [item["name"] for item in tasks(TOP / "roles" / role_name)].count(task) == 1


def test_a_playbook_is_a_sentence(playbook: Path) -> None:
    assert len(playbook.read_text(encoding="utf-8").splitlines()) < 40
    for play in read(playbook):
        assert set(play) <= {"name", "hosts", "gather_facts", "strategy", "roles"}
        assert play["hosts"] == "sut"
        assert play["strategy"] in {"free", "host_pinned"}
        for entry in play["roles"]:
            assert (TOP / "roles" / entry["role"]).is_dir()


def test_plays_without_fleet_have_its_keepalives() -> None:
    config = configparser.ConfigParser()
    config.read(TOP / "playbooks" / "ansible.cfg")
    assert config["ssh_connection"]["ssh_args"] == plays.KEEPALIVE


def test_check_is_the_first_part_of_provision() -> None:
    def roles(name: str) -> list[str]:
        return [entry["role"] for play in read(content.playbook(name)) for entry in play["roles"]]

    assert roles("provision")[: len(roles("preflight"))] == roles("preflight")


def test_the_syntax_is_right(playbook: Path, tmp_path: Path) -> None:
    inventory = tmp_path / "hosts.yml"
    inventory.write_text("sut: {hosts: {h01: {fleet_work_dir: /w}}}\n", encoding="utf-8")
    program = Path(sys.executable).with_name("ansible-playbook")
    done = subprocess.run(
        [program, "-i", inventory, "--syntax-check", playbook],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, **plays.environment([], 1)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_what_fleet_passes_is_what_roles_know() -> None:
    known = content.role_variables()
    passed = re.findall(r'^        "([a-z_]+)":', Path(provision.__file__).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(passed) > 5
    assert set(passed) <= known
    assert "benchmark_run_queues" in known
