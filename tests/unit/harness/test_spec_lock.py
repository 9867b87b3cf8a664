"""A spec's lock against what is on the host: the first difference ends the unit before anything is measured."""

import importlib.metadata
import json
import platform
import sys
from pathlib import Path

import pytest

from fleet.harness import spec_lock
from fleet.harness.contract import Reason, Scenario
from fleet.harness.reasons import UnitError
from tests.unit.harness.units import measured, spec

NUMPY = importlib.metadata.version("numpy")
RIGHT = {"wheel:numpy": NUMPY, "python": platform.python_version(), "environment": Path(sys.prefix).resolve().name}


def test_a_lock_that_is_kept_says_nothing() -> None:
    spec_lock.verify({})
    spec_lock.verify(RIGHT)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("wheel:numpy", "0.1"),
        ("wheel:no-such-package", "1.0"),
        ("environment", "another"),
        ("fleet", "another"),
        ("python", "2.7"),
        ("driver", "1.2.3"),
        ("a-name-of-tomorrow", "x"),
    ],
)
def test_the_first_difference_is_named(name: str, wanted: str) -> None:
    with pytest.raises(UnitError, match=f"{name} is .* here, it was planned with {wanted}") as caught:
        spec_lock.verify({**RIGHT, name: wanted})
    assert caught.value.reason is Reason.LOCK_CHANGED


def test_the_type_of_an_instance_is_the_controllers_to_hold() -> None:
    spec_lock.verify({**RIGHT, "instance_type": "g5.xlarge"})


def test_the_harness_is_known_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0123abc").mkdir()
    (tmp_path / "current").symlink_to(tmp_path / "0123abc")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "current")])
    spec_lock.verify({"fleet": "0123abc"})


@pytest.mark.parametrize(
    ("lock", "code", "reason"),
    [
        ({"weights": "0" * 64, "wheel:numpy": NUMPY}, 0, None),
        ({"weights": "f" * 64}, 1, "lock-changed"),
        ({"wheel:numpy": "0.1"}, 1, "lock-changed"),
    ],
)
def test_a_unit_does_not_run_under_another_lock(
    tmp_path: Path, lock: dict[str, str], code: int, reason: str | None
) -> None:
    conf = (
        "*.SingleStream.min_duration = 50\n*.SingleStream.min_query_count = 10\n*.SingleStream.target_latency = 0.1\n"
    )
    ended, folder = measured(tmp_path, spec(scenario=Scenario.SINGLE_STREAM, user_conf=conf, lock=lock))
    assert ended == code
    assert (folder / "manifest.json").exists() is (code == 0)
    if reason:
        assert json.loads((folder / "error.json").read_text(encoding="utf-8"))["reason"] == reason
        assert not (folder / "mlperf_log_detail.txt").exists()
