"""fleet cancel."""

from pathlib import Path

import click

from fleet import cancel
from fleet.cli import options, output
from fleet.errors import ExitCode


@click.command()
@click.argument("names", nargs=-1, metavar="[HOST|UNIT]...")
@options.session_options
@options.json_option
def command(names: tuple[str, ...], session_id: str | None, base: Path, as_json: bool) -> ExitCode:
    """Stop units, queued or running, with all their processes: of these hosts, these units alone, or all of a session.

    HOST may be a range or a pattern. A controller that is at work does not start them again; `fleet bench` would.
    What had ended keeps its result.
    """
    session = options.existing(base, session_id)
    found = cancel.cancel(session, names)
    if as_json:
        output.print_json(found)
    else:
        stopped = sum(item.stopped for item in found)
        rows = [[item.unit, str(item.state), item.cause] for item in found]
        output.print_table(f"{stopped} of {len(found)} units stopped", ["unit", "state", "cause"], rows)
    return ExitCode.OK if all(item.stopped for item in found) else ExitCode.MISSING
