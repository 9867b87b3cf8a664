"""A disk that is full: on a host at each stage, and at the controller's place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lab import tmpfs
from tests.lab.faults.outing import COMPLETE, MISSING, SECOND, WORK

if TYPE_CHECKING:
    from tests.lab.faults.conftest import MakeOuting

pytestmark = pytest.mark.lab
FULL = "(?i)no space|disk full|disk is full|free space|free some space"


@pytest.mark.faults
def test_at_provision(outing: MakeOuting) -> None:
    out = outing()
    out.lab["h03"].sh(f"rm -rf {WORK}/venv {WORK}/venvs")
    out.start()
    out.until_process("h03", "pip install")
    out.inject(out.lab["h03"].fill_disk)
    assert out.end() == MISSING
    assert out.told("h03", FULL), out.text
    out.recover("disk full at provision", "h03", FULL, missing=["h03"])


@pytest.mark.faults
def test_at_run(outing: MakeOuting) -> None:
    # It is tried again once, by default after two minutes.
    out = outing(run={"retry": {"no-space": {"times": 1, "after_s": 5}}})
    out.start()
    out.until_running("h03")
    out.inject(out.lab["h03"].fill_disk)
    # What the failed start had written makes room for the next one, which may do.
    assert out.end() in {MISSING, COMPLETE}, out.text
    assert out.told("h03", FULL), out.text
    noticed = out.noticed("h03", FULL)
    assert noticed is not None
    assert noticed < 30
    out.recover("disk full at run", "h03", FULL, missing=["h03"])


@pytest.mark.faults
def test_at_collect(outing: MakeOuting) -> None:
    """Measured and not yet home, and no byte free: the files must come home all the same, or later."""
    out = outing()
    out.start()
    out.until_running("h03")
    out.kill_controller()
    for host in out.hosts:
        out.until_ended(host)
    out.inject(out.lab["h03"].fill_disk)
    out.start()
    assert out.end() == COMPLETE or out.told("h03", FULL), out.text
    out.recover("disk full at collect", "h03", FULL, missing=["h03"])
    assert out.lab["h03"].sh(f"ls -A {WORK}/tmp") == "", "nothing unfinished is left there"


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["provision", "run", "collect"])
def test_at_the_controllers_place(outing: MakeOuting, stage: str) -> None:
    out = outing()
    sessions = out.session.parent
    sessions.mkdir()
    out.lab.small_disk(sessions, 64)
    out.start()
    if stage == "provision":
        out.until_said("provision:")
    else:
        out.until_running("h02", SECOND)
    if stage == "collect":
        out.lab["h02"].slow(latency_ms=200, loss=0)
        out.until("files come home", lambda: any((out.session / "collect/.incoming").glob(f"*.{SECOND}*")))
    out.inject(lambda: tmpfs.fill(sessions))
    assert out.end() in {1, MISSING}, out.text
    assert out.told("", "No space left"), out.text
    out.check_readable()
    row = out.row(f"disk full on the controller, at {stage}", "", "No space left")
    tmpfs.resize(sessions, 64)
    assert out.again() == COMPLETE, out.text
    out.check_first()
    out.check_settled()
    out.keep(row)
