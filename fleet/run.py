"""Run the campaign: every host gets its units as soon as it is ready, a supervisor there works through them.

No host waits for another, and none is forgotten: each planned unit has a file in run/units/, from the first moment
on, and ends in a named state with a cause.
"""

import functools
import queue
from collections.abc import Callable, Mapping
from dataclasses import replace

from fleet import handoff, launch, planning, resume, threads
from fleet.campaign import Campaign
from fleet.handoff import Plan, Readiness, UnitRecord
from fleet.harness.contract import RunSpec
from fleet.inventory import files
from fleet.resume import Decision
from fleet.session import Session
from fleet.subset import EVERYTHING, Subset
from fleet.terms import HostState
from fleet.watch import Watch

Bringer = Callable[[Mapping[str, RunSpec]], launch.Bring]
"""Given what is planned now, by unit, it says how the files of an ended unit come home."""
Ready = queue.SimpleQueue[Readiness | None]
"""Hosts as they become ready; None at the end."""


def run(
    session: Session,
    campaign: Campaign,
    watch: Watch,
    *,
    quick: bool,
    bringer: Bringer,
    subset: Subset = EVERYTHING,
    ready: Ready | None = None,
) -> tuple[UnitRecord, ...]:
    """Run what is not done yet and return one record per planned unit.

    `bringer` is called once the plan is written. Hosts come from `ready`, or are all there as provision left them; of
    those, one that was away then is asked anew.
    """
    watch.stage("run", "LoadGen on every host that is ready")
    launcher = launch.Launcher(session=session, campaign=campaign, watch=watch, folder=session.run, token=session.token)
    feeder = _Feeder(launcher, quick=quick, subset=subset, fresh=ready is not None)
    feeder.begin()
    batches: launch.Batches = queue.SimpleQueue()
    threads.start(lambda: feeder.feed(ready or _all_of(session), batches), "feeder")
    launcher.launch(batches, lambda: bringer(feeder.planned))
    if feeder.error is not None:
        raise feeder.error
    now = handoff.records(session)
    return tuple(now[unit] for unit in feeder.planned)


def _all_of(session: Session) -> Ready:
    """The hosts that provision left, at once."""
    found: Ready = queue.SimpleQueue()
    for item in handoff.readiness(session):
        found.put(item)
    found.put(None)
    return found


def _at_hand(ready: Ready) -> list[Readiness | None]:
    """The next host, and those that need not be waited for; ends with None where there are no more."""
    found = [ready.get()]
    while found[-1] is not None:
        try:
            found.append(ready.get_nowait())
        except queue.Empty:
            break
    return found


