"""fleet report."""

from pathlib import Path

import click

from fleet import pipeline
from fleet.cli import options, output, tables
from fleet.errors import ExitCode


@click.command()
@options.session_options
@options.json_option
def command(session_id: str | None, base: Path, as_json: bool) -> ExitCode:
    """Write the report, one HTML file that opens offline. Needs no host, and no network."""
    session = options.existing(base, session_id)
    with options.outing(session, session.campaign_file, quiet=as_json) as outing:
        path = pipeline.report(outing)
        found = pipeline.read_results(outing)
    if as_json:
        output.print_json({"headline": found.headline, "report": str(path)})
    else:
        output.say(found.headline)
        output.show(f"report: {path}")
    return tables.results_code(found)
