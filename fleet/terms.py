"""The field's own words as types; nothing else in fleet spells them as strings."""

from enum import StrEnum

from fleet.harness.contract import Mode, Reason, Scenario, UnitState

__all__ = [
    "Availability",
    "Category",
    "Division",
    "HostKind",
    "HostState",
    "Mode",
    "Reason",
    "Scenario",
    "UnitState",
    "outcome",
]


class Division(StrEnum):
    """MLPerf's divisions that this version can submit to."""

    OPEN = "open"
    CLOSED = "closed"


class Category(StrEnum):
    """What the rules call system type: `system_type` of the system description."""

    EDGE = "edge"
    DATACENTER = "datacenter"


class Availability(StrEnum):
    """`status` of the system description."""

    AVAILABLE = "available"
    PREVIEW = "preview"
    RDI = "rdi"


class HostKind(StrEnum):
    """What sort of machine a host is; decides its group and its preflight."""

    LAPTOP = "laptop"
    SERVER = "server"
    EC2 = "ec2"


class HostState(StrEnum):
    """What a stage found out about a host; every host of the campaign has one after every stage."""

    READY = "ready"
    UNREACHABLE = "unreachable"
    """No answer, or the login was refused."""
    UNKNOWN_KEY = "unknown-host-key"
    CHANGED_KEY = "changed-host-key"
    NOT_READY = "not-ready"
    """Reached, but preflight or provision says it cannot run what was asked."""
    FAILED = "failed"
    """A task failed on it."""
    LEFT_OUT = "left-out"
    """Not asked for this time, by --limit or --exclude."""


def outcome(state: UnitState | HostState, reason: Reason) -> str:
    """A state with its reason, where that says more: `failed (out-of-memory)`, but `timeout`, `changed-host-key`."""
    return str(state) if reason is Reason.OTHER or str(reason) in str(state) else f"{state} ({reason})"
