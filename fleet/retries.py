"""What is tried again, how often, and after what: one policy per reason, which the campaign may override."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from fleet.campaign import Campaign, RetryPolicy
from fleet.handoff import Attempt, UnitRecord
from fleet.terms import Reason, UnitState

DEFAULTS: dict[Reason, RetryPolicy] = {
    Reason.UNREACHABLE: RetryPolicy(times=2, after_s=15),
    Reason.INTERRUPTED: RetryPolicy(times=2, after_s=30),
    Reason.SUPERVISOR_DIED: RetryPolicy(times=1, after_s=5),
    Reason.NO_SPACE: RetryPolicy(times=1, after_s=120),
    Reason.INVALID_RESULT: RetryPolicy(times=1, after_s=0),
    Reason.CORRUPT_FILES: RetryPolicy(times=1, after_s=0),
}
"""Whatever is not here would only fail again: a timeout, too little memory, a missing file, what somebody cancelled.

A host that was lost is asked again every `after_s` seconds as long as others work, and `times` more once none does.
"""


def policy(campaign: Campaign, reason: Reason) -> RetryPolicy:
    """The campaign's policy for `reason`, else fleet's own, else none."""
    return campaign.run.retry.get(reason) or DEFAULTS.get(reason) or RetryPolicy(times=0, after_s=0)


def settled(record: UnitRecord) -> UnitRecord:
    """What stands of a unit that has ended and is not started again: what was measured, whatever came of a later start."""
    best = record.best
    if best is None or record.state is UnitState.DONE:
        return replace(record, best=None)
    failed = Attempt(state=record.state, reason=record.reason, cause=record.cause, ended_at=time.time())
    return replace(best, later=(*record.attempts[len(best.attempts) + 1 :], failed))


class Tally:
    """How often each unit was started again in this run; a later run of the same session begins anew."""

    def __init__(self, policy: Callable[[Reason], RetryPolicy]) -> None:
        self._policy = policy
        self._times: Counter[tuple[str, Reason]] = Counter()

    def again(self, unit: str, reason: Reason) -> float | None:
        """Seconds after which `unit`, which ended for `reason`, is to be started again, and counts it; None for never."""
        allowed = self._policy(reason)
        if self._times[unit, reason] >= allowed.times:
            return None
        self._times[unit, reason] += 1
        return allowed.after_s
