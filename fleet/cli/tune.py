"""fleet tune."""

from pathlib import Path

import click

from fleet import handoff, pipeline
from fleet.cli import options, output
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
    """Find target_qps and target_latency of each host and scenario by short probes, at most 3 minutes each.

    The values are kept in the session and used by `fleet run`; what fleet.yml gives is never tuned. Of hosts with the
    same hardware and software one goes first, and the others begin where it ended. Probes are never submitted.
    """
    session, file = options.for_campaign(base, session_id, campaign_file, new=False, create=False)
    quick = quick or handoff.was_quick(session)
    with options.outing(session, file, quiet=as_json, quick=quick, limit=limit, exclude=exclude) as outing:
        found = pipeline.tune_targets(outing)
    if as_json:
        output.print_json(found)
        return ExitCode.MISSING if any(item.causes for item in found) else ExitCode.OK
    rows = []
    for item in found:
        for benchmark, scenarios in item.values.items():
            for scenario, values in scenarios.items():
                text = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
                rows.append([item.host, benchmark, str(scenario), text])
        rows += [[item.host, unit.removeprefix(f"{item.host}."), "-", cause] for unit, cause in item.causes.items()]
    tuned = sum(not item.causes for item in found)
    output.print_table(f"{tuned} of {len(found)} hosts tuned", ["host", "benchmark", "scenario", "value"], rows)
    return ExitCode.MISSING if tuned < len(found) else ExitCode.OK
