"""From EC2's notice to the replacement: real supervisors on two hosts of one name, the controller's poll, and files home."""

import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from fleet import collect, handoff, poll, resume
from fleet.campaign import RetryPolicy
from fleet.handoff import HostRecord, Plan, UnitRecord
from fleet.harness import spot
from fleet.harness.contract import Market, Reason, RunSpec, UnitState
from fleet.inventory import reach
from fleet.inventory.hosts import Host
from fleet.polled import Polled
from fleet.session import Session
from fleet.terms import HostKind
from tests.unit.collecting import UNIT, spec_of
from tests.unit.fakes import RecordingWatch, scene
from tests.unit.harness import hosting
from tests.unit.harness.metadata import Metadata, serving
from tests.unit.harness.units import TOP

OTHER = UNIT.replace("performance", "accuracy")
NOTICE = "spot interruption notice, action terminate at 2026-11-25T05:02:00Z"
# The verbs of the control channel are the harness's own; units do what their user_conf says.
OWN = f"""
import sys
sys.path.insert(0, {str(TOP)!r})
if sys.argv[1] in {{"start", "pack", "send", "home"}}:
    from fleet.harness.__main__ import main
    sys.exit(main())
"""
FOREVER = "while True: time.sleep(0.05)"

pytestmark = pytest.mark.usefixtures("quick_polls")


class Run:
    """A session whose host is one instance after another."""

    def __init__(self, session: Session) -> None:
        self.session, self.watch = session, RecordingWatch()
        self.hosts: list[HostRecord] = []

    def go(self, work: Path, *specs: RunSpec, known: dict[str, UnitRecord] | None = None) -> dict[str, UnitRecord]:
        """Have an instance, whose folder is `work`, run the units, and watch it to its end."""
        made = self.session.run / "plan.json"
        self.session.write(made, Plan(quick=False, units=specs))
        host = Host(name="h01", kind=HostKind.EC2, connection="local", address="h01")
        item = Polled(host=host, work_dir=str(work), specs={spec.unit: spec for spec in specs}, to_start=[spec.unit for spec in specs])  # fmt: skip
        arrivals: queue.SimpleQueue[Polled | None] = queue.SimpleQueue()
        arrivals.put(item)
        arrivals.put(None)
        records = known or {spec.unit: handoff.pending(spec) for spec in specs}
        poll.Poll(
            known=records, note=lambda record: self.session.write(self.session.run / "units" / f"{record.unit}.json", record),
            note_host=self._note_host, bring=collect.Collector(self.session).bring, watch=self.watch,
            token=self.session.token, lost_after_s=20, policy=lambda reason: RetryPolicy(times=3 if reason is Reason.INTERRUPTED else 0, after_s=0), cancelled=set,
        ).run(arrivals, lambda found: found)  # fmt: skip
        return records

    def _note_host(self, record: HostRecord) -> None:
        self.hosts.append(record)
        self.session.write(self.session.run / "hosts" / f"{record.host}.json", record)


def instance(base: Path) -> Path:
    """A work folder with the harness of hosting.ENTRY."""
    work = base / "work"
    (work / "venv" / "bin").mkdir(parents=True)
    (work / "venv" / "bin" / "python").symlink_to(sys.executable)
    (work / "harness" / "current").mkdir(parents=True)
    # A lock's name has room for a short path only.
    entry = OWN + hosting.ENTRY.replace("+ sys.argv[0]", "+ sys.argv[0][-60:]")
    (work / "harness" / "current" / "__main__.py").write_text(entry, encoding="utf-8")
    return work


@pytest.fixture
def metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    with serving() as state:
        monkeypatch.setenv(spot.ENDPOINT_VARIABLE, state.url)
        yield state
    # Of a test that fails nothing is left.
    for work in tmp_path.glob("*/work"):
        for pid in hosting.pids(work):
            if hosting.ours(pid, tmp_path):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_a_notice_ends_its_units_and_another_instance_runs_them(
    tmp_path: Path, metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "connect", lambda _: reach.LocalConnection())
    work = instance(tmp_path / "first")
    run = Run(scene(tmp_path).session)
    note = "Path(folder, 'log').write_text('half'); " + f"Path({str(tmp_path)!r}, 'began').touch()\n"
    first = [
        replace(spec_of(unit), work_dir=str(work), user_conf=note + FOREVER, instance="i-0old", market=Market.SPOT)
        for unit in (UNIT, OTHER)
    ]

    def taken_back() -> None:
        hosting.wait((tmp_path / "began").exists)
        metadata.interrupt()

    threading.Thread(target=taken_back).start()
    found = run.go(work, *first)
    for record in found.values():
        assert (record.state, record.reason, record.cause) == (UnitState.INTERRUPTED, Reason.INTERRUPTED, NOTICE)
        assert record.attempts == ()
    assert hosting.lines(work) == [f"+{UNIT}"]
    hosting.wait(hosting.idle(work))
    # What there is of them is home, and is no result.
    assert (run.session.collect / "h01" / UNIT / "log").read_text(encoding="utf-8") == "half"
    home = handoff.collected(run.session)
    assert [(item.complete, item.cause) for item in home.values()] == [(False, NOTICE)] * 2
    assert handoff.interrupted_hosts(run.session) == {"h01": NOTICE}
    assert run.watch.notes == [f"h01: {NOTICE}; nothing more is started there"]

    # Another instance under the same name: on demand, for want of spot.
    del metadata.answers["spot/instance-action"]
    work = instance(tmp_path / "second")
    new = [replace(spec, work_dir=str(work), instance="i-0new", market=Market.ON_DEMAND) for spec in first]
    decided = [resume.decide(old, spec, found[old.unit], home[old.unit]) for old, spec in zip(first, new, strict=True)]
    assert [decision.keep for decision in decided] == [False, False]
    shorter = [replace(decision.spec, user_conf="") for decision in decided]
    after = run.go(work, *shorter, known={decision.spec.unit: decision.record for decision in decided})
    assert {record.state for record in after.values()} == {UnitState.DONE}
    assert [len(after[unit].attempts) for unit in (UNIT, OTHER)] == [1, 0]
    assert after[UNIT].attempts[0].cause == f"instance i-0old is gone: interrupted: {NOTICE}"
    assert handoff.interrupted_hosts(run.session) == {}
    # Only the first one was asked: the market of the second says that nobody takes it back.
    asked = len(metadata.asked)
    hosting.wait(hosting.idle(work))
    assert len(metadata.asked) == asked
