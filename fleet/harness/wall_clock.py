"""The wall clock while a unit is measured: LoadGen's durations are differences of it, and wrong when it is set."""

import time

from fleet.harness.contract import Reason
from fleet.harness.reasons import UnitError

STEP_S = 1.0
"""NTP slews by half a millisecond a second at the most, so within a unit by less than this; what moves more was set."""
_PROMPT_S = 0.05


class WallClock:
    """Knows whether the clock was set since it was made. Sleep and a host that hangs are no such thing: time has passed."""

    def __init__(self) -> None:
        self._offset = _offset()

    def error(self) -> UnitError | None:
        """What is the matter with a measurement that goes on, or has just ended; None when nothing is."""
        step = _offset() - self._offset
        if abs(step) < STEP_S:
            return None
        return UnitError(f"the clock was set by {step:+.0f} s while LoadGen measured by it", Reason.INTERRUPTED)


def _offset() -> float:
    """Wall clock minus time since boot, suspended time included."""
    while True:
        before = time.clock_gettime(time.CLOCK_BOOTTIME)
        now = time.time()
        # A process that was frozen between the two has seen nothing.
        if time.clock_gettime(time.CLOCK_BOOTTIME) - before < _PROMPT_S:
            return now - before
