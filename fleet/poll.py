"""Start hosts' units and ask how they stand until each has ended: over open connections, each host at its own pace.

One thread decides and keeps all records; whatever may hang, a connection, a question, a transfer, is in a thread of its
own that nobody waits for. So a silent host costs the others nothing, however many there are.
"""

import json
import math
import queue
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import TypeAdapter

from fleet import answers, polled, retries, threads
from fleet.campaign import RetryPolicy
from fleet.handoff import Attempt, Collected, HostRecord, UnitRecord
from fleet.harness.contract import Reason, RunSpec, UnitState
from fleet.inventory import reach
from fleet.polled import MINUTE, Polled
from fleet.terms import HostState
from fleet.watch import Watch, duration

USUAL_S, SETTLED_S, SETTLED_USUAL_S = 1.0, 60.0, 5.0
"""A host is asked about once a second, and less often once its unit has run for a while: a question costs it CPU."""
HOSTS_A_SECOND = 10
"""Questions asked a second, at the most; each costs about 3 ms of CPU here."""
ASK_S, START_S = 10.0, 60.0
"""Seconds that a question may take, and starting or cancelling units, which may have to end one that runs first."""
CONFIRM_S = 5.0
"""For so long a dead supervisor must look dead."""
FETCHES = 3
"""How often a transfer that broke off is gone on with, before it is left to `fleet collect`."""
ROUND_S = 1.0
"""The loop looks around at least so often, whether or not a host has said something."""
HOST_KEY = {HostState.CHANGED_KEY, HostState.UNKNOWN_KEY}

Bring = Callable[[reach.Connection, str, UnitRecord], Collected | None]
"""What is done about an ended unit while the connection to its host is open: connection, work folder, record."""
A = TypeVar("A")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Visit:
    """What came of one visit to a host."""

    started: list[str]
    refused: dict[str, str]
    """Those of them that the host did not take, and why."""
    text: str
    """Its answer to the question."""


