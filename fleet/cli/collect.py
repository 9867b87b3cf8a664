"""fleet collect."""

from pathlib import Path

import click

from fleet import pipeline
from fleet.cli import options, output
from fleet.errors import ExitCode


@click.command()
@options.session_options
@options.part_options
@options.json_option
def command(
    session_id: str | None,
    base: Path,
    limit: tuple[str, ...],
    exclude: tuple[str, ...],
    as_json: bool,
) -> ExitCode:
    """Bring the files of finished units home and hold each to its manifest.

    Repeat it for a host that was away: what is home and verified is not fetched again.
    """
    session = options.existing(base, session_id)
    with options.outing(session, session.campaign_file, quiet=as_json, limit=limit, exclude=exclude) as outing:
        found = pipeline.bring_home(outing)
    complete = sum(item.complete for item in found.values())
    if as_json:
        output.print_json(found)
    else:
        rows = [[unit, "verified" if item.complete else "missing", item.cause] for unit, item in sorted(found.items())]
        output.print_table(f"{complete} of {len(found)} units home and verified", ["unit", "state", "cause"], rows)
    return ExitCode.OK if complete == len(found) else ExitCode.MISSING
