"""fleet attach."""

from pathlib import Path

import click

from fleet import handoff, meanwhile, pipeline
from fleet.cli import bench, options, output
from fleet.errors import ExitCode, SessionError


@click.command()
@options.session_options
@options.part_options
@options.json_option
def command(
    session_id: str | None, base: Path, limit: tuple[str, ...], exclude: tuple[str, ...], as_json: bool
) -> ExitCode:
    """Go on with a session whose controller is gone: say what the hosts did meanwhile, wait for the rest, and report.

    Nothing is provisioned anew; `fleet bench --session ID` does that too.
    """
    session = options.existing(base, session_id)
    if not handoff.planned(session):
        raise SessionError(f"nothing was started in session {session.id}", hint=f"fleet bench {session.option}")
    file = Path(str(session.about().get("campaign_file") or session.campaign_file))
    quick = handoff.was_quick(session)
    with options.outing(session, file, quiet=as_json, quick=quick, limit=limit, exclude=exclude) as outing:
        outing.watch.stage("attach", "asking what happened meanwhile")
        for item in meanwhile.ask(session, outing.asked):
            output.say(f"{item.host}: {item}")
        return bench.go(outing, pipeline.GOING_ON, as_json=as_json)
