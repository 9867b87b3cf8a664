"""fleet down."""

from pathlib import Path

import click

from fleet import handoff
from fleet.cli import cloud_tables, options, output
from fleet.errors import CampaignError, ExitCode
from fleet.session import Session
from fleet.subset import Subset


@click.command()
@options.session_options
@options.part_options
@click.option("--wait", "minutes", type=click.FloatRange(min=0), default=10.0, show_default=True, metavar="MINUTES",
              help="How long to try before what is not gone counts as a leak.")  # fmt: skip
@options.json_option
def command(
    *,
    session_id: str | None,
    base: Path,
    limit: tuple[str, ...],
    exclude: tuple[str, ...],
    minutes: float,
    as_json: bool,
) -> ExitCode:
    """End the session's EC2 instances, and return when EC2 says that they are terminated.

    With the last of them go the session's security groups, key pairs and volumes, and its secrets on this machine. Units
    that are not home are lost with their host: `fleet collect` first. Exit code 4, with the ids, when it is not sure that
    all are gone; the same command goes on.
    """
    from fleet.cloud import down, leases, spend

    session = options.existing(base, session_id)
    options.say_strays(session)
    with session.locked(options.typed()), output.watching(quiet=as_json) as watch:
        hosts = _hosts(session, Subset(limit=limit, exclude=exclude)) if limit or exclude else None
        there = leases.live(leases.read(session))
        for line in _lost(session, [name for name in there if hosts is None or name in hosts]):
            watch.note(line)
        ended = down.down(session, watch, hosts=hosts, bound_s=minutes * 60)
    found = [(lease, leased) for lease in leases.read(session) for leased in lease.instances if leased.id in set(ended)]
    if as_json:
        output.print_json([{"region": lease.region, "lease": lease.id, "instance": leased} for lease, leased in found])
    else:
        rows = [[leased.host or "-", leased.id, lease.region, leased.cause or "taken down"] for lease, leased in found]
        output.print_table(
            f"{len(found)} instances of session {session.id} ended", ["host", "id", "region", "cause"], rows
        )
        if cost := cloud_tables.spent(spend.write(session)):
            output.say(cost)
    return ExitCode.OK


def _hosts(session: Session, subset: Subset) -> set[str]:
    from fleet.cloud import leases

    named = list(dict.fromkeys(host for lease in leases.read(session) for host in lease.hosts))
    if not named:
        raise CampaignError(f"session {session.id} has launched no instance", hint="fleet up")
    subset.check(named)
    return {name for name in named if not subset.left_out(name)}


def _lost(session: Session, hosts: list[str]) -> list[str]:
    """What goes with the instances."""
    if not handoff.planned(session):
        return []
    units = [spec for spec in handoff.plan(session).units if spec.host in hosts]
    missing = handoff.missing(units, handoff.records(session), handoff.collected(session))
    return [f"{len(missing)} units of these hosts are not home, and go with them"] if missing else []
