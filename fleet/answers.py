"""What a host is asked about its units, and what its answer means. No connection, no clock of anybody's.

A host's answer is not trusted: what cannot be read counts as no answer, never as an error, and nothing in it is
longer than it may be. Times are seconds since the host's boot, which no set clock can shift.
"""

import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fleet.handoff import UnitRecord
from fleet.harness.contract import Reason, SupervisorBeat, UnitState, UnitStatus

STALE_S = 45.0
"""A unit whose supervisor was last alive longer ago, by its host's own uptime, has lost it."""
SEPARATOR = "\x1e"
"""Record separator of JSON text sequences (RFC 7464): one broken file does not hide the next."""
CAUSE_LIMIT, COUNT_LIMIT, CONDITIONS_LIMIT = 500, 2**53, 8
"""Characters of a cause, samples, and kinds of conditions: what comes from a host goes into every table."""
REBOOTED = "the host was rebooted"
GONE = "its folder is not on the host"

_STATUS = TypeAdapter(UnitStatus)
_BEAT = TypeAdapter(SupervisorBeat)
_STARTED = TypeAdapter(dict[str, Any])
_BY_STATE = {
    UnitState.TIMEOUT: Reason.TIMEOUT,
    UnitState.INTERRUPTED: Reason.INTERRUPTED,
    UnitState.FAILED: Reason.OTHER,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What a host said."""

    uptime: float
    """Seconds since its boot; 0 when the answer cannot be read."""
    boot: str
    beat: SupervisorBeat | None
    statuses: dict[str, UnitStatus]
    gone: int = 0
    """The process that was asked about and is not there; 0 when it is, or when none was asked about."""

    @property
    def leaving(self) -> str:
        """Why the host is about to go away, as its supervisor was told since this boot; empty when it is not."""
        return self.beat.leaving if self.beat is not None and self.beat.boot_id == self.boot else ""


def question(folder: str, units: Iterable[str], supervisor: int = 0) -> str:
    """One shell command that says the host's uptime and boot, whether `supervisor` is there, and how `units` stand.

    `folder` is the session's on the host. The shell's own words as far as possible: a process costs a host more.
    """
    names = shlex.join(["supervisor.json", *(f"{unit}/status.json" for unit in units)])
    there = f"[ -e /proc/{supervisor} ] || echo gone {supervisor}; " if supervisor > 0 else ""
    return (
        'read up idle < /proc/uptime; read boot < /proc/sys/kernel/random/boot_id; echo "$up $boot"; '
        f"{there}cd {shlex.quote(folder)} && for file in {names}; do printf '\\036'; cat \"$file\"; done"
    )


def parse(text: str) -> Word:
    """A host's answer; what cannot be read is left out."""
    first, *documents = text.split(SEPARATOR)
    lines = first.splitlines()
    # Chatter of a login shell may stand before.
    told = next((found for line in lines if (found := re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]+)?) ([0-9a-zA-Z-]{1,64})", line))), None)  # fmt: skip
    gone = next((int(found[1]) for line in lines if (found := re.fullmatch("gone ([0-9]{1,10})", line))), 0)
    beat = None
    statuses = {}
    for document in documents:
        try:
            status = _STATUS.validate_json(document)
        except ValidationError:
            beat = _read_beat(document) or beat
            continue
        statuses[status.unit] = _bounded(status)
    if told is None:
        return Word(uptime=0.0, boot="", beat=beat, statuses=statuses)
    return Word(uptime=float(told[1]), boot=told[2], beat=beat, statuses=statuses, gone=gone)


def refused(text: str) -> dict[str, str]:
    """The units that a host did not take as it was given a queue, and why; `text` is what its `start` printed."""
    lines = text.strip().splitlines()
    try:
        # Chatter of a login shell may stand before.
        told = _STARTED.validate_json(lines[-1] if lines else "").get("refused")
    except ValidationError:
        return {}
    return {str(unit): one_line(str(cause)) for unit, cause in told.items()} if isinstance(told, dict) else {}


def one_line(text: str) -> str:
    """Words of a host as they may go into tables: printable, in one line, not endless."""
    flat = " ".join(text[: 8 * CAUSE_LIMIT].split())
    return "".join(letter if letter.isprintable() else "?" for letter in flat)[:CAUSE_LIMIT]


def _bounded(status: UnitStatus) -> UnitStatus:
    conditions = {
        str(name)[:40]: seconds
        for name, seconds in list(status.conditions.items())[:CONDITIONS_LIMIT]
        if math.isfinite(seconds)
    }
    done = max(0, min(status.samples_done, COUNT_LIMIT))
    return replace(status, cause=one_line(status.cause), samples_done=done, conditions=conditions)


def _read_beat(document: str) -> SupervisorBeat | None:
    try:
        beat = _BEAT.validate_json(document)
    except ValidationError:
        return None
    return replace(beat, leaving=one_line(beat.leaving))


def update(record: UnitRecord, word: Word) -> UnitRecord:
    """The record of a unit after an answer. What has ended stays as it is, but for units whose host was lost."""
    if record.state.ended and record.state is not UnitState.UNREACHABLE:
        return record
    status = word.statuses.get(record.unit)
    if status is None:
        return replace(record, state=UnitState.FAILED, cause=GONE, reason=Reason.OTHER)
    state, cause, reason = judge(status, word)
    return replace(record, state=state, cause=cause, reason=reason, status=status)


def judge(status: UnitStatus, word: Word) -> tuple[UnitState, str, Reason]:
    """A unit's state as the controller sees it: a host that was rebooted or lost its supervisor cannot say so itself."""
    if status.state.ended:
        reason = status.reason or _BY_STATE.get(status.state, Reason.NONE)
        return status.state, status.cause, Reason.NONE if status.state is UnitState.DONE else reason
    seen, boot, beat = status.beat_uptime, status.boot_id, word.beat
    # Units that wait have no heartbeat of their own: a supervisor of this boot speaks for them.
    current = beat is not None and beat.boot_id == word.boot
    if status.state is UnitState.QUEUED and beat is not None and current:
        if boot != word.boot:
            seen, boot = beat.beat_uptime, beat.boot_id
        elif beat.beat_uptime is not None:
            seen = max(beat.beat_uptime, seen or 0.0)
    if boot and word.boot and boot != word.boot:
        return UnitState.INTERRUPTED, REBOOTED, Reason.INTERRUPTED
    if beat is not None and current and word.gone == beat.pid and not _is_newer(status, beat):
        return UnitState.FAILED, "its supervisor died", Reason.SUPERVISOR_DIED
    if seen is not None and word.uptime - seen > STALE_S:
        return UnitState.FAILED, "its supervisor is silent, or its disk is full", Reason.SUPERVISOR_DIED
    return status.state, status.cause, Reason.NONE


def _is_newer(status: UnitStatus, beat: SupervisorBeat) -> bool:
    """Whether a unit was queued after the last beat of a supervisor that is gone: another one is on its way."""
    if status.state is not UnitState.QUEUED or status.beat_uptime is None or beat.beat_uptime is None:
        return False
    return status.beat_uptime > beat.beat_uptime
