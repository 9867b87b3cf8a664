"""aws_ec2.yml, held to what the plugin documents."""

import shlex
from pathlib import Path
from typing import Any

import yaml

from fleet.cloud import dynamic, keys
from fleet.inventory import files
from fleet.inventory.hosts import Host, Instance
from fleet.terms import HostKind
from tests.unit.cloud import ledger

DOCUMENTED = {
    "plugin", "access_key", "allow_duplicated_hosts", "assume_role_arn", "cache", "cache_connection", "cache_plugin",
    "cache_prefix", "cache_timeout", "compose", "endpoint_url", "exclude_filters", "filters", "groups", "hostnames",
    "hostvars_prefix", "hostvars_suffix", "include_filters", "keyed_groups", "leading_separator", "profile", "region",
    "regions", "route53_enabled", "route53_excluded_zones", "route53_hostnames", "secret_key", "session_token",
    "strict", "strict_permissions", "use_contrib_script_compatible_ec2_tag_keys",
    "use_contrib_script_compatible_sanitization", "use_extra_vars", "use_ssm_inventory",
}  # fmt: skip
"""Options of amazon.aws 10.1.2, as `ansible-doc -t inventory amazon.aws.aws_ec2` lists them."""
KEYED = {"default_value", "key", "parent_group", "prefix", "separator", "trailing_separator"}


def written(folder: Path, text: str = ledger.CAMPAIGN) -> dict[str, Any]:
    session, campaign = ledger.session(folder, text)
    path = dynamic.write(session, campaign)
    assert path == session.inventory / "aws_ec2.yml"
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def test_only_documented_keys_are_used(tmp_path: Path) -> None:
    found = written(tmp_path)
    assert set(found) <= DOCUMENTED
    assert found["plugin"] == "amazon.aws.aws_ec2"
    assert all(set(group) <= KEYED for group in found["keyed_groups"])


def test_it_asks_for_running_instances_of_this_session_in_all_its_regions(tmp_path: Path) -> None:
    text = ledger.CAMPAIGN.replace("types: [g6.12xlarge]", "types: [g6.12xlarge], regions: [eu-west-1, us-east-1]")
    found = written(tmp_path, text)
    assert found["regions"] == ["us-east-1", "eu-west-1"]
    (token,) = [value for key, value in found["filters"].items() if key == "tag:mlperf-fleet:session"]
    assert token.startswith("s1-")
    assert found["filters"]["instance-state-name"] == "running"


def test_ssh_is_told_what_fleet_itself_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "with a space"
    compose = written(folder)["compose"]
    (alias,) = [path.name for path in folder.iterdir() if path.name == "s1"]
    assert alias == "s1"
    arguments = shlex.split(yaml.safe_load(compose["ansible_ssh_common_args"]))
    assert f'UserKnownHostsFile="{folder}/s1/cloud/known_hosts"' in arguments
    assert {"GlobalKnownHostsFile=/dev/null", "StrictHostKeyChecking=yes", "IdentitiesOnly=yes"} <= set(arguments)
    assert yaml.safe_load(compose["ansible_user"]) == "ubuntu"
    assert Path(yaml.safe_load(compose["ansible_ssh_private_key_file"])).is_relative_to(keys.root())


def test_groups_are_called_as_in_hosts_yml(tmp_path: Path) -> None:
    prefixes = [group["prefix"] for group in written(tmp_path)["keyed_groups"]]
    host = Host(
        name="g5-1",
        kind=HostKind.EC2,
        connection="ssh",
        address="10.0.0.1",
        instance=Instance(id="i-1", lease="l", type="g5.xlarge", zone="us-east-1a", gpu="a10g"),
    )
    assert files.instance_groups(host) == ["type_g5_xlarge", "zone_us_east_1a", "gpu_a10g"]
    assert prefixes == ["type", "zone"]


def test_a_campaign_without_instances_has_no_such_file(tmp_path: Path) -> None:
    text = ledger.CAMPAIGN.partition("cloud:")[0] + "hosts: [{name: h01, kind: server}]\n"
    session, campaign = ledger.session(tmp_path, text)
    assert dynamic.write(session, campaign) is None
    assert not session.inventory.exists()


def test_from_within_their_network_instances_are_reached_where_the_group_lets_in(tmp_path: Path) -> None:
    session, campaign = ledger.session(tmp_path)
    ledger.write(session, ledger.lease(1, "g5-1", public=False))
    assert dynamic.inventory(session, campaign)["compose"]["ansible_host"] == "private_ip_address"
    ledger.write(session, ledger.lease(1, "g5-1", public=True))
    assert dynamic.inventory(session, campaign)["compose"]["ansible_host"].startswith("public_ip_address | default(")
