"""fleet results."""

from pathlib import Path

import click

from fleet import pipeline
from fleet.cli import options, output, tables
from fleet.errors import ExitCode


@click.command()
@options.session_options
@options.json_option
def command(session_id: str | None, base: Path, as_json: bool) -> ExitCode:
    """Read LoadGen's logs into one table, and write it as JSON, CSV and Parquet. Needs no host."""
    session = options.existing(base, session_id)
    with options.outing(session, session.campaign_file, quiet=as_json) as outing:
        found = pipeline.results(outing)
    if as_json:
        output.print_json(found, headline=found.headline)
    else:
        output.print_table(found.headline, *tables.results(found))
        for line in tables.cost(found):
            output.say(line)
        output.say(f"results: {session.results}/results.json, .csv, .parquet")
    return tables.results_code(found)
