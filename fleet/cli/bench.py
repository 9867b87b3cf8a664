"""fleet bench."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from fleet import handoff, instances, pipeline
from fleet.cli import options, output, tables
from fleet.errors import ExitCode, LeakError, SubmissionError
from fleet.pipeline import Outing


@click.command()
@options.campaign_option
@options.session_options
@options.new_option
@options.quick_option
@options.part_options
@options.json_option
def command(
    *,
    campaign_file: Path,
    session_id: str | None,
    base: Path,
    new: bool,
    quick: bool,
    limit: tuple[str, ...],
    exclude: tuple[str, ...],
    as_json: bool,
) -> ExitCode:
    """The whole job, from fleet.yml to a submission and a report: every stage, in order.

    A host that cannot be reached or made ready is named with its cause, and holds nobody else up. If this command is
    stopped, the same command goes on: what is done is not done again. When nothing is missing, it begins anew.
    """
    found = None if new or session_id else options.to_go_on_with(base, campaign_file, quick=quick)
    session, file = found or options.for_campaign(base, session_id, campaign_file, new=True)
    quick = quick or handoff.was_quick(session)
    with options.outing(session, file, quiet=as_json, quick=quick, limit=limit, exclude=exclude) as outing:
        return go(outing, pipeline.STAGES, as_json=as_json)


def go(outing: Outing, stages: Mapping[str, Callable[[Outing], Any]], *, as_json: bool) -> ExitCode:
    """Go through `stages`, which end with a report, and say what came of it.

    Raises LeakError at the end when an instance may still run.
    """
    found, owed = _through(outing, stages)
    results = found["results"]
    if as_json:
        output.print_json(results, headline=results.headline)
    else:
        output.print_table(results.headline, *tables.results(results))
        for line in tables.cost(results):
            output.say(line)
        for line in tables.warnings(handoff.readiness(outing.session)):
            output.say(line)
    codes = [tables.results_code(results)]
    refused = next((error for error in owed if isinstance(error, SubmissionError)), None)
    if refused:
        output.say(f"submission: none. {refused.message}")
        codes.append(ExitCode.INVALID)
    else:
        output.say(f"submission: {found['submission'].root}")
    output.say(f"report:     {found['report']}")
    for error in owed:
        if isinstance(error, LeakError):
            raise error
    return ExitCode.worst(codes)


def _through(
    outing: Outing, stages: Mapping[str, Callable[[Outing], Any]]
) -> tuple[dict[str, Any], list[SubmissionError | LeakError]]:
    """What each stage found, and what does not stop the others: the report says what happened, and is owed all the same."""
    found: dict[str, Any] = {}
    owed: list[SubmissionError | LeakError] = []
    for name, stage in stages.items():
        try:
            found[name] = stage(outing)
        except SubmissionError as error:
            owed.append(error)
        except Exception as error:
            if name == "down" and isinstance(error, LeakError):
                owed.append(error)
                continue
            # Nobody goes on with it now, and instances cost.
            if instances.may_run(outing.session):
                output.say(f"stopped by: {error}")
                pipeline.down(outing)
            raise
    return found, owed
