"""A clock that is set while LoadGen measures by it: no number, and a reason to measure again."""

import json
import time
from pathlib import Path

import pytest

from fleet.harness.contract import Reason, Scenario
from fleet.harness.wall_clock import WallClock
from tests.unit.harness.units import measured, spec

SET = """
import threading, time
from fleet.harness import wall_clock
def set_it(real=time.time):
    time.sleep(0.5)
    wall_clock.time = type("Set", (), {
        "time": lambda: real() + STEP, "clock_gettime": time.clock_gettime, "CLOCK_BOOTTIME": time.CLOCK_BOOTTIME,
    })
threading.Thread(target=set_it, daemon=True).start()
"""


def test_a_clock_that_was_set_is_told_from_one_that_was_slewed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    clock = WallClock()
    assert clock.error() is None
    monkeypatch.setattr(time, "time", lambda: real() + 0.4)
    assert clock.error() is None
    monkeypatch.setattr(time, "time", lambda: real() - 86400)
    error = clock.error()
    assert error is not None
    assert (str(error), error.reason) == (
        "the clock was set by -86400 s while LoadGen measured by it", Reason.INTERRUPTED,
    )  # fmt: skip


@pytest.mark.parametrize("step", [86400, -86400])
def test_a_unit_under_which_the_clock_was_set_has_no_manifest(tmp_path: Path, step: int) -> None:
    text = "*.SingleStream.min_duration = 3000\n*.SingleStream.target_latency = 1\n"
    value = spec(scenario=Scenario.SINGLE_STREAM, user_conf=text, backend_options={"latency_ms": 1})
    code, folder = measured(tmp_path, value, more=f"STEP = {step}{SET}")
    assert code == 1
    told = json.loads((folder / "error.json").read_text(encoding="utf-8"))
    assert told == {
        "cause": f"UnitError: the clock was set by {step:+d} s while LoadGen measured by it", "reason": "interrupted",
    }  # fmt: skip
    assert not (folder / "manifest.json").exists()
