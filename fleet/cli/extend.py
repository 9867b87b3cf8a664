"""fleet extend."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import click

from fleet import campaign as campaigns
from fleet.cli import options, output
from fleet.errors import CampaignError, ExitCode
from fleet.session import Session
from fleet.subset import Subset


@click.command()
@click.option("--hours", type=click.FloatRange(min=0.01, max=168), help="So many hours later than now planned.")
@click.option(
    "--until", metavar="TIME", help="Until then, in UTC, as 2026-11-25T18:00:00Z; never earlier than planned."
)
@click.option("--max-cost", type=click.FloatRange(min=0), metavar="USD",
              help="What the session may cost in all, instead of the campaign's max_cost.")  # fmt: skip
@options.session_options
@options.part_options
@options.json_option
def command(
    *,
    hours: float | None,
    until: str | None,
    max_cost: float | None,
    session_id: str | None,
    base: Path,
    limit: tuple[str, ...],
    exclude: tuple[str, ...],
    as_json: bool,
) -> ExitCode:
    """Let the session's EC2 instances live longer: their lease, their tags, and the timer on each of them.

    May be used while `fleet bench` is at work. An instance that cannot be told keeps its earlier end, and is named with
    exit code 3. Nothing is moved when the session could then cost more than `cloud.max_cost`.
    """
    from fleet.cloud import extend

    later = _later(hours, until)
    session = options.existing(base, session_id)
    options.say_strays(session)
    campaign = campaigns.load(session.campaign_file)
    only = _only(session, Subset(limit=limit, exclude=exclude)) if limit or exclude else None
    with output.watching(quiet=as_json) as watch:
        found = extend.extend(session, campaign, watch, later, only=only, max_cost=max_cost)
    if as_json:
        output.print_json(found)
    else:
        moved = sum(not item.cause for item in found)
        rows = [[item.host, item.id, item.region, extend.text(item.expires_at), item.cause] for item in found]
        columns = ["host", "id", "region", "ends at", "cause"]
        output.print_hosts(found, columns, rows, f"{moved} of {len(found)} instances live longer")
    return ExitCode.OK if all(not item.cause for item in found) else ExitCode.MISSING


def _later(hours: float | None, until: str | None) -> Callable[[float], float]:
    if hours is not None and until is None:
        return lambda at: at + hours * 3600
    if until is None or hours is not None:
        raise click.UsageError("give --hours or --until")
    try:
        read = datetime.fromisoformat(until)
    except ValueError as error:
        raise CampaignError(f"--until {until}: no time", hint="as in 2026-11-25T18:00:00Z") from error
    end = (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()
    if end < datetime.now(UTC).timestamp():
        raise CampaignError(f"--until {until}: that has been", hint="fleet down ends instances now")
    return lambda _: end


def _only(session: Session, subset: Subset) -> set[str]:
    from fleet.cloud import leases

    named = list(leases.live(leases.read(session)))
    subset.check(named)
    return {name for name in named if not subset.left_out(name)}
