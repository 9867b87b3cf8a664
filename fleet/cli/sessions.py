"""fleet sessions."""

from pathlib import Path

import click

from fleet import handoff
from fleet import session as sessions
from fleet.cli import options, output
from fleet.errors import ExitCode, SessionError
from fleet.terms import UnitState


@click.command()
@click.option("--sessions", "base", type=click.Path(path_type=Path, file_okay=False), default=Path("sessions"),
              show_default=True, envvar="FLEET_SESSIONS", help="Folder that holds the sessions.")  # fmt: skip
@options.json_option
def command(base: Path, as_json: bool) -> ExitCode:
    """List sessions, the newest first."""
    rows = []
    for session in sessions.listed(base):
        try:
            created, known = str(session.about()["created_at"]), handoff.records(session)
            planned = len(handoff.plan(session).units) if handoff.planned(session) else 0
        except (SessionError, KeyError) as error:
            rows.append([session.id, "", f"unreadable: {error}"])
            continue
        done = sum(record.state is UnitState.DONE for record in known.values())
        rows.append([session.id, created, f"{done} of {planned} units done"])
    if as_json:
        output.print_json([dict(zip(("session", "created_at", "units"), row, strict=True)) for row in rows])
    else:
        output.print_table(f"{len(rows)} sessions in {base}", ["session", "created", "units"], rows)
    return ExitCode.OK
