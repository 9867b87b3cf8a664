"""fleet check."""

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
    """Reach every host and say whether it could run the campaign: login, Python, memory, disk, power.

    For each benchmark it says whether the host runs it, in which batches, or why it cannot, and how long all its units
    will take: at a slow machine's speed, until the session has tuned the host.

    The read-only half of `fleet provision`: nothing is changed on any host.
    """
    session, file = options.for_campaign(base, session_id, campaign_file, new=False)
    with options.outing(session, file, quiet=as_json, limit=limit, exclude=exclude) as outing:
        pipeline.inventory(outing)
        found = pipeline.look(outing)
    if as_json:
        output.print_json(found)
    else:
        output.print_hosts(found, *tables.hosts(found), tables.hosts_title(found))
        columns, rows = tables.benchmarks(found)
        if rows:
            output.print_table("What each host can run", columns, rows)
        for line in tables.warnings(found):
            output.say(line)
    return tables.hosts_code(found)
