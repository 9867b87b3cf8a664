"""The wheel carries playbooks, roles, requirements and weights, and works from an empty folder, without torch."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return next(folder.glob("mlperf_fleet-*.whl"))


def test_it_holds_what_hosts_need(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "fleet", "playbooks", "roles", "requirements"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    wanted = {name if name.startswith("fleet/") else f"fleet/_content/{name}" for name in tracked}
    assert sorted(wanted - names) == []


@pytest.mark.slow
def test_it_works_from_an_empty_folder_without_torch(wheel: Path, tmp_path: Path) -> None:
    site, here, home = tmp_path / "site", tmp_path / "here", tmp_path / "home"
    here.mkdir()
    home.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    # A module that cannot be imported stands in the way of torch, which lies in the tests' environment.
    (site / "torch.py").write_text("raise ImportError('the controller must not need torch')\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(site), "HOME": str(home)}

    def fleet(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "fleet", *arguments],
            cwd=here, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    fleet("init", "--local")
    assert "1 of 1 hosts ready" in fleet("check")
    done = subprocess.run(
        [sys.executable, "-c", "from fleet import content; print(content.root())"],
        cwd=here, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(site / "fleet" / "_content")
