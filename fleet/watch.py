"""What the stages tell the person watching; the CLI decides how it looks."""

from typing import Protocol


class Watch(Protocol):
    """Told what happens, as it happens; must be quick and may be called from several threads."""

    def stage(self, name: str, text: str) -> None:
        """A stage begins."""

    def host(self, host: str, text: str, *, fraction: float | None = None, ended: bool = False) -> None:
        """What a host is doing now; `fraction` of the current unit, `ended` when it has nothing more to do."""

    def note(self, text: str) -> None:
        """A line to be kept on the screen, whatever follows."""


class Silent:
    """Tells nobody; for tests and scripts."""

    def stage(self, name: str, text: str) -> None:
        """Ignored."""

    def host(self, host: str, text: str, *, fraction: float | None = None, ended: bool = False) -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""


def duration(minutes: float) -> str:
    """Words for a time: `4 min`, `2.5 h`, `1.3 days`."""
    if minutes < 90:  # noqa: PLR2004 - from there on hours read better
        return f"{max(1, round(minutes))} min"
    hours = minutes / 60
    return f"{hours:.1f} h" if hours < 36 else f"{hours / 24:.1f} days"  # noqa: PLR2004 - likewise days
