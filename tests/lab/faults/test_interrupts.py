"""Ctrl-C at each stage: the command ends soon, says how to go on, and going on loses nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.lab.faults.outing import COMPLETE, SECOND, SESSION, WORK, Outing

if TYPE_CHECKING:
    from tests.lab.faults.conftest import MakeOuting

pytestmark = [pytest.mark.lab, pytest.mark.faults]
INTERRUPTED = 130
Undo = Callable[[], object]
SOON = 20.0


def at_inventory(out: Outing) -> None:
    out.lab["h02"].freeze()  # or it would be over at once
    out.start()
    out.until_said("inventory:")
    time.sleep(1)


def at_provision(out: Outing) -> None:
    out.lab["h02"].sh(f"rm -rf {WORK}/venv {WORK}/venvs")
    out.start()
    out.until_process("h02", "pip install")


def at_run(out: Outing) -> None:
    out.start()
    out.until_running("h02")


def at_collect(out: Outing) -> None:
    out.start()
    out.until_running("h02")
    out.lab["h02"].slow(latency_ms=200, loss=0.05)
    out.until("files come home", lambda: any((out.session / "collect/.incoming").glob(f"h02.{SECOND}*")))


def at_the_collect_stage(out: Outing) -> None:
    out.start()
    out.until_running("h02")
    out.kill_controller()
    for host in out.hosts:
        out.until_ended(host)
    out.lab["h02"].freeze()
    out.start("collect")
    out.until_said("collect:")
    time.sleep(1)


def reading(out: Outing, verb: str, *file: str) -> Undo:
    """The stage is over in a moment: it is made to wait for one of its files, as for a file server that hangs."""
    out.start()
    assert out.end() == COMPLETE, out.text
    path = out.session.joinpath(*file)
    kept = path.rename(path.with_name("kept"))
    os.mkfifo(path)
    out.start(verb)
    out.until_said(f"{verb}:")
    time.sleep(0.3)
    return lambda: kept.replace(path)


def at_results(out: Outing) -> Undo:
    return reading(out, "results", "run", "plan.json")


def at_submission(out: Outing) -> Undo:
    return reading(out, "submission", "results", "results.json")


def at_report(out: Outing) -> Undo:
    return reading(out, "report", "results", "results.json")


BEFORE = [at_inventory, at_provision, at_run, at_collect, at_the_collect_stage]
AFTER = [at_results, at_submission, at_report]


@pytest.mark.parametrize("stage", [*BEFORE, *AFTER])
def test_ctrl_c(outing: MakeOuting, stage: Callable[[Outing], Undo | None]) -> None:
    out = outing()
    undo = stage(out)
    out.inject(out.interrupt)
    begun = time.monotonic()
    assert out.end() == INTERRUPTED, out.text
    assert time.monotonic() - begun < SOON
    if undo is not None:
        undo()
    assert "next:" in out.text
    assert f"--session {SESSION}" in out.text
    out.check_readable()
    assert not list(out.session.rglob("*.partial"))
    row = out.row(f"Ctrl-C {stage.__name__.replace('_', ' ')}", "", "interrupted|next:")
    assert out.again() == COMPLETE, out.text
    out.check_first()
    out.check_settled()
    out.keep(row)
