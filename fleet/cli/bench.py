"""fleet bench."""

from pathlib import Path
from typing import Any

import click

from fleet import handoff, pipeline
from fleet.cli import options, output, tables
from fleet.errors import ExitCode, SubmissionError


@click.command()
@options.campaign_option
@options.session_options
@options.quick_option
@options.json_option
def command(campaign_file: Path, session_id: str | None, base: Path, quick: bool, as_json: bool) -> ExitCode:
    """The whole job, from fleet.yml to a submission and a report: every stage, in order.

    A host that cannot be reached or made ready is named with its cause, and holds nobody else up. If this
    command is stopped, `fleet bench --session ID` goes on: what is done is not done again.
    """
    session, file = options.for_campaign(base, session_id, campaign_file, new=True)
    found: dict[str, Any] = {}
    refused = ""
    with options.outing(session, file, quiet=as_json, quick=quick or handoff.was_quick(session)) as outing:
        for name, stage in pipeline.STAGES.items():
            try:
                found[name] = stage(outing)
            except SubmissionError as error:
                # The report is owed all the same: it says what happened.
                refused = error.message
    results = found["results"]
    if as_json:
        output.print_json(results)
    else:
        output.print_table(results.headline, *tables.results(results))
    if refused:
        output.say(f"submission: none. {refused}")
    else:
        output.say(f"submission: {found['submission'].root}")
    output.say(f"report:     {found['report']}")
    codes = [tables.results_code(results)]
    if refused:
        codes.append(ExitCode.INVALID)
    return ExitCode.worst(codes)
