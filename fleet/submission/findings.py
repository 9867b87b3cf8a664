"""What a check has to say about a submission tree."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Severity(StrEnum):
    """An error makes the official checker or a reviewer refuse the result; a warning does not by itself."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a tree, and what to do about it."""

    severity: Severity
    path: str
    """Relative to the tree's root, `/`-separated; `.` is the root."""
    message: str
    fix: str
    """In the imperative."""


@dataclass(frozen=True, slots=True)
class Reporter:
    """Makes findings about the files of one tree."""

    root: Path

    def error(self, path: Path, message: str, fix: str) -> Finding:
        """A finding that stops a submission."""
        return Finding(Severity.ERROR, self.relative(path), message, fix)

    def warning(self, path: Path, message: str, fix: str) -> Finding:
        """A finding to look at."""
        return Finding(Severity.WARNING, self.relative(path), message, fix)

    def relative(self, path: Path) -> str:
        """`path` as findings name it."""
        return path.relative_to(self.root).as_posix()


def has_errors(findings: Iterable[Finding]) -> bool:
    """True when the tree must not be uploaded."""
    return any(finding.severity is Severity.ERROR for finding in findings)
