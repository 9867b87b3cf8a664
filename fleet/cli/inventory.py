"""fleet inventory."""

import re
from pathlib import Path

import click

from fleet import pipeline
from fleet.cli import options, output, tables
from fleet.cloud_settings import REGION
from fleet.errors import CampaignError, ExitCode


@click.command()
@options.campaign_option
@options.session_options
@click.option(
    "--from-ec2",
    "tags",
    multiple=True,
    metavar="KEY=VALUE",
    help="Take in running instances that have this tag, and every other that is given, launched by whomever.",
)
@click.option("--region", "regions", multiple=True, help="Where to look for them (default: cloud.regions, else yours).")
@options.part_options
@options.json_option
def command(
    *,
    campaign_file: Path,
    session_id: str | None,
    base: Path,
    tags: tuple[str, ...],
    regions: tuple[str, ...],
    limit: tuple[str, ...],
    exclude: tuple[str, ...],
    as_json: bool,
) -> ExitCode:
    """Reach every host of the campaign and write sessions/<id>/inventory/hosts.yml, plain Ansible.

    Host keys are checked: an unknown one is shown with its fingerprint and the command that accepts it.

    With --from-ec2 the session has those instances as hosts from then on: fleet bench --session ID measures them too. To
    have them in every session, write them into fleet.yml as ec2_tag.
    """
    wanted = _tags(tags, regions)
    session, file = options.for_campaign(base, session_id, campaign_file, new=False)
    if wanted:
        from fleet.cloud import tagged

        tagged.remember(session, tagged.Source(tags=wanted, regions=regions))
    with options.outing(session, file, quiet=as_json, limit=limit, exclude=exclude) as outing:
        found = pipeline.inventory(outing)
    if as_json:
        output.print_json(found)
    else:
        output.print_hosts(found, *tables.hosts(found), tables.hosts_title(found))
        output.say(f"inventory: {session.inventory / 'hosts.yml'}")
    return tables.hosts_code(found)


def _tags(given: tuple[str, ...], regions: tuple[str, ...]) -> dict[str, str]:
    """The tags that were typed."""
    found: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals) or key in found:
            raise CampaignError(f"--from-ec2 {text}: not KEY=VALUE, or given twice", hint="--from-ec2 Project=bench")
        found[key] = value
    if wrong := [name for name in regions if not re.fullmatch(REGION, name)]:
        raise CampaignError(f"--region {wrong[0]}: no region's name", hint="as in us-east-1")
    if regions and not found:
        raise CampaignError("--region: only with --from-ec2", hint="--from-ec2 KEY=VALUE")
    return found
