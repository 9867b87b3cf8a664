"""Hosts of a campaign: names, ranges, files and ssh aliases become one ordered list without doubles."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from fleet.campaign import HOST_NAME, HOST_NAME_LIMIT, Campaign, HostEntry, expand
from fleet.errors import CampaignError
from fleet.inventory import ssh_config
from fleet.inventory.hosts import Host


def hosts(campaign: Campaign, *, base: Path, source: str) -> tuple[Host, ...]:
    """Every host of the campaign that its files name, in its order: no instances, neither fleet's own nor `ec2_tag`'s.

    `base` is the folder that relative file names start from. Raises CampaignError for a name given twice, be it to an
    instance, a missing file or a pattern that matches nothing.
    """
    found: dict[str, Host] = {}
    instances = set(campaign.cloud.names()) if campaign.cloud else set()
    for number, entry in enumerate(campaign.hosts):
        for name in _names(entry, base=base, source=source):
            if not re.fullmatch(HOST_NAME, name) or len(name) > HOST_NAME_LIMIT:
                raise CampaignError(f"{source}: hosts: {name!r} is no host name", hint=f"edit {source}")
            if name in instances:
                raise CampaignError(
                    f"{source}: hosts: {name} is the name of an instance under cloud.instances too",
                    hint=f"edit {source}: name either of them otherwise",
                )
            if name in found:
                raise CampaignError(f"{source}: hosts: {name} is given twice", hint=f"edit {source}")
            found[name] = _host(name, number, campaign)
    return tuple(found.values())


def _names(entry: HostEntry, *, base: Path, source: str) -> Iterator[str]:
    if entry.name:
        yield from expand(entry.name, source=source)
    elif entry.file:
        path = base / Path(entry.file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CampaignError(f"{source}: hosts: {path} cannot be read ({error})", hint=f"edit {source}") from error
        for line in lines:
            if name := line.partition("#")[0].strip():
                yield from expand(name, source=str(path))
    elif entry.ssh_config:
        aliases = ssh_config.aliases(entry.ssh_config)
        if not aliases:
            raise CampaignError(
                f"{source}: hosts: no Host alias in your ssh config matches {entry.ssh_config!r}",
                hint=f"edit {source} or {ssh_config.config_file()}",
            )
        yield from aliases


def gone(earlier: Iterable[Host], listed: Iterable[Host], campaign: Campaign, *, source: str) -> list[Host]:
    """The hosts of an earlier inventory that no file names any more, as they were; instances are not among them."""
    names = {host.name for host in listed}
    return [
        replace(host, gone=f"not in {_place(host, campaign, source)} any more")
        for host in earlier
        if host.instance is None and host.name not in names
    ]


def _place(host: Host, campaign: Campaign, source: str) -> str:
    """The file that named a host."""
    given = entry(host, campaign)
    if given is not None and given.ssh_config:
        return str(ssh_config.config_file())
    return (given.file if given is not None else None) or source


def entry(host: Host, campaign: Campaign) -> HostEntry | None:
    """The entry of the campaign's `hosts` that `host` comes from; None for instances that none names."""
    return None if host.launched or host.entry is None else campaign.hosts[host.entry]


def _host(name: str, number: int, campaign: Campaign) -> Host:
    given = campaign.hosts[number]
    return Host(
        name=name,
        kind=given.kind,
        connection=given.connection,
        address=given.address or name,
        user=given.user,
        port=given.port,
        identity_file=given.identity_file,
        python=given.python,
        notes={**campaign.notes, **given.notes},
        entry=number,
        usd_per_hour=given.usd_per_hour,
    )