class _Feeder:
    """Plans each host when it is known how it stands, and hands what is to be done there to the launcher."""

    def __init__(self, launcher: launch.Launcher, *, quick: bool, subset: Subset, fresh: bool) -> None:
        """`fresh` when it was seen just now how hosts stand."""
        self._launcher = launcher
        self._session, self._campaign = launcher.session, launcher.campaign
        self._quick = quick
        self._fresh = fresh
        self._subset = subset
        self._hosts = {host.name: host for host in files.hosts(self._session)}
        self._waiting = {name for name in self._hosts if not subset.left_out(name)}
        # Nobody else writes of a host's units before it is handed over.
        self._known = handoff.records(self._session)
        self._home = handoff.collected(self._session)
        self.planned: dict[str, RunSpec] = {}
        """What is planned now, by unit, in the order in which hosts have it."""
        self.error: BaseException | None = None
        """What ended the feeding before its time."""

    def begin(self) -> None:
        """Plan every unit, whether or not its host is there, and see that each has a record.

        What was planned earlier stays as it was until its host says how it stands now: a host that is away keeps it.
        """
        session = self._session
        earlier = handoff.plan(session) if handoff.planned(session) else Plan(quick=self._quick, units=())
        old = {spec.unit: spec for spec in earlier.units}
        planner = planning.Planner(session, self._campaign, quick=self._quick, ready={})
        decisions = []
        for host in self._hosts.values():
            for spec in planner.units(host):
                stays = spec.unit in old and earlier.quick == self._quick
                self.planned[spec.unit] = old[spec.unit] if stays else spec
                if not stays or spec.unit not in self._known:
                    decisions.append(self._decide(old.get(spec.unit), self.planned[spec.unit]))
        self._keep(decisions)

    def feed(self, ready: Ready, batches: launch.Batches) -> None:
        """Hand over every host that comes out of `ready`, and at its end close `batches`."""
        try:
            while not self._hand_over(_at_hand(ready), batches):
                pass
            for name in self._hosts:
                if cause := self._subset.left_out(name):
                    self._end(name, functools.partial(resume.left_out, cause=cause))
                elif name in self._waiting:
                    self._end(name, functools.partial(resume.not_started, ready=None))
        except BaseException as error:  # noqa: BLE001 - raised where the run is waited for
            self.error = error
        finally:
            batches.put(None)

    def _hand_over(self, items: list[Readiness | None], batches: launch.Batches) -> bool:
        """Plan and hand over some hosts, with one new plan for all of them; True at the end."""
        found = {item.host: item for item in items if item is not None and item.host in self._waiting}
        planner = planning.Planner(self._session, self._campaign, quick=self._quick, ready=found)
        wanted: dict[str, list[Decision]] = {}
        for name, item in found.items():
            self._waiting.discard(name)
            if item.state is HostState.READY:
                specs = planner.units(self._hosts[name])
                wanted[name] = [self._decide(self.planned[spec.unit], spec) for spec in specs]
            elif item.state is HostState.UNREACHABLE and item.work_dir and not self._fresh:
                # It was ready once, and away when it was last looked at: that may be over, and its units as planned then
                # may run there. Waiting for it is the poll's business.
                found[name] = replace(item, state=HostState.READY, cause="")
                specs = [spec for spec in self.planned.values() if spec.host == name]
                wanted[name] = [self._decide(spec, spec) for spec in specs]
            else:
                self._end(name, functools.partial(resume.not_started, ready=item))
                self._launcher.watch.host(name, item.cause or str(item.state), ended=True)
        self._keep([decision for decisions in wanted.values() for decision in decisions])
        for name, decisions in wanted.items():
            for line in resume.lines(decisions):
                self._launcher.watch.note(line)
            specs = [decision.spec for decision in decisions if self._can_start(decision, found[name])]
            if specs:
                batches.put(launch.Batch(readiness=found[name], specs=specs))
        return None in items

    def _decide(self, old: RunSpec | None, new: RunSpec) -> Decision:
        return resume.decide(old, new, self._known.get(new.unit), self._home.get(new.unit))

    def _note(self, record: UnitRecord) -> None:
        if record != self._known.get(record.unit):
            self._launcher.note(record)
            self._known[record.unit] = record

    def _end(self, host: str, change: Callable[[UnitRecord], UnitRecord]) -> None:
        """Change the records of a host that is given nothing to do."""
        for spec in self.planned.values():
            if spec.host == host:
                self._note(change(self._known.get(spec.unit) or handoff.pending(spec)))

    def _can_start(self, decision: Decision, item: Readiness) -> bool:
        """Whether the unit is to be started on its host; where it cannot run there, that is noted."""
        if decision.keep:
            return False
        cause = item.cannot.get(decision.spec.benchmark, "")
        if cause:
            self._note(resume.not_started(decision.record, item, cause))
        return not cause

    def _keep(self, decisions: list[Decision]) -> None:
        """Write records, then the plan: who dies in between must not leave a unit of the old plan for one of the new."""
        for decision in decisions:
            self.planned[decision.spec.unit] = decision.spec
            if not decision.keep:
                self._note(decision.record)
        units = tuple(self.planned.values())
        self._session.write(self._session.run / "plan.json", Plan(quick=self._quick, units=units))
