"""Every error that fleet raises on purpose, and the exit codes.

    FleetError                 exit 1  something stopped the command
    ├── CampaignError          exit 2  fleet.yml, or what was typed, is wrong
    ├── SessionError           exit 1  the session folder is missing, newer than this fleet, or in use
    ├── PlayError              exit 1  ansible-runner itself could not run (a failed host is data, not an error)
    ├── CloudError             exit 1  EC2 refused, or there is no way to ask it
    │   └── LeakError          exit 4  an instance may still be running
    ├── ResultsError           exit 1  collected files cannot be read
    └── SubmissionError        exit 5  no submission can be made of these results

A host or a unit that fails is never an exception: it is an outcome with a state and a cause, and the
exit code is chosen from all of them (`ExitCode.worst`).
"""

from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """The contract with scripts, documented in docs/exit-codes.md."""

    OK = 0
    ERROR = 1
    USAGE = 2
    MISSING = 3
    """Some hosts or units are missing from the result."""
    LEAK = 4
    """A cloud instance may still be running."""
    INVALID = 5
    """A result is INVALID, or the submission check found something."""
    INTERRUPTED = 130

    @staticmethod
    def worst(codes: Iterable["ExitCode"]) -> "ExitCode":
        """The most serious of several: 4, then 130, 2, 1, 3, 5, and 0 when there is none."""
        found = set(codes)
        order = (
            ExitCode.LEAK,
            ExitCode.INTERRUPTED,
            ExitCode.USAGE,
            ExitCode.ERROR,
            ExitCode.MISSING,
            ExitCode.INVALID,
        )
        return next((code for code in order if code in found), ExitCode.OK)


class FleetError(Exception):
    """What stopped the command, and the next thing to do about it."""

    exit_code = ExitCode.ERROR

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        """The next command or edit that helps, in the imperative; may be empty."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with what is to be known and done after it; exit 130, as for any other."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class CampaignError(FleetError):
    """fleet.yml or an argument is wrong; nothing was started."""

    exit_code = ExitCode.USAGE


class SessionError(FleetError):
    """The session folder cannot be used as it is."""


class PlayError(FleetError):
    """ansible-runner could not run the playbook at all."""


class CloudError(FleetError):
    """EC2 refused, or cannot be asked; `code` is AWS's own word for it, empty when it said none."""

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


class LeakError(CloudError):
    """An instance may still be running; the message names its id."""

    exit_code = ExitCode.LEAK


class ResultsError(FleetError):
    """A collected file cannot be understood."""


class SubmissionError(FleetError):
    """No submission can be made of these results."""

    exit_code = ExitCode.INVALID
