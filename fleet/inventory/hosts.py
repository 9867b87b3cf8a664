"""A host: a machine Ansible reaches. Values only."""

from dataclasses import dataclass, field

from fleet.terms import HostKind, HostState

GROUPS = {HostKind.LAPTOP: "laptops", HostKind.SERVER: "servers", HostKind.EC2: "ec2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One host of the campaign, with what is needed to reach it."""

    name: str
    kind: HostKind
    connection: str
    """`ssh` or `local`."""
    address: str
    """What ssh is asked for; an alias of the user's ssh config works."""
    user: str | None = None
    port: int | None = None
    identity_file: str | None = None
    python: str | None = None
    notes: dict[str, str] = field(default_factory=dict)
    entry: int = 0
    """Index of the campaign's entry that it came from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reachability:
    """What one probe of a host found, before any Ansible."""

    host: str
    kind: HostKind
    state: HostState
    cause: str = ""
    hint: str = ""
    """The next command, ready to paste."""
    hostname: str = ""
    home: str = ""
    """The user's home folder there: ssh, Ansible and a shell do not agree on what ~ is."""
    machine_id: str = ""
    python: str = ""
    """Path of the interpreter to use on the host."""
    python_version: str = ""
    seconds: float = 0.0
