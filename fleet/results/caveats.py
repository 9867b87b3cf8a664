"""What a reader should know of a number that counts all the same: power, sleep, heat, doubtful identities. Pure."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from fleet.harness.contract import SystemFacts, UnitStatus

CONDITIONS = {"battery": "on battery", "sleep": "asleep", "thermal": "throttled by heat"}
"""UnitStatus.conditions in words."""
IGNORE = "ignore"


def of_unit(status: UnitStatus | None, policies: Mapping[str, str]) -> tuple[str, ...]:
    """What the host saw while the unit ran, unless the campaign says to ignore it: `on battery for 31 s`."""
    seen = status.conditions if status else {}
    return tuple(
        f"{words} for {_seconds(seen[name])}"
        for name, words in CONDITIONS.items()
        if name in seen and math.isfinite(seen[name]) and seen[name] > 0 and policies.get(name) != IGNORE
    )


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 1 else "less than 1 s"


def of_instances(counts: Mapping[str, int]) -> tuple[str, ...]:
    """That a host's numbers are from several EC2 instances, with how many units each: one was replaced by another."""
    if len(counts) < 2:  # noqa: PLR2004 - one is what a host is
        return ()
    said = ", ".join(f"{name} ({count})" for name, count in counts.items())
    return (f"measured on {len(counts)} instances of one type, units of each: {said}",)


def of_identity(hosts: Iterable[tuple[str, SystemFacts | None]]) -> dict[str, str]:
    """Host to a warning, for hosts that no probe can tell from another one: a cloned image, or one machine twice.

    They stay systems of their own, under their own names.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    known: dict[str, SystemFacts] = {}
    for host, facts in hosts:
        if facts is not None and facts.machine_id:
            groups[facts.identity].append(host)
            known[host] = facts
    found = {}
    for same in groups.values():
        for host in same:
            if others := ", ".join(other for other in same if other != host):
                what = "machine-id and GPUs" if known[host].accelerators else "machine-id"
                found[host] = (
                    f"shares its {what} with {others}: a cloned image, or one machine under two names; "
                    "counted as systems of their own"
                )
    return found
