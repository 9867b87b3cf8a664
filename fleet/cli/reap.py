"""fleet reap."""

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fleet import session as sessions
from fleet.cli import output
from fleet.cli.options import json_option
from fleet.errors import ExitCode
from fleet.session import Session

if TYPE_CHECKING:
    from fleet.cloud.reap import Expired, Finding, Whose


@click.command()
@click.option("--yes", is_flag=True, help="End what is listed; without it nothing is changed.")
@click.option("--session", "session_id", default="", help="Only what this session launched.")
@click.option("--region", "regions", multiple=True, help="Only this region (default: all); may be repeated.")
@click.option("--owner", "owners", multiple=True, help="End what this owner launched, not yours; may be repeated.")
@click.option("--all-owners", is_flag=True, help="End what anybody launched with fleet.")
@click.option("--sessions", "base", type=click.Path(path_type=Path, file_okay=False), default=Path("sessions"),
              show_default=True, envvar="FLEET_SESSIONS", help="Folder that holds the sessions: for prices.")  # fmt: skip
@json_option
def command(
    *,
    yes: bool,
    session_id: str,
    regions: tuple[str, ...],
    owners: tuple[str, ...],
    all_owners: bool,
    base: Path,
    as_json: bool,
) -> ExitCode:
    """List what fleet launched in this AWS account and what outlived its lease, in all regions; --yes ends it.

    Tags alone decide, so that it works from any machine. Instances go first, then security groups, key pairs and
    volumes of sessions that have no instance left. Nothing without fleet's tags is touched, and nothing whose expiry
    cannot be read. Exit code 4 while an expired instance still runs.
    """
    from fleet.cloud import reap

    if all_owners and owners:
        raise click.UsageError("--owner and --all-owners are two answers to one question")
    whose = _whose(session_id, owners, everybody=all_owners)
    here = _here(base)
    found = reap.find(whose, regions=regions, here=here)
    if as_json and not yes:
        output.print_json(found)
    elif not as_json:
        output.print_table(_title(found, yes=yes), ["id", "what", "region", "session", "owner", "expired since",
                                                    "usd/h", "to be done"], [_row(item) for item in found.items])  # fmt: skip
    for region, cause in found.unasked.items():
        output.say(f"{region}: could not be asked: {cause}")
    unasked = ExitCode.ERROR if found.unasked else ExitCode.OK
    if not yes:
        if any(not item.kept for item in found.items):
            output.say("nothing was ended: fleet reap --yes does, with the same options")
        return ExitCode.worst([unasked, ExitCode.LEAK if found.instances else ExitCode.OK])
    with output.watching(quiet=as_json) as watch:
        ended = reap.reap(found, watch, here=here)
    if as_json:
        output.print_json({"found": found, "ended": ended})
    elif ended:
        output.say(f"ended: {', '.join(ended)}")
    return unasked


def _whose(session_id: str, owners: tuple[str, ...], *, everybody: bool) -> "Whose":
    from fleet.cloud import reap

    if everybody or owners:
        return reap.Whose(session=session_id, owners=None if everybody else frozenset(owners))
    return reap.own(session_id)


def _here(base: Path) -> list[Session]:
    """Sessions of this machine: those of the folder, and those whose secrets are here."""
    from fleet.cloud import keys

    found = {session.root.resolve(): session for session in sessions.listed(base)}
    for _, root in keys.known():
        if (root / "session.json").is_file():
            found.setdefault(root.resolve(), Session(root))
    return list(found.values())


def _title(found: "Finding", *, yes: bool) -> str:
    todo = sum(not item.kept for item in found.items)
    doing = "to be ended" if yes else "would be ended"
    return f"{len(found.instances)} expired instances {doing}, {todo} things in all, in {_count(found.regions)}"


def _count(regions: Iterable[str]) -> str:
    named = list(regions)
    return named[0] if len(named) == 1 else f"{len(named)} regions"


def _row(item: "Expired") -> list[str]:
    since = item.expires
    if item.expires_at is not None:
        since = datetime.fromtimestamp(item.expires_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    price = "-" if item.usd_per_hour is None else f"{item.usd_per_hour:.4g}"
    what = item.type or item.kind
    return [item.id, what, item.region, item.session, item.owner or "-", since or "-", price, item.kept or "end"]
