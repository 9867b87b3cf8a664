"""The module fleet_preflight: what it answers of GPUs, drivers and packages. nvidia-smi and Python are scripts here."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODULE = Path(__file__).parents[2] / "roles" / "preflight" / "library" / "fleet_preflight.py"
NEED = {
    "disk_gib": 0.0, "memory_gib": 0.1, "model_gib": 0.1, "gpu_memory_gib": 7.4, "device": "gpu",
    "driver": 580, "module": "tensorrt",
}  # fmt: skip


@pytest.fixture(scope="module")
def preflight() -> Any:
    spec = importlib.util.spec_from_file_location("fleet_preflight", MODULE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


def environment(work: Path, python: str) -> None:
    """An environment named `wanted` whose Python is a script."""
    script(work / "venvs" / "wanted" / "bin" / "python", python)
    (work / "venvs" / "wanted" / "pyvenv.cfg").write_text(f"version = {platform.python_version()}\n", encoding="utf-8")
    (work / "venv").symlink_to(work / "venvs" / "wanted")


def answer(work: Path, *, smi: str, digest: str = "wanted") -> dict[str, Any]:
    """What the module says of NEED, run as the control channel runs it, with an nvidia-smi that runs `smi`."""
    script(work / "bin" / "nvidia-smi", smi)
    arguments = {
        "work_dir": str(work), "needs": {"bert-99": NEED}, "spare_gib": 0.0, "python_env_digest": digest,
        "on_battery": "ignore", "harness_digest": "",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, MODULE, json.dumps(arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, "PATH": f"{work / 'bin'}:{os.environ['PATH']}"},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


H200 = "echo 'NVIDIA H200, 143771, 580.159.04'"


def test_a_host_without_a_gpu_cannot_and_why(tmp_path: Path) -> None:
    said = answer(tmp_path, smi="echo 'NVIDIA-SMI has failed'; exit 9")
    assert said["fleet_not_ready"]
    assert said["cannot"] == {"bert-99": "no NVIDIA GPU answers here (nvidia-smi), and its backend needs one"}


def test_a_driver_that_is_too_old_is_named_with_the_oldest_that_will_do(tmp_path: Path) -> None:
    said = answer(tmp_path, smi="echo 'NVIDIA A10G, 23028, 535.54.03'")
    assert said["cannot"] == {
        "bert-99": "the NVIDIA driver is 535.54.03, its backend needs 580 or newer: update the driver"
    }


def test_a_gpu_with_too_little_memory_is_named(tmp_path: Path) -> None:
    said = answer(tmp_path, smi="echo 'NVIDIA T400, 4096, 580.95.05'")
    assert said["cannot"] == {"bert-99": "NVIDIA T400 has 4.0 GiB, 7.4 GiB needed"}


def test_a_package_that_does_not_load_is_named_before_anything_runs(tmp_path: Path) -> None:
    environment(tmp_path, 'echo "Traceback" >&2; echo "ImportError: libnvinfer.so.11: no such file" >&2; exit 1')
    said = answer(tmp_path, smi=H200)
    assert said["cannot"] == {
        "bert-99": "its package tensorrt does not load here: ImportError: libnvinfer.so.11: no such file"
    }


def test_a_host_that_has_it_all_can(tmp_path: Path) -> None:
    environment(tmp_path, 'test "$2" = "import tensorrt"')
    said = answer(tmp_path, smi=H200)
    assert said["cannot"] == {}
    assert said["gpus"] == [{"name": "NVIDIA H200", "memory_bytes": 143771 * 2**20, "driver": "580.159.04"}]


def test_a_package_is_not_asked_for_where_its_environment_is_still_to_come(tmp_path: Path) -> None:
    environment(tmp_path, "exit 1")
    assert answer(tmp_path, smi=H200, digest="newer")["cannot"] == {}


@pytest.mark.parametrize("driver", ["580.159.04", "581.0", "[N/A]", ""])
def test_a_driver_that_will_do_or_says_nothing_is_let_pass(preflight: Any, driver: str) -> None:
    assert preflight.too_old(driver, 580) == ""
