"""inventory/hosts.yml: plain Ansible, usable without fleet. reachability.json: what the probe said."""

import re
import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from fleet.campaign import Campaign
from fleet.inventory import reach, ssh_config, static
from fleet.inventory.hosts import GROUPS, Host, Instance, Reachability
from fleet.session import Session
from fleet.terms import HostState

HEADER = "# Made by `fleet inventory` from fleet.yml; edit that. Plain Ansible: ansible-playbook -i hosts.yml …\n"


def to_ansible(hosts: Sequence[Host], reachable: Sequence[Reachability], campaign: Campaign) -> dict[str, Any]:
    """The inventory as Ansible's YAML plugin reads it: group `sut` with a child group per kind.

    Beside it, for instances: a group per type, zone and GPU, such as `type_g5_xlarge`, `zone_us_east_1a`, `gpu_a10g`.
    """
    found = {item.host: item for item in reachable}
    groups: dict[str, Any] = {}
    for host in hosts:
        group = groups.setdefault(GROUPS[host.kind], {"hosts": {}})
        group["hosts"][host.name] = _variables(host, found.get(host.name), campaign)
    of_instances: dict[str, Any] = {}
    for host in hosts:
        for name in instance_groups(host):
            of_instances.setdefault(name, {"hosts": {}})["hosts"][host.name] = {}
    return {
        "all": {
            "vars": dict(campaign.role_variables),
            "children": {"sut": {"children": groups}, **dict(sorted(of_instances.items()))},
        }
    }


def instance_groups(host: Host) -> list[str]:
    """The groups of an instance that is there, by its type, zone and GPU; the same as those of aws_ec2.yml."""
    if host.instance is None or host.missing:
        return []
    given = {"type": host.instance.type, "zone": host.instance.zone, "gpu": host.instance.gpu}
    return [re.sub("[^A-Za-z0-9_]", "_", f"{prefix}_{value}") for prefix, value in given.items() if value]


def _variables(host: Host, found: Reachability | None, campaign: Campaign) -> dict[str, Any]:
    values: dict[str, Any] = {"ansible_connection": host.connection}
    if host.connection == "ssh":
        values["ansible_host"] = host.address
        values["ansible_user"] = host.user
        values["ansible_port"] = host.port
        values["ansible_ssh_private_key_file"] = host.identity_file
        values["ansible_ssh_common_args"] = shlex.join(ssh_config.trust(host))
    if host.instance is not None:
        values |= _of_instance(host.instance)
    values["ansible_python_interpreter"] = (found.python if found else "") or host.python
    values["fleet_work_dir"] = work_dir(found, campaign)
    return {key: value for key, value in values.items() if value}


def _of_instance(instance: Instance) -> dict[str, str]:
    return {
        "ec2_instance_id": instance.id,
        "ec2_instance_type": instance.type,
        "ec2_region": instance.region,
        "ec2_zone": instance.zone,
        "ec2_market": instance.market,
        "ec2_gpu": instance.gpu,
        "ec2_missing": instance.cause,
    }


def work_dir(found: Reachability | None, campaign: Campaign) -> str:
    """Fleet's folder on a host, absolute once the host has been reached."""
    if found is not None and found.home and campaign.work_dir.startswith("~/"):
        return found.home.rstrip("/") + campaign.work_dir[1:]
    return campaign.work_dir


def write(session: Session, hosts: Sequence[Host], reachable: Sequence[Reachability], campaign: Campaign) -> Path:
    """Write hosts.yml, hosts.json and reachability.json; returns the path of hosts.yml."""
    session.write(session.inventory / "hosts.json", list(hosts))
    session.write(session.inventory / "reachability.json", list(reachable))
    path = session.inventory / "hosts.yml"
    text = HEADER + yaml.safe_dump(to_ansible(hosts, reachable, campaign), sort_keys=False)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


def hosts(session: Session) -> tuple[Host, ...]:
    """Every host of the session, as `fleet inventory` froze them."""
    return session.read(session.inventory / "hosts.json", tuple[Host, ...])


def known(session: Session) -> tuple[Host, ...]:
    """The same; none before the first inventory."""
    return hosts(session) if (session.inventory / "hosts.json").is_file() else ()


def gone(session: Session) -> dict[str, str]:
    """Hosts of the session that the campaign's files do not name any more, with the cause."""
    return {host.name: host.gone for host in known(session) if host.gone}


def reachability(session: Session) -> tuple[Reachability, ...]:
    """What the last probe said, one per host."""
    return session.read(session.inventory / "reachability.json", tuple[Reachability, ...])


def make(
    session: Session,
    campaign: Campaign,
    *,
    base: Path,
    source: str,
    left_out: Callable[[str], str] = lambda _: "",
    instances: Sequence[Host] = (),
) -> tuple[Reachability, ...]:
    """The inventory stage: expand the campaign's hosts, probe each, write the files; one outcome per host.

    `instances` are the hosts that EC2 knows, with those that are not there. A host that an earlier inventory of the
    session had stays, whether or not the campaign's files still name it. Hosts for which `left_out` has a cause, and
    those that are gone or finished, are not probed: what an earlier probe said of them stays in the files.
    """
    named = (*static.hosts(campaign, base=base, source=source), *instances)
    listed = (*named, *static.gone(known(session), named, campaign, source=source))
    probed = (session.inventory / "reachability.json").is_file()
    earlier = {item.host: item for item in reachability(session)} if probed else {}
    out = {
        host.name: Reachability(host=host.name, kind=host.kind, state=HostState.LEFT_OUT, cause=cause)
        for host in listed
        if (cause := host.gone or left_out(host.name) or host.finished)
    }
    found = {item.host: item for item in reach.probe_all(host for host in listed if host.name not in out)} | out
    write(session, listed, [{**found, **_kept(earlier, out)}[host.name] for host in listed], campaign)
    return tuple(found[host.name] for host in listed)


def _kept(earlier: dict[str, Reachability], out: Collection[str]) -> dict[str, Reachability]:
    return {name: item for name, item in earlier.items() if name in out}
