"""fleet run."""

from pathlib import Path

import click

from fleet import handoff, pipeline
from fleet.cli import options, output, tables
from fleet.errors import ExitCode


@click.command()
@options.campaign_option
@options.session_options
@options.quick_option
@options.part_options
@options.json_option
def command(
    *,
    campaign_file: Path,
    session_id: str | None,
    base: Path,
    quick: bool,
    limit: tuple[str, ...],
    exclude: tuple[str, ...],
    as_json: bool,
) -> ExitCode:
    """Run LoadGen on every host that is ready, and wait for the last unit.

    Units run detached on their hosts: if this command dies, run it again and it goes on. Units that are done
    and verified are not run again; why another one is, is said.
    """
    session, file = options.for_campaign(base, session_id, campaign_file, new=False, create=False)
    quick = quick or handoff.was_quick(session)
    with options.outing(session, file, quiet=as_json, quick=quick, limit=limit, exclude=exclude) as outing:
        found = pipeline.measure(outing)
    if as_json:
        output.print_json(found)
    else:
        output.print_table(tables.units_title(found), *tables.units(found))
        for line in tables.warnings(handoff.readiness(session)):
            output.say(line)
    return tables.units_code(found)
