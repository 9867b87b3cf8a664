"""inventory/aws_ec2.yml: the session's instances for who wants Ansible alone, asked of EC2 whenever Ansible starts."""

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from fleet.campaign import Campaign
from fleet.cloud import hosts, leases
from fleet.cloud_settings import CloudSettings
from fleet.inventory import ssh_config
from fleet.session import Session

HEADER = """\
# Made by `fleet inventory`. A dynamic inventory of this session's running instances, by their ids, for Ansible alone:
#   ansible-galaxy collection install amazon.aws && pip install boto3
#   ansible-inventory -i aws_ec2.yml --graph
# hosts.yml beside it needs neither, and calls hosts by fleet's names.
"""
PLUGIN = "amazon.aws.aws_ec2"


def write(session: Session, campaign: Campaign) -> Path | None:
    """Write aws_ec2.yml, whose name its plugin insists on; None for a campaign that launches nothing."""
    if campaign.cloud is None:
        return None
    path = session.inventory / "aws_ec2.yml"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(
        HEADER + yaml.safe_dump(inventory(session, campaign), sort_keys=False, width=10_000), encoding="utf-8"
    )
    partial.replace(path)
    return path


def inventory(session: Session, campaign: Campaign) -> dict[str, Any]:
    """The file's contents; groups are called as in hosts.yml. Empty for a campaign that launches nothing."""
    if campaign.cloud is None:
        return {}
    token = session.token
    entries = [region for entry in campaign.cloud.instances for region in entry.regions]
    variables = {
        "ansible_user": campaign.cloud.user,
        "ansible_ssh_private_key_file": hosts.login_key(token),
        "ansible_ssh_common_args": shlex.join(ssh_config.trust_in(*hosts.trusted(session))),
        "ansible_python_interpreter": campaign.cloud.python or "",
    }
    return {
        "plugin": PLUGIN,
        "regions": list(dict.fromkeys([*campaign.cloud.regions, *entries])),
        "filters": {f"tag:{leases.SESSION_TAG}": token, "instance-state-name": "running"},
        # All instances of a launch have the same tags: only ids tell them apart.
        "hostnames": ["instance-id"],
        "keyed_groups": [
            {"prefix": "type", "key": "instance_type"},
            {"prefix": "zone", "key": "placement.availability_zone"},
        ],
        "compose": {
            "ansible_host": _address(session, campaign.cloud),
            # Expressions, so texts stand in quotes.
            **{name: json.dumps(value) for name, value in variables.items() if value},
        },
    }


def _address(session: Session, settings: CloudSettings) -> str:
    alive = [lease for lease, _ in leases.live(leases.read(session)).values()]
    within = settings.address == "auto" and alive and not any(lease.public for lease in alive)
    if settings.address == "private" or within:
        # From within their network the group lets in private addresses alone, public ones or not.
        return "private_ip_address"
    return (
        "public_ip_address" if settings.address == "public" else "public_ip_address | default(private_ip_address, true)"
    )
