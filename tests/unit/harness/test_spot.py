"""An instance that EC2 takes back: the metadata service asked over real HTTP, and what a supervisor makes of its notice."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet import answers
from fleet.harness import spot, unit_queue
from fleet.harness.contract import Market, Reason, UnitState
from tests.unit.harness.hosting import CHILD, WAIT_FOR_GO, ended, idle, lines, running, status, unit, wait
from tests.unit.harness.metadata import Metadata, serving
from tests.unit.harness.units import queue

NOTICE = "spot interruption notice, action terminate at 2026-11-25T05:02:00Z"


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    """The instance's own, at the address that AWS's tools would ask too."""
    with serving() as state:
        monkeypatch.setenv(spot.ENDPOINT_VARIABLE, state.url)
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        monkeypatch.setattr(spot, "ASK_SECONDS", 0.02)
        yield state


@pytest.fixture
def watcher(metadata: Metadata) -> Iterator[spot.Watcher]:
    del metadata
    made = spot.Watcher()
    yield made
    made.stop()


def test_nothing_is_noticed_until_there_is_a_notice(metadata: Metadata, watcher: spot.Watcher) -> None:
    metadata.answers["events/recommendations/rebalance"] = '{"noticeTime": "2026-11-25T05:00:00Z"}'
    watcher.want(Market.SPOT)
    wait(lambda: len(metadata.asked) > 5)
    assert watcher.notice == ""
    metadata.interrupt()
    wait(lambda: watcher.notice != "")
    assert watcher.notice == NOTICE
    # One token serves them all, and nothing else is asked for.
    assert metadata.asked.count("PUT /latest/api/token") == 1
    assert set(metadata.asked) == {"PUT /latest/api/token", "GET /latest/meta-data/spot/instance-action"}


def test_a_token_that_has_run_out_is_renewed(metadata: Metadata, watcher: spot.Watcher) -> None:
    watcher.want(Market.SPOT)
    wait(lambda: len(metadata.asked) > 2)
    metadata.tokens.clear()
    wait(lambda: metadata.asked.count("PUT /latest/api/token") == 2)
    metadata.interrupt("stop")
    wait(lambda: "action stop" in watcher.notice)


@pytest.mark.parametrize("words", ["", "<html>", "[]", "null", "1e999", '{"action"'])
def test_trouble_of_the_service_is_no_notice_and_does_not_end_the_asking(
    metadata: Metadata, watcher: spot.Watcher, words: str
) -> None:
    metadata.broken = 3
    metadata.answers["spot/instance-action"] = words
    watcher.want(Market.SPOT)
    wait(lambda: len(metadata.asked) > 8)
    assert watcher.notice == ""
    metadata.interrupt()
    wait(lambda: watcher.notice == NOTICE)


@pytest.mark.parametrize("market", [Market.NONE, Market.ON_DEMAND])
def test_machines_that_nobody_takes_back_are_not_asked(
    metadata: Metadata, watcher: spot.Watcher, market: Market
) -> None:
    metadata.interrupt()
    watcher.want(market)
    assert watcher._thread is None
    assert metadata.asked == []


@pytest.mark.parametrize(("cycle", "noticed"), [("spot", NOTICE), ("on-demand", "")])
def test_an_instance_of_somebody_else_says_itself_what_it_is(
    metadata: Metadata, watcher: spot.Watcher, cycle: str, noticed: str
) -> None:
    metadata.answers["instance-life-cycle"] = cycle
    metadata.interrupt()
    watcher.want(Market.UNKNOWN)
    assert watcher._thread is not None
    watcher._thread.join(10)
    assert watcher.notice == noticed


def test_where_there_is_no_service_units_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(spot.ENDPOINT_VARIABLE, "http://127.0.0.1:1")
    monkeypatch.setattr(spot, "ASK_SECONDS", 0.01)
    watcher = spot.Watcher()
    watcher.want(Market.SPOT)
    time.sleep(0.1)
    assert watcher.notice == ""
    assert watcher._thread is not None
    assert watcher._thread.is_alive()
    watcher.stop()


def test_the_running_unit_ends_and_the_queued_ones_do_not_start(work: Path, metadata: Metadata) -> None:
    names = ("one", "two", "three")
    specs = [unit(work, name, CHILD + "time.sleep(60)", market=Market.SPOT) for name in names]
    unit_queue.start(work, queue(*specs))
    wait(running(work, "one"))
    before = time.monotonic()
    metadata.interrupt()
    wait(ended(work, *names))
    assert time.monotonic() - before < 60
    wait(idle(work))
    assert lines(work) == ["+one"]
    for name in names:
        found = status(work, name)
        assert (found.state, found.reason, found.cause) == (UnitState.INTERRUPTED, Reason.INTERRUPTED, NOTICE)
        assert not (work / "runs" / "s" / name / "manifest.json").exists()
    beat = json.loads((work / "runs" / "s" / "supervisor.json").read_text(encoding="utf-8"))
    assert beat["leaving"] == NOTICE
    # The controller hears of it in the same answer in which a unit has ended.
    shell = answers.question(str(work / "runs" / "s"), names)
    word = answers.parse(subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout)
    assert word.leaving == NOTICE
    assert word.statuses["two"].state is UnitState.INTERRUPTED


def test_what_is_handed_to_a_host_that_leaves_does_not_start_either(work: Path, metadata: Metadata) -> None:
    metadata.interrupt()
    unit_queue.start(work, queue(*(unit(work, name, WAIT_FOR_GO, market=Market.SPOT) for name in ("one", "two"))))
    wait(ended(work, "one", "two"))
    assert "+two" not in ((work / "order").read_text(encoding="ascii") if (work / "order").exists() else "")
    assert {status(work, name).cause for name in ("one", "two")} == {NOTICE}
    # Handed over once more, say by a controller that has not heard of it: the same again.
    unit_queue.start(work, queue(unit(work, "two", WAIT_FOR_GO, market=Market.SPOT)))
    wait(ended(work, "two"))
    assert status(work, "two").cause == NOTICE


def test_a_unit_that_has_measured_to_its_end_is_done(work: Path, metadata: Metadata) -> None:
    does = "write_json(folder / 'manifest.json', {})\n" + WAIT_FOR_GO
    unit_queue.start(work, queue(unit(work, "one", does, market=Market.SPOT)))
    wait(running(work, "one"))
    wait((work / "runs" / "s" / "one" / "manifest.json").exists)
    metadata.interrupt()
    wait(ended(work, "one"))
    assert status(work, "one").state is UnitState.DONE


def test_on_demand_units_run_on_whatever_the_service_says(work: Path, metadata: Metadata) -> None:
    metadata.interrupt()
    unit_queue.start(work, queue(unit(work, "one", "time.sleep(0.3)", market=Market.ON_DEMAND)))
    wait(ended(work, "one"))
    assert status(work, "one").state is UnitState.DONE
    assert metadata.asked == []
