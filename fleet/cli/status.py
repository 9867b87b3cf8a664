"""fleet status."""

from pathlib import Path

import click

from fleet import handoff
from fleet.cli import options, output, tables
from fleet.errors import ExitCode


@click.command()
@options.session_options
@options.json_option
def command(session_id: str | None, base: Path, as_json: bool) -> ExitCode:
    """Where each unit of a session stands, as the controller last saw it. Asks no host."""
    session = options.existing(base, session_id)
    known = handoff.records(session)
    found = [known.get(spec.unit) or handoff.pending(spec) for spec in handoff.plan(session).units]
    if as_json:
        output.print_json(found)
    else:
        output.print_table(f"session {session.id}: {tables.units_title(found)}", *tables.units(found))
    return tables.units_code(found)
