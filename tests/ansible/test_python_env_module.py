"""What the module that installs packages says of a failure."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "roles" / "python_env" / "library" / "fleet_python_env.py"


@pytest.fixture(scope="module")
def module() -> ModuleType:
    found = importlib.util.spec_from_file_location("fleet_python_env", FILE)
    assert found is not None
    assert found.loader is not None
    loaded = importlib.util.module_from_spec(found)
    found.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("ERROR: no matching distribution\nmore", "ERROR: no matching distribution"),
        (
            "OSError: [Errno 28] No space left on device\nERROR: rolled back",
            "OSError: [Errno 28] No space left on device",
        ),
        ("ERROR: Exception:\nTraceback\n  File\nBadZipFile: cut off", "BadZipFile: cut off"),
        ("", "exit 3"),
    ],
)
def test_the_line_that_says_why_is_the_cause(module: Any, printed: str, said: str) -> None:
    code = f"import sys; sys.stderr.write({printed!r}); sys.exit(3)"
    with pytest.raises(module.InstallError) as failed:
        module.command([sys.executable, "-c", code], {})
    assert str(failed.value) == said


def test_a_full_disk_is_said_whatever_pip_stumbled_over(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert module.in_want_of_space("it failed", tmp_path) == "it failed"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 20))
    full = module.in_want_of_space("it failed", tmp_path)
    assert full == f"No space left on device: 3 MiB free in {tmp_path}; it failed"
    assert module.in_want_of_space("No space left", tmp_path) == "No space left"
