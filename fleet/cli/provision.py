"""fleet provision."""

from pathlib import Path

import click

from fleet import pipeline
from fleet.cli import options, output, tables
from fleet.errors import ExitCode


@click.command()
@options.campaign_option
@options.session_options
@options.json_option
def command(campaign_file: Path, session_id: str | None, base: Path, as_json: bool) -> ExitCode:
    """Make hosts ready: Python environment, harness, weights and data, and a description of the system.

    Works as an ordinary user. A host that is ready already is left alone: changed is 0.
    """
    session, file = options.for_campaign(base, session_id, campaign_file, new=False)
    with options.outing(session, file, quiet=as_json) as outing:
        pipeline.inventory(outing)
        found = pipeline.make_ready(outing)
    if as_json:
        output.print_json(found)
    else:
        columns, rows = tables.hosts(found)
        changed = [str(item.changed) for item in found]
        output.print_table(
            tables.hosts_title(found), ["host", "state", "changed", *columns[2:]],
            [[*row[:2], count, *row[2:]] for row, count in zip(rows, changed, strict=True)],
        )  # fmt: skip
    return tables.hosts_code(found)
