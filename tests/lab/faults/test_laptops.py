"""A laptop that loses its power supply or gets too hot: a warning unless the campaign says more, and it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lab import simulated
from tests.lab.faults.outing import COMPLETE

if TYPE_CHECKING:
    from tests.lab.faults.conftest import MakeOuting

pytestmark = [pytest.mark.lab, pytest.mark.faults]


def test_on_battery_from_the_start(outing: MakeOuting) -> None:
    out = outing(kind="laptop")
    out.inject(lambda: out.lab["h02"].show(simulated.battery(discharging=True)))
    out.start()
    assert out.end() == COMPLETE, out.text
    assert out.told("h02", "ready; .*battery"), out.text
    assert "battery" in (out.session / "report" / "index.html").read_text(encoding="utf-8")
    out.recover("on battery from the start", "h02", "battery")


def test_on_battery_from_the_middle_of_a_unit(outing: MakeOuting) -> None:
    out = outing(kind="laptop", run={"quick_seconds": 12})
    out.lab["h02"].show(simulated.battery(discharging=False))
    out.start()
    out.until_running("h02")
    out.inject(lambda: out.lab["h02"].show(simulated.battery(discharging=True)))
    assert out.end() == COMPLETE, out.text
    assert out.told("h02", "Offline.performance: on battery"), out.text
    out.recover("on battery from the middle of a unit on", "h02", "battery")


def test_throttled_in_the_middle_of_a_unit(outing: MakeOuting) -> None:
    out = outing(kind="laptop", run={"quick_seconds": 12})
    out.lab["h02"].show(simulated.heat(celsius=60))
    out.start()
    out.until_running("h02")
    out.inject(lambda: out.lab["h02"].show(simulated.heat(celsius=99, throttled=500)))
    assert out.end() == COMPLETE, out.text
    assert out.told("h02", "Offline.performance: throttled by heat"), out.text
    out.recover("thermally throttled in the middle of a unit", "h02", "throttl")