@dataclass(kw_only=True)
class Poll:
    """The loop. Everything but the connections happens in the thread that calls `run`."""

    known: dict[str, UnitRecord]
    """Kept up to date."""
    note: Callable[[UnitRecord], None]
    """Told every change of state."""
    note_host: Callable[[HostRecord], None]
    bring: Bring
    """Given each ended unit with the open connection, in a thread of its own, one unit of a host at a time."""
    watch: Watch
    token: str
    lost_after_s: float
    policy: Callable[[Reason], RetryPolicy]
    cancelled: Callable[[], set[str]]
    """Hosts and units that somebody has cancelled meanwhile."""

    def __post_init__(self) -> None:
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._hosts: list[Polled] = []
        self._open = True
        self._next_login = 0.0
        self._tally = retries.Tally(self.policy)

    def run(self, arrivals: "queue.SimpleQueue[A | None]", accept: Callable[[A], Polled | None]) -> None:
        """Take hosts from `arrivals` as they come, until None does, and watch them until all is said and done."""
        threads.start(lambda: self._receive(arrivals, accept), "arrivals")
        try:
            while self._open or any(not item.over for item in self._hosts):
                self._round()
                now = time.monotonic()
                dues = [item.due for item in self._hosts if not (item.over or item.asking)]
                try:
                    self._events.get(timeout=max(0.001, min([ROUND_S, *(due - now for due in dues)])))()
                except queue.Empty:
                    continue
        finally:
            for _ in threads.each(_close, self._hosts):
                pass

    def _receive(self, arrivals: "queue.SimpleQueue[A | None]", accept: Callable[[A], Polled | None]) -> None:
        while (arrival := arrivals.get()) is not None:
            self._events.put(lambda arrival=arrival: self._accept(accept(arrival)))  # type: ignore[misc]
        self._events.put(self._close_doors)

    def _accept(self, item: Polled | None) -> None:
        if item is not None:
            # Logins cost both sides the most: hundreds at once would time out for want of this machine's cores.
            self._next_login = max(time.monotonic(), self._next_login + 1 / HOSTS_A_SECOND)
            item.due = self._next_login
            item.last_answer = item.due
            self._hosts.append(item)

    def _close_doors(self) -> None:
        self._open = False

    def _aside(self, work: Callable[[], A], then: Callable[[A | reach.Unreachable], None]) -> None:
        """Do `work` in a thread of its own, and `then`, with what came of it, in this one."""

        def go() -> None:
            try:
                result: A | reach.Unreachable = work()
            except reach.Unreachable as error:
                result = error
            except BaseException as error:  # noqa: BLE001 - raised below, where somebody sees it
                self._events.put(lambda error=error: _raise(error))  # type: ignore[misc]
                return
            self._events.put(lambda: then(result))

        threads.start(go)

    def _round(self) -> None:
        """Everything that has become due, for every host."""
        now = time.monotonic()
        names = self.cancelled()
        # As long as others work, or may still come, a lost host is asked; then it gets its policy's time and no more.
        busy = self._open or any(not item.over and item.lost is None for item in self._hosts)
        for item in self._hosts:
            if item.over:
                continue
            self._cancel(item, names)
            for unit in [unit for unit, due in item.again.items() if due <= now]:
                del item.again[unit]
                item.to_start.append(unit)
                item.due = now
            self._send_for(item)
            self._look_for_silence(item, now, alone=not busy)
            if not item.over and self._finished(item):
                self._end(item)
            if not item.over and not item.asking and item.due <= now:
                self._visit(item)

    def _finished(self, item: Polled) -> bool:
        open_ends = item.to_start or item.again or item.to_bring or item.bringing or item.lost is not None
        return not open_ends and all(self.known[unit].state.ended for unit in item.specs)

    def _end(self, item: Polled) -> None:
        item.over = True
        for unit in item.specs:
            # Of one whose host was lost nobody knows yet what will stand.
            if self.known[unit].best is not None and self.known[unit].state is not UnitState.UNREACHABLE:
                self._settle(self.known[unit], Reason.NONE)
        self.watch.host(item.host.name, polled.summary(item, self.known), ended=True)
        _close(item)

    def _keep(self, record: UnitRecord) -> None:
        known = self.known[record.unit]
        self.known[record.unit] = record
        if (known.state, known.attempts) != (record.state, record.attempts):
            self.note(record)

    # ── asking ──

    def _visit(self, item: Polled) -> None:
        starting, cancelling, supervisor = list(item.to_start), list(item.cancelling), item.supervisor
        specs = [item.specs[unit] for unit in starting]
        asked = [
            unit
            for unit in item.specs
            if unit not in item.again and (unit in starting or not _is_settled(self.known[unit]))
        ]
        item.asking = True
        if starting:
            minutes = sum(spec.expected_s for spec in specs) / MINUTE
            self.watch.host(
                item.host.name,
                f"starting {len(specs)} {'unit' if len(specs) == 1 else 'units'}, about {duration(minutes)}",
            )

        def work() -> _Visit:
            try:
                if item.connection is None:
                    item.connection = reach.connect(item.host)
                connection = item.connection
                if cancelling:
                    connection.run(self._harness(item, "cancel", self.token, *cancelling), timeout=START_S)
                refused = self._start(connection, item, specs) if specs else {}
                folder = f"{item.work_dir}/runs/{self.token}"
                text = connection.run(answers.question(folder, asked, supervisor), timeout=ASK_S).out
            except reach.Unreachable:
                _close(item)
                raise
            return _Visit(started=starting, refused=refused, text=text)

        def then(visit: _Visit | reach.Unreachable) -> None:
            item.asking = False
            item.due = time.monotonic() + self._interval(item)
            if item.over:
                _close(item)
            elif isinstance(visit, reach.Unreachable):
                self._unanswered(item, visit)
            else:
                item.cancelling = [unit for unit in item.cancelling if unit not in cancelling]
                self._take_visit(item, visit)
            polled.tell(item, self.known, self.watch)

        self._aside(work, then)

    def _harness(self, item: Polled, verb: str, *arguments: str) -> str:
        python, harness = f"{item.work_dir}/venv/bin/python", f"{item.work_dir}/harness/current"
        return shlex.join([python, harness, verb, item.work_dir, *arguments])

    def _start(self, connection: reach.Connection, item: Polled, specs: list[RunSpec]) -> dict[str, str]:
        """Hand the host its units, those it has already among them; which of them it did not take, and why."""
        data = TypeAdapter(Any).dump_python({"session": self.token, "specs": specs}, mode="json")
        answer = connection.run(self._harness(item, "start"), timeout=START_S, stdin=json.dumps(data).encode())
        if answer.rc == 0:
            return answers.refused(answer.out)
        lines = (answer.err or answer.out).strip().splitlines()
        cause = answers.one_line(lines[-1] if lines else f"starting its units ended with {answer.rc}")
        return {spec.unit: cause for spec in specs}

    def _interval(self, item: Polled) -> float:
        """Seconds until a host is asked again."""
        if item.leaving:
            # Its files have two minutes to come home.
            return USUAL_S
        if item.lost is not None:
            return max(USUAL_S, self.policy(Reason.UNREACHABLE).after_s)
        usual = max(USUAL_S, sum(not other.over and other.lost is None for other in self._hosts) / HOSTS_A_SECOND)
        running = [s for unit in item.specs if (s := self.known[unit].status) and s.state is UnitState.RUNNING]
        settled = running and all(polled.age(status) > SETTLED_S for status in running)
        return max(usual, SETTLED_USUAL_S) if settled and not item.stale else usual

    # ── what hosts say ──

    def _take_visit(self, item: Polled, visit: _Visit) -> None:
        word = answers.parse(visit.text)
        if not word.uptime:
            self._unanswered(item, reach.Unreachable(HostState.UNREACHABLE, "its answer cannot be read"))
            return
        item.last_answer, item.answered_at, item.cause, item.lost = time.monotonic(), time.time(), "", None
        self._say(item, HostState.READY)
        item.to_start = [unit for unit in item.to_start if unit not in visit.started]
        for unit in visit.started:
            if unit in visit.refused:
                cause = visit.refused[unit]
                reason = Reason.NO_SPACE if "No space left" in cause else Reason.OTHER
                self._ended(item, replace(self.known[unit], state=UnitState.FAILED, cause=cause, reason=reason))
        item.supervisor = word.beat.pid if word.beat is not None else 0
        if word.leaving and not item.leaving:
            self._leave(item, word.leaving)
        for unit in item.specs:
            record = self.known[unit]
            if unit in item.to_start or unit in item.again:
                # A host that was lost is back: its units are not.
                if record.state is UnitState.UNREACHABLE:
                    self._keep(replace(record, state=UnitState.PENDING, cause="", reason=Reason.NONE))
                continue
            if _is_settled(record):
                continue
            updated = self._confirmed(item, record, answers.update(record, word))
            polled.tell_conditions(item, record, updated, self.watch)
            if updated.state.ended:
                self._ended(item, updated)
            else:
                self._keep(updated)

    def _leave(self, item: Polled, notice: str) -> None:
        """The host is about to go away: what was not started there is not, nor again what ends there."""
        item.leaving, item.said = notice, None
        self._say(item, HostState.READY)
        self.watch.note(f"{item.host.name}: {notice}; nothing more is started there")
        waiting, item.to_start, item.again = [*item.to_start, *item.again], [], {}
        for unit in waiting:
            self._keep(replace(self.known[unit], state=UnitState.INTERRUPTED, cause=notice, reason=Reason.INTERRUPTED))
            self._decide(item, unit, Reason.INTERRUPTED, notice)

    def _confirmed(self, item: Polled, record: UnitRecord, updated: UnitRecord) -> UnitRecord:
        """A supervisor that looks dead may have been asleep, or be just starting; it must still look so a while later."""
        status = updated.status
        if updated.reason is not Reason.SUPERVISOR_DIED or status is None or status.state.ended:
            item.stale.pop(record.unit, None)
            return updated
        since = item.stale.setdefault(record.unit, time.monotonic())
        if time.monotonic() - since < CONFIRM_S:
            return replace(record, state=status.state, cause="", reason=Reason.NONE, status=status)
        return updated

    def _unanswered(self, item: Polled, error: reach.Unreachable) -> None:
        item.cause = error.cause
        if error.state in HOST_KEY:
            # Whoever answers there now is not the host that was asked before: nothing more is said to it.
            self._lose(item, error.state, f"{error.cause}: {error.hint}", Reason.HOST_KEY, error.hint)
            self._end(item)
        elif item.lost is None:
            self._say(item, HostState.READY, f"no answer: {error.cause}", error.hint)

    def _look_for_silence(self, item: Polled, now: float, *, alone: bool) -> None:
        """A host that has not answered for long is lost, and asked on as long as that holds nobody up."""
        policy = self.policy(Reason.UNREACHABLE)
        silent = now - item.last_answer
        if item.lost is None and silent >= self.lost_after_s and not self._finished(item):
            why = item.cause or "the last question is still open"
            cause = f"no answer for {silent:.0f} s ({why}); it may still run there"
            item.lost = now
            self._lose(item, HostState.UNREACHABLE, cause, Reason.UNREACHABLE)
        given = policy.times * policy.after_s if alone else math.inf
        if item.lost is not None and (item.leaving or not policy.times or now - item.lost >= given):
            self._end(item)

    def _lose(self, item: Polled, state: HostState, cause: str, reason: Reason, hint: str = "") -> None:
        self._say(item, state, cause, hint)
        # A transfer that still waits on it learns of it as well.
        _close(item)
        end = UnitState.UNREACHABLE
        if item.leaving:
            # Gone as it had said: nothing runs there any more.
            end, cause, reason = UnitState.INTERRUPTED, item.leaving, Reason.INTERRUPTED
        for unit in item.specs:
            record = self.known[unit]
            if not record.state.ended:
                self._keep(replace(record, state=end, cause=cause, reason=reason))

    def _say(self, item: Polled, state: HostState, cause: str = "", hint: str = "") -> None:
        """Keep how the host stands, when that has changed."""
        if item.said != (state, cause):
            item.said = (state, cause)
            self.note_host(
                HostRecord(
                    host=item.host.name, state=state, cause=cause, hint=hint, since=time.time(),
                    last_answer_at=item.answered_at, leaving=item.leaving,
                )
            )  # fmt: skip

    # ── ends, and what is tried again ──

    def _ended(self, item: Polled, record: UnitRecord) -> None:
        """A unit has ended: first its files, whatever it left, then whether it is started again."""
        if record.unit in item.cancelled and record.state is UnitState.INTERRUPTED:
            record = replace(record, reason=Reason.CANCELLED)
        self._keep(record)
        if record.status is not None:
            item.to_bring.append(record.unit)
        else:
            self._decide(item, record.unit, record.reason, record.cause)

    def _send_for(self, item: Polled) -> None:
        """See that the files of the host's ended units come home, one unit after another."""
        if item.bringing or not item.to_bring or item.connection is None or item.lost is not None:
            return
        unit = item.bringing = item.to_bring.pop(0)
        connection, record = item.connection, self.known[unit]

        def then(home: Collected | reach.Unreachable | None) -> None:
            item.bringing = ""
            if isinstance(home, reach.Unreachable):
                home = Collected(folder="", complete=False, cause=home.cause, reason=Reason.UNREACHABLE)
            self._brought(item, unit, home)

        self._aside(lambda: self.bring(connection, item.work_dir, record), then)

    def _brought(self, item: Polled, unit: str, home: Collected | None) -> None:
        record = self.known[unit]
        reason, cause = record.reason, record.cause
        if home is not None:
            times = item.fetched[unit] = item.fetched.get(unit, 0) + 1
            broken_off = home.reason is Reason.UNREACHABLE
            if broken_off or (home.reason is Reason.CORRUPT_FILES and record.state is UnitState.DONE and times == 1):
                # What is not home is not started over, it would be lost: in the end `fleet collect` asks for it.
                if times < FETCHES:
                    item.to_bring.append(unit)
                return
            if record.state is UnitState.DONE:
                # Of what is the matter with this machine, its own full disk, no host is to blame.
                mine = home.reason not in {Reason.CORRUPT_FILES, Reason.INVALID_RESULT}
                reason, cause = (Reason.NONE, "") if mine else (home.reason, home.cause)
        self._decide(item, unit, reason, cause)

    def _decide(self, item: Polled, unit: str, reason: Reason, cause: str) -> None:
        """Start an ended unit again, if its reason's policy says so."""
        record = self.known[unit]
        wait = None
        if reason is not Reason.NONE and unit not in item.cancelled and not item.leaving:
            wait = self._tally.again(unit, reason)
        if wait is None:
            self._settle(record, reason)
            return
        measured = record.state is UnitState.DONE and reason is Reason.INVALID_RESULT
        best = replace(record, reason=reason, best=None) if measured else record.best
        attempt = Attempt(state=record.state, reason=reason, cause=cause, ended_at=time.time())
        text = f"again{f' in {wait:.0f} s' if wait else ''}: {cause or reason}"
        self._keep(
            replace(
                record, state=UnitState.PENDING, cause=text, reason=Reason.NONE, status=None,
                attempts=(*record.attempts, attempt), best=best,
            )
        )  # fmt: skip
        self.watch.host(item.host.name, f"{unit.removeprefix(item.host.name + '.')}: {text}")
        item.fetched.pop(unit, None)
        item.stale.pop(unit, None)
        item.specs[unit] = replace(item.specs[unit], attempt=item.specs[unit].attempt + 1)
        item.again[unit] = time.monotonic() + wait

    def _settle(self, record: UnitRecord, reason: Reason) -> None:
        """The unit is not started again."""
        settled = retries.settled(replace(record, reason=reason) if record.state is UnitState.DONE else record)
        if settled != record:
            self.known[record.unit] = settled
            self.note(settled)

    def _cancel(self, item: Polled, names: set[str]) -> None:
        """Units that somebody cancelled: those that wait end here, the others are ended by their host."""
        for unit in item.specs if item.host.name in names else names & item.specs.keys():
            record = self.known[unit]
            if unit in item.again or (unit in item.to_start and not item.asking):
                item.again.pop(unit, None)
                item.to_start = [other for other in item.to_start if other != unit]
                self._keep(replace(record, state=UnitState.INTERRUPTED, cause="cancelled", reason=Reason.CANCELLED))
                self._decide(item, unit, Reason.CANCELLED, "cancelled")
            elif unit not in item.cancelled and not _is_settled(record):
                item.cancelling.append(unit)
                item.due = time.monotonic()
            item.cancelled.add(unit)


def _is_settled(record: UnitRecord) -> bool:
    """Whether a host has nothing more to say of a unit; of one that was lost it has."""
    return record.state.ended and record.state is not UnitState.UNREACHABLE


def _raise(error: BaseException) -> None:
    raise error


def _close(item: Polled) -> None:
    connection, item.connection = item.connection, None
    if connection is not None:
        connection.close()
