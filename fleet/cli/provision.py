"""fleet provision."""

from pathlib import Path

import click

from fleet import pipeline
from fleet.cli import options, output, tables
from fleet.errors import ExitCode
from fleet.handoff import Readiness


@click.command()
@options.campaign_option
@options.session_options
@options.part_options
@options.json_option
def command(
    *,
    campaign_file: Path,
    session_id: str | None,
    base: Path,
    limit: tuple[str, ...],
    exclude: tuple[str, ...],
    as_json: bool,
) -> ExitCode:
    """Make hosts ready: Python environment, harness, weights and data, and a description of the system.

    Works as an ordinary user. A host that is ready already is left alone: changed is 0.
    """
    session, file = options.for_campaign(base, session_id, campaign_file, new=False)
    with options.outing(session, file, quiet=as_json, limit=limit, exclude=exclude) as outing:
        pipeline.inventory(outing)
        found = pipeline.make_ready(outing)
    if as_json:
        output.print_json(found)
    else:
        rows = [[item.host, str(item.state), str(item.changed), item.cause or _missing(item)] for item in found]
        output.print_hosts(found, ["host", "state", "changed", "cause"], rows, tables.hosts_title(found))
    return tables.hosts_code(found)


def _missing(item: Readiness) -> str:
    """What a host that is ready cannot run all the same."""
    return "; ".join(f"cannot run {name}: {why}" for name, why in item.cannot.items())
