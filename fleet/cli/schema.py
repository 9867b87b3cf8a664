"""fleet schema."""

import click

from fleet import campaign
from fleet.cli import output
from fleet.errors import ExitCode


@click.command()
def command() -> ExitCode:
    """Print the JSON Schema of fleet.yml, for your editor."""
    output.print_json(campaign.schema())
    return ExitCode.OK
