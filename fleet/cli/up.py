"""fleet up."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from fleet import campaign as campaigns
from fleet.campaign import Campaign
from fleet.cli import cloud_tables, options, output
from fleet.cloud_settings import CloudSettings
from fleet.errors import CampaignError, ExitCode, LeakError
from fleet.session import Session
from fleet.subset import Subset
from fleet.watch import Watch


@click.command()
@options.campaign_option
@options.session_options
@options.quick_option
@options.part_options
@click.option("--dry-run", is_flag=True, help="Print what would be launched and the most it can cost; launch nothing.")
@options.json_option
def command(
    *,
    campaign_file: Path,
    session_id: str | None,
    base: Path,
    quick: bool,
    limit: tuple[str, ...],
    exclude: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> ExitCode:
    """Launch the EC2 instances of the campaign (`cloud.instances` in fleet.yml) and wait until they run.

    Each ends itself when its lease does; `fleet down` ends it before. Hosts that have an instance keep it. Nothing is
    launched that could cost more than `cloud.max_cost`, and what cannot be had whole is taken back, unless
    `cloud.partial` is true.
    """
    subset = Subset(limit=limit, exclude=exclude)
    if not session_id:
        # Before there is a session: a campaign without instances needs none, and neither does a name that nobody has.
        subset.check(_settings(campaigns.load(campaign_file), campaign_file).names())
    session, file = options.for_campaign(base, session_id, campaign_file, new=False)
    campaign = campaigns.load(session.campaign_file)
    hosts = _hosts(session, campaign, file, subset)
    with _held(session, quiet=as_json) as watch:
        if dry_run:
            return _plan(session, campaign, hosts, quick=quick, as_json=as_json)
        return _launch(session, campaign, watch, hosts, quick=quick, as_json=as_json)


def _settings(campaign: Campaign, file: Path) -> CloudSettings:
    if campaign.cloud is None:
        raise CampaignError(f"{file}: nothing to launch, it has no `cloud:` section", hint="docs/cloud.md shows one")
    return campaign.cloud


def _hosts(session: Session, campaign: Campaign, file: Path, subset: Subset) -> list[str]:
    """Hosts of `cloud.instances` that are asked for and have something left to do."""
    from fleet.cloud import hosts

    named = _settings(campaign, file).names()
    subset.check(named)
    done = hosts.finished(session)
    if idle := [name for name in named if name in done and not subset.left_out(name)]:
        output.say(f"no instance for {len(idle)} of {len(named)}: their units are done and home")
    return [name for name in named if name not in done and not subset.left_out(name)]


@contextmanager
def _held(session: Session, *, quiet: bool) -> Iterator[Watch]:
    """The session locked and progress shown.

    Raises LeakError with the ids when somebody interrupts while instances may be running.
    """
    from fleet.cloud import down, up

    options.say_strays(session)
    with session.locked(options.typed()), output.watching(quiet=quiet) as watch:
        try:
            yield watch
        except KeyboardInterrupt as error:
            if not (left := up.may_run(session)):
                raise
            text = f"interrupted; these may be running, until their leases end: {', '.join(left)}"
            raise LeakError(text, hint=down.command(session)) from error


def _plan(session: Session, campaign: Campaign, hosts: Sequence[str], *, quick: bool, as_json: bool) -> ExitCode:
    from fleet.cloud import leases, plan

    there = leases.live(leases.read(session))
    found = plan.make(session, campaign, [name for name in hosts if name not in there], quick=quick)
    if as_json:
        output.print_json(found)
    else:
        output.print_table(cloud_tables.plan_title(found), *cloud_tables.plan(found))
        for line in cloud_tables.plan_lines(found):
            output.say(line)
        if found.refusal:
            output.say(f"refused: {found.refusal}")
            output.say(f"next:  {found.hint}")
    return cloud_tables.plan_code(found)


def _launch(
    session: Session, campaign: Campaign, watch: Watch, hosts: Sequence[str], *, quick: bool, as_json: bool
) -> ExitCode:
    from fleet.cloud import leases, up

    causes = up.up(session, campaign, watch, hosts=hosts, quick=quick)
    there = leases.live(leases.read(session))
    found = {name: there[name] for name in hosts if name in there}
    if as_json:
        output.print_json({"instances": {name: pair[1] for name, pair in found.items()}, "causes": causes})
    else:
        output.print_table(cloud_tables.up_title(found, causes), *cloud_tables.up(found, causes))
    return ExitCode.MISSING if causes else ExitCode.OK
