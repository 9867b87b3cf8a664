"""A part of the fleet: which hosts --limit and --exclude leave. What is left out is a state with a cause, not silence."""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fleet import campaign as campaigns
from fleet.errors import CampaignError


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """Patterns over host names: ranges such as `gpu[01-04]`, several with commas, or `*` and `?` as in a shell."""

    limit: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    spared: Mapping[str, str] = field(default_factory=dict)
    """Hosts that nobody typed, with why they are left out all the same."""

    def left_out(self, host: str) -> str:
        """Why the host is left out, as typed; empty when it is not."""
        if host in self.spared:
            return self.spared[host]
        if self.limit and not any(_fits(pattern, host) for pattern in self.limit):
            return "--limit " + " ".join(self.limit)
        return next((f"--exclude {pattern}" for pattern in self.exclude if _fits(pattern, host)), "")

    def check(self, hosts: Iterable[str]) -> None:
        """Raise CampaignError when a pattern fits no host, or none is left: a slip of the finger measures nothing."""
        known = list(hosts)
        for option, patterns in (("--limit", self.limit), ("--exclude", self.exclude)):
            for pattern in patterns:
                if not any(_fits(pattern, host) for host in known):
                    raise CampaignError(f"{option} {pattern}: no such host", hint=f"the hosts are {_some(known)}")
        if known and all(self.left_out(host) for host in known):
            raise CampaignError("--exclude leaves no host", hint=f"the hosts are {_some(known)}")


EVERYTHING = Subset()


def matching(patterns: Iterable[str], hosts: Iterable[str]) -> list[str]:
    """The hosts that any of the patterns fits, in their own order."""
    given = tuple(patterns)
    return [host for host in hosts if any(_fits(pattern, host) for pattern in given)]


def _fits(pattern: str, host: str) -> bool:
    if set("*?") & set(pattern):
        return any(fnmatch.fnmatchcase(host, part) for part in pattern.split(","))
    return host in campaigns.expand(pattern, source="--limit")


def _some(hosts: list[str]) -> str:
    return ", ".join(hosts[:8]) + (", …" if len(hosts) > 8 else "")  # noqa: PLR2004 - a line's worth
