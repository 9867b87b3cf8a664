"""A poll over connections that are not there: what tests of the loop have in common."""

import queue
from collections.abc import Callable
from dataclasses import replace

import pytest

from fleet import poll
from fleet.campaign import RetryPolicy
from fleet.handoff import HostRecord, UnitRecord
from fleet.harness.contract import Reason, UnitState
from fleet.inventory import reach
from fleet.inventory.hosts import Host
from fleet.polled import Polled
from fleet.terms import HostKind
from tests.unit.collecting import spec_of
from tests.unit.fakes import FakeConnection, RecordingWatch

Asked = Callable[..., dict[str, UnitRecord]]


def host_of(name: str, *units: str) -> Polled:
    """A host that has not taken its units yet: HOST.UNIT each."""
    specs = {f"{name}.{unit}": replace(spec_of(f"{name}.{unit}"), host=name) for unit in units}
    host = Host(name=name, kind=HostKind.SERVER, connection="ssh", address=name)
    return Polled(host=host, work_dir="/w o", specs=specs, to_start=list(specs))


def asker(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Polls the hosts behind the connections given, each with the unit HOST.u unless `units` says otherwise."""

    def ask(
        *, units: tuple[str, ...] = ("u",), watch: RecordingWatch | None = None, noted: list[UnitRecord] | None = None,
        bring: poll.Bring = lambda *_: None, hosts: list[HostRecord] | None = None,
        retry: dict[Reason, RetryPolicy] | None = None, cancelled: Callable[[], set[str]] = set, lost_after_s: float = 0.3,
        arrivals: "queue.SimpleQueue[Polled | None] | None" = None, **connections: FakeConnection,
    ) -> dict[str, UnitRecord]:  # fmt: skip
        def opened(host: Host) -> reach.Connection:
            return connections[host.name]

        monkeypatch.setattr(reach, "connect", opened)
        items = [host_of(name, *units) for name in connections]
        if arrivals is None:
            arrivals = queue.SimpleQueue()
            for item in [*items, None]:
                arrivals.put(item)
        known = {
            unit: UnitRecord(unit=unit, host=item.host.name, state=UnitState.PENDING)
            for item in items
            for unit in item.specs
        }
        notes = [] if noted is None else noted
        poll.Poll(
            known=known, note=notes.append, note_host=([] if hosts is None else hosts).append, bring=bring,
            watch=watch or RecordingWatch(), token="t1", lost_after_s=lost_after_s,
            policy=lambda reason: (retry or {}).get(reason, RetryPolicy(times=0, after_s=0)), cancelled=cancelled,
        ).run(arrivals, lambda item: item)  # fmt: skip
        assert all(record.state.ended for record in known.values())
        assert {item.unit: item.state for item in notes} == {unit: record.state for unit, record in known.items()}
        return known

    return ask
