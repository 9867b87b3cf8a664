"""What is tried again, how often, and after what: one policy per reason, which the campaign may override."""

from fleet.campaign import Campaign, RetryPolicy
from fleet.terms import Reason

DEFAULTS: dict[Reason, RetryPolicy] = {
    Reason.UNREACHABLE: RetryPolicy(times=2, after_s=60),
    Reason.INTERRUPTED: RetryPolicy(times=2, after_s=30),
    Reason.SUPERVISOR_DIED: RetryPolicy(times=1, after_s=5),
    Reason.NO_SPACE: RetryPolicy(times=1, after_s=120),
    Reason.INVALID_RESULT: RetryPolicy(times=1, after_s=0),
    Reason.CORRUPT_FILES: RetryPolicy(times=1, after_s=0),
}
"""Whatever is not here would only fail again: a timeout, too little memory, a missing file, what somebody cancelled."""


def policy(campaign: Campaign, reason: Reason) -> RetryPolicy:
    """The campaign's policy for `reason`, else fleet's own, else none."""
    return campaign.run.retry.get(reason) or DEFAULTS.get(reason) or RetryPolicy(times=0, after_s=0)
