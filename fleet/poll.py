"""Ask hosts how their units stand until each unit has ended: over open connections, each host at its own pace.

A host's answer is not trusted: what cannot be read counts as no answer, never as an error.
"""

import shlex
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fleet.handoff import UnitRecord
from fleet.harness.contract import SupervisorBeat, UnitState, UnitStatus
from fleet.inventory import reach
from fleet.inventory.hosts import Host
from fleet.watch import Watch, duration

HOSTS_A_SECOND = 16
"""Questions asked a second, at the most; each costs about 3 ms of CPU. Up to so many hosts are asked once a second."""
SETTLED_S, SETTLED_TIMES = 60.0, 5
"""Once every unit has run for so long, hosts are asked so many times less often: a question costs them CPU as well."""
BROUGHT_AT_ONCE = 4
"""Hosts whose files are fetched side by side."""
STALE_S = 45.0
"""A unit whose supervisor was last alive longer ago, by its host's own clock, has lost it."""
CONFIRM_S = 5.0
"""For so long a dead supervisor must look dead."""
MINUTE = 60.0
SEPARATOR = "\x1e"
"""Record separator of JSON text sequences (RFC 7464): one broken file does not hide the next."""

_STATUS = TypeAdapter(UnitStatus)
_BEAT = TypeAdapter(SupervisorBeat)


@dataclass(slots=True, kw_only=True)
class Polled:
    """A host being polled."""

    host: Host
    work_dir: str
    units: list[str]
    connection: reach.Connection | None = None
    last_answer: float = field(default_factory=time.monotonic)
    cause: str = ""
    """Why the last question got no answer; empty when it did."""
    stale: dict[str, float] = field(default_factory=dict)
    """Units whose supervisor seems dead, and since when."""
    to_bring: list[str] = field(default_factory=list)
    """Ended units whose files have not been sent for."""
    bringing: Future[object] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What a host said."""

    now: float
    """Its clock, Unix seconds."""
    boot: str
    beat: SupervisorBeat | None
    statuses: dict[str, UnitStatus]


def poll(
    polled: list[Polled],
    known: dict[str, UnitRecord],
    note: Callable[[UnitRecord], None],
    bring: Callable[[reach.Connection, str, UnitRecord], object],
    watch: Watch,
    *,
    token: str,
    lost_after_s: float,
) -> None:
    """Keep `known` up to date, and `note` every change of state, until each unit has ended or its host is lost.

    `bring` is given each ended unit with the open connection and the host's work folder, in a thread of its own,
    one unit of a host at a time.
    """
    waiting = {item.host.name: item for item in polled}
    asked: dict[str, Future[reach.Answer]] = {}
    pool = ThreadPoolExecutor(max_workers=min(32, max(1, len(polled))))
    bringers = ThreadPoolExecutor(max_workers=BROUGHT_AT_ONCE)
    try:
        while waiting:
            began = time.monotonic()
            for name, item in waiting.items():
                # A host that has not answered the last question is not asked another, and holds nobody up.
                if name not in asked:
                    asked[name] = pool.submit(_ask, item, token)
            interval = _interval(waiting.values(), known)
            transfers: list[Future[Any]] = [item.bringing for item in waiting.values() if item.bringing]
            wait([*asked.values(), *transfers], timeout=interval)
            for name in [name for name, future in asked.items() if future.done()]:
                _take_answer(waiting[name], asked.pop(name), known, note)
                _tell(watch, waiting[name], known)
            for name, item in list(waiting.items()):
                _send_for(item, known, bringers, bring)
                if _finished(item, known, note, lost_after_s) and item.bringing is None:
                    watch.host(name, _sum(item, known), ended=True)
                    _close(waiting.pop(name))
                    asked.pop(name, None)
            if waiting and not any(item.bringing for item in waiting.values()):
                time.sleep(max(0.0, began + interval - time.monotonic()))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        bringers.shutdown(wait=False, cancel_futures=True)
        for item in waiting.values():
            _close(item)


def _send_for(
    item: Polled,
    known: dict[str, UnitRecord],
    bringers: ThreadPoolExecutor,
    bring: Callable[[reach.Connection, str, UnitRecord], object],
) -> None:
    """See that the files of the host's ended units come home; without a connection they wait for the collect stage."""
    if item.bringing is not None:
        if not item.bringing.done():
            return
        item.bringing.result()
        item.bringing = None
    if item.to_bring and item.connection is not None:
        item.bringing = bringers.submit(bring, item.connection, item.work_dir, known[item.to_bring.pop(0)])


def _interval(waiting: Collection[Polled], known: dict[str, UnitRecord]) -> float:
    """Seconds between two questions to a host."""
    usual = max(1.0, len(waiting) / HOSTS_A_SECOND)
    running = [known[unit].status for item in waiting for unit in item.units if known[unit].state is UnitState.RUNNING]
    settled = len(running) >= len(waiting) and all(status and _age(status) > SETTLED_S for status in running)
    return usual * SETTLED_TIMES if settled else usual


def _age(status: UnitStatus) -> float:
    """Seconds that a unit has run, by its host's clock."""
    return max(0.0, (status.heartbeat_at or 0.0) - (status.started_at or 0.0))


