"""What becomes of an outing when a host itself is not well."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.conftest import WHEELHOUSE
from tests.lab.faults.outing import COMPLETE, MISSING, SECOND, WORK
from tests.lab.hosts import LabError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import MakeLab
    from tests.lab.faults.conftest import MakeOuting

pytestmark = pytest.mark.lab
DAY = 86400


@pytest.mark.faults
def test_a_host_that_hangs_for_twenty_seconds(outing: MakeOuting) -> None:
    out = outing()
    out.start()
    out.until_running("h02")
    out.inject(lambda: out.lab["h02"].hang(20))
    assert out.end() == COMPLETE, out.text
    out.recover("host frozen for 20 s", "h02", "no answer|lost")


@pytest.mark.faults
def test_a_host_that_hangs_for_good_holds_nobody(outing: MakeOuting) -> None:
    out = outing()
    out.start()
    out.until_running("h02")
    out.inject(out.lab["h02"].freeze)
    out.until("h01 and h03 home", lambda: all(_is_home(out, host) for host in ("h01", "h03")), timeout=20)
    assert out.end() == MISSING
    noticed = out.noticed("h02", "no answer|lost")
    assert noticed is not None, out.text
    assert noticed < 30
    out.recover("host frozen for good", "h02", "no answer|lost", missing=["h02"])


def _is_home(out: object, host: str) -> bool:
    try:
        units = out.read("collect", "collected.json")["units"]  # type: ignore[attr-defined]
    except (OSError, ValueError):
        return False
    return bool(units.get(f"{host}.{SECOND}", {}).get("complete"))


@pytest.mark.faults
def test_a_host_that_hangs_while_it_is_made_ready_holds_nobody(outing: MakeOuting) -> None:
    out = outing()
    out.lab["h02"].sh(f"rm -rf {WORK}/venv {WORK}/venvs")
    out.start()
    out.until_process("h02", "pip install")
    out.inject(out.lab["h02"].freeze)
    out.until("h01 and h03 running", lambda: all(out.state(f"{host}.{SECOND}") for host in ("h01", "h03")), timeout=20)
    assert out.end() == MISSING
    noticed = out.noticed("h02", "no answer|lost|unreachable")
    assert noticed is not None, out.text
    assert noticed < 30
    out.recover("host frozen for good, being provisioned", "h02", "no answer|lost|unreachable", missing=["h02"])


@pytest.mark.faults
def test_a_reboot_in_the_middle_of_a_unit(outing: MakeOuting) -> None:
    out = outing()
    out.start()
    out.until_running("h02")
    out.inject(out.lab["h02"].reboot)
    out.end()
    noticed = out.noticed("h02", "rebooted")
    assert noticed is not None, out.text
    assert noticed < 30
    out.recover("host rebooted mid-unit", "h02", "rebooted", missing=["h02"])


@pytest.mark.faults
def test_a_host_that_loses_its_power_for_good(outing: MakeOuting) -> None:
    out = outing()
    out.start()
    out.until_running("h02")
    out.inject(out.lab["h02"].power_off)
    assert out.end() == MISSING
    out.recover("host without power, mid-unit", "h02", "no answer|lost", missing=["h02"])


@pytest.mark.faults
@pytest.mark.parametrize("days", [1, -1])
def test_a_clock_that_is_off_by_a_day(outing: MakeOuting, days: int) -> None:
    out = outing()
    out.inject(lambda: out.lab["h02"].shift_clock(days * DAY))
    out.start()
    assert out.end() == COMPLETE, out.text
    out.recover(f"clock off by a day, {'ahead' if days > 0 else 'behind'}", "h02", "clock")


@pytest.mark.faults
@pytest.mark.parametrize("days", [1, -1])
def test_a_clock_that_is_set_by_a_day_in_the_middle_of_a_unit(outing: MakeOuting, days: int) -> None:
    out = outing()
    out.lab["h02"].shift_clock(0)
    out.start()
    out.until_running("h02")
    out.inject(lambda: out.lab["h02"].shift_clock(days * DAY))
    assert out.end() == COMPLETE, out.text
    out.recover(f"clock set {'forward' if days > 0 else 'back'} by a day mid-unit", "h02", "clock")


@pytest.mark.faults
def test_a_clock_that_is_set_back_and_a_supervisor_that_dies(outing: MakeOuting) -> None:
    """By its heartbeat such a unit looks alive for a day."""
    out = outing()
    out.lab["h02"].shift_clock(0)

    def both() -> None:
        out.lab["h02"].shift_clock(-DAY)
        out.lab["h02"].kill(" supervise ")
        # The kernel, or the guard, may have ended it by now.
        with suppress(LabError):
            out.lab["h02"].kill(f" run {WORK}")

    out.start()
    out.until_running("h02")
    out.inject(both)
    out.end(100)
    out.recover("clock set back, and supervisor and LoadGen killed", "h02", "supervisor|kill", missing=["h02"])


@pytest.mark.faults
def test_two_hosts_with_one_hostname(make_lab: MakeLab, outing: MakeOuting, wheelhouse: Path) -> None:
    lab = make_lab(2, hostname={"h01": "node", "h02": "node"}, mounts={wheelhouse: WHEELHOUSE})
    out = outing(("h01", "h02"), lab=lab)
    out.start()
    assert out.end() == COMPLETE, out.text
    systems = out.read("results", "results.json")["systems"]
    assert len({system["system_id"] for system in systems}) == 2
    out.recover("two hosts with the same hostname", "h02")


@pytest.mark.faults
def test_ten_thousand_stale_files_in_the_work_folder(outing: MakeOuting) -> None:
    out = outing()
    out.inject(lambda: out.lab["h02"].litter(WORK, 10_000))
    out.start()
    try:
        assert out.end() == COMPLETE, out.text
        out.recover("10,000 stale files in the work folder", "h02")
        assert not list(out.session.rglob("*stale*"))
        assert not list(out.session.rglob("*old-*"))
    finally:
        out.lab["h02"].sh(f"rm -rf {WORK}/tmp/old-* {WORK}/harness/stale* {WORK}/runs/old-*")
