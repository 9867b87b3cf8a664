"""fleet report."""

from pathlib import Path

import click

from fleet import pipeline
from fleet.cli import options, output
from fleet.errors import ExitCode


@click.command()
@options.session_options
@options.json_option
def command(session_id: str | None, base: Path, as_json: bool) -> ExitCode:
    """Write the report, one HTML file that opens offline. Needs no host, and no network."""
    session = options.existing(base, session_id)
    with options.outing(session, session.campaign_file, quiet=as_json) as outing:
        path = pipeline.report(outing)
    if as_json:
        output.print_json({"report": str(path)})
    else:
        output.show(f"report: {path}")
    return ExitCode.OK