def _ask(item: Polled, token: str) -> reach.Answer:
    """One shell command that says the host's time, its boot, and the status of supervisor and units."""
    if item.connection is None:
        item.connection = reach.connect(item.host)
    folder = shlex.quote(f"{item.work_dir}/runs/{token}")
    files = "for file in supervisor.json */status.json; do printf '\\036'; cat \"$file\"; done"
    try:
        return item.connection.run(f"date +%s; cat /proc/sys/kernel/random/boot_id; cd {folder} && {files}", timeout=15)
    except reach.Unreachable:
        _close(item)
        item.connection = None
        raise


def _close(item: Polled) -> None:
    if item.connection is not None:
        item.connection.close()


def parse_answer(text: str) -> Word:
    """A host's answer; what cannot be read is left out."""
    first, *documents = text.split(SEPARATOR)
    time_line, _, boot = first.partition("\n")
    now = float(time_line) if time_line.strip().isdecimal() and time_line.isascii() else 0.0
    beat = None
    statuses = {}
    for document in documents:
        try:
            status = _STATUS.validate_json(document)
        except ValidationError:
            beat = _read_beat(document) or beat
            continue
        statuses[status.unit] = status
    return Word(now=now, boot=boot.strip(), beat=beat, statuses=statuses)


def _read_beat(document: str) -> SupervisorBeat | None:
    try:
        return _BEAT.validate_json(document)
    except ValidationError:
        return None


def _take_answer(
    item: Polled, future: "Future[reach.Answer]", known: dict[str, UnitRecord], note: Callable[[UnitRecord], None]
) -> None:
    """Digest one answer into unit records."""
    try:
        answer = future.result()
    except reach.Unreachable as error:
        item.cause = error.cause
        return
    word = parse_answer(answer.out)
    if not word.now:
        item.cause = "its answer cannot be read"
        return
    item.last_answer, item.cause = time.monotonic(), ""
    for unit in item.units:
        updated = _update(known[unit], word, item.stale)
        if updated.state is not known[unit].state:
            note(updated)
            if updated.state.ended and updated.status is not None:
                item.to_bring.append(unit)
        known[unit] = updated


def _update(record: UnitRecord, word: Word, stale: dict[str, float]) -> UnitRecord:
    status = word.statuses.get(record.unit)
    if record.state.ended:
        return record
    if status is None:
        return replace(record, state=UnitState.FAILED, cause="its folder is not on the host")
    state, cause = judge(status, word)
    if state is UnitState.FAILED and state is not status.state:
        # Once may be a clock that was set or a machine that slept; it must still be so a while later.
        since = stale.setdefault(record.unit, time.monotonic())
        if time.monotonic() - since < CONFIRM_S:
            return replace(record, state=status.state, status=status)
    else:
        stale.pop(record.unit, None)
    return replace(record, state=state, cause=cause, status=status)


def judge(status: UnitStatus, word: Word) -> tuple[UnitState, str]:
    """A unit's state as the controller sees it: a host that was rebooted or lost its supervisor cannot say so itself."""
    if status.state.ended:
        return status.state, status.cause
    seen, boot = status.heartbeat_at, status.boot_id
    if status.state is UnitState.QUEUED and word.beat is not None and word.beat.heartbeat_at > (seen or 0.0):
        seen, boot = word.beat.heartbeat_at, word.beat.boot_id
    if boot and word.boot and boot != word.boot:
        return UnitState.INTERRUPTED, "the host was rebooted"
    if seen is not None and word.now - seen > STALE_S:
        return UnitState.FAILED, "its supervisor died, or its disk is full"
    return status.state, status.cause


def _finished(
    item: Polled, known: dict[str, UnitRecord], note: Callable[[UnitRecord], None], lost_after_s: float
) -> bool:
    if all(known[unit].state.ended for unit in item.units):
        return True
    silent = time.monotonic() - item.last_answer
    if silent < lost_after_s:
        return False
    cause = f"no answer for {silent:.0f} s ({item.cause or 'the last question is still open'}); it may still run there"
    for unit in item.units:
        if not known[unit].state.ended:
            known[unit] = replace(known[unit], state=UnitState.UNREACHABLE, cause=cause)
            note(known[unit])
    return True


def _tell(watch: Watch, item: Polled, known: dict[str, UnitRecord]) -> None:
    if item.cause:
        watch.host(item.host.name, f"no answer: {item.cause}")
        return
    for number, unit in enumerate(item.units, start=1):
        status = known[unit].status
        if status is not None and status.state is UnitState.RUNNING:
            spent = _age(status)
            fraction = min(0.99, spent / status.expected_s) if status.expected_s > 0 else None
            short = unit.removeprefix(item.host.name + ".") + known[unit].remark
            left = sum(_left(known[other].status) for other in item.units)
            text = f"{short} ({number}/{len(item.units)}), {status.samples_done} samples, {spent:.0f} s"
            if left >= MINUTE:
                text += f", about {duration(left / MINUTE)} left"
            watch.host(item.host.name, text, fraction=fraction)
            return


def _left(status: UnitStatus | None) -> float:
    """Seconds that a unit will still take, as its host expects."""
    if status is None or status.state.ended:
        return 0.0
    return max(0.0, status.expected_s - _age(status)) if status.state is UnitState.RUNNING else status.expected_s


def _sum(item: Polled, known: dict[str, UnitRecord]) -> str:
    done = sum(known[unit].state is UnitState.DONE for unit in item.units)
    causes = {known[unit].cause for unit in item.units if known[unit].cause}
    return f"{done} of {len(item.units)} units done" + (f": {min(causes)}" if causes else "")
