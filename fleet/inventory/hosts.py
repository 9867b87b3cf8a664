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
    entry: int | None = 0
    """Index of the campaign's entry that it came from; of `cloud.instances` where `launched`; None where no entry names it."""
    usd_per_hour: float | None = None
    instance: "Instance | None" = None
    """What EC2 says of it, for hosts that fleet launched or found there."""
    gone: str = ""
    """Why it is left out from now on: the campaign's files do not name it any more; empty while they do."""

    @property
    def launched(self) -> bool:
        """Whether fleet launches it, rather than somebody else, or nobody because it is no instance."""
        return self.instance is not None and (not self.instance.id or bool(self.instance.lease))

    @property
    def missing(self) -> str:
        """Why there is nothing to connect to; empty for every host but an instance that is not there."""
        return self.instance.cause if self.instance is not None else ""

    @property
    def finished(self) -> str:
        """Why nothing is left to do on it: its instance is gone and all its units are home; else empty."""
        return self.missing if self.instance is not None and self.instance.home else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A host's EC2 instance. Of one that is yet to be launched only `lease` is empty and `id` too."""

    id: str = ""
    """`i-…`"""
    lease: str = ""
    """The lease it was launched under; empty for instances that somebody else launched."""
    type: str = ""
    region: str = ""
    zone: str = ""
    market: str = ""
    """`on-demand` or `spot`."""
    gpu: str = ""
    """`a10g`, as DescribeInstanceTypes names it, in lower case with dashes; empty when unknown or none."""
    image: str = ""
    """`ami-…`"""
    known_hosts: str = ""
    """Path of a known_hosts file with the key that the controller made for it, under the name `key_alias`."""
    key_alias: str = ""
    patience_s: float = 0.0
    """So long an instance that was just launched may take to answer ssh."""
    cause: str = ""
    """Why there is no instance; empty when there is one. Then the fields above say what the last one was."""
    home: bool = False
    """There is no instance any more and all units of the host are home: none is needed."""


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
