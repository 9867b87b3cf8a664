"""fleet inventory."""

from pathlib import Path

import click

from fleet import pipeline
from fleet.cli import options, output, tables
from fleet.errors import ExitCode


@click.command()
@options.campaign_option
@options.session_options
@options.part_options
@options.json_option
def command(
    *,
    campaign_file: Path,
    session_id: str | None,
    base: Path,
    limit: tuple[str, ...],
    exclude: tuple[str, ...],
    as_json: bool,
) -> ExitCode:
    """Reach every host of the campaign and write sessions/<id>/inventory/hosts.yml, plain Ansible.

    Host keys are checked: an unknown one is shown with its fingerprint and the command that accepts it.
    """
    session, file = options.for_campaign(base, session_id, campaign_file, new=False)
    with options.outing(session, file, quiet=as_json, limit=limit, exclude=exclude) as outing:
        found = pipeline.inventory(outing)
    if as_json:
        output.print_json(found)
    else:
        output.print_hosts(found, *tables.hosts(found), tables.hosts_title(found))
        output.say(f"inventory: {session.inventory / 'hosts.yml'}")
    return tables.hosts_code(found)
