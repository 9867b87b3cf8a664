"""What the stages tell the person watching; the CLI decides how it looks."""

from typing import Protocol


class Watch(Protocol):
    """Told what happens, as it happens; must be quick and may be called from several threads."""

    def stage(self, name: str, text: str) -> None:
        """A stage begins."""

    def host(self, host: str, text: str, *, fraction: float | None = None, ended: bool = False) -> None:
        """What a host is doing now; `fraction` of the current unit, `ended` when it has nothing more to do."""


class Silent:
    """Tells nobody; for tests and scripts."""

    def stage(self, name: str, text: str) -> None:
        """Ignored."""

    def host(self, host: str, text: str, *, fraction: float | None = None, ended: bool = False) -> None:
        """Ignored."""
