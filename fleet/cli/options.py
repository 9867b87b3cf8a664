"""Options that several verbs share, and how they find the session and the campaign."""

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from fleet import campaign as campaigns
from fleet import cancel, handoff, instances
from fleet import session as sessions
from fleet.campaign import Campaign
from fleet.cli import output
from fleet.errors import Interrupted, SessionError
from fleet.inventory import files, static
from fleet.inventory.hosts import Host
from fleet.pipeline import Outing
from fleet.session import Session
from fleet.subset import Subset
from fleet.watch import Watch

F = TypeVar("F", bound=Callable[..., Any])


def campaign_option(function: F) -> F:
    """-f/--file fleet.yml."""
    return click.option(
        "-f", "--file", "campaign_file", type=click.Path(path_type=Path), default=Path("fleet.yml"), show_default=True,
        envvar="FLEET_FILE", help="The campaign.",
    )(function)  # fmt: skip


def session_options(function: F) -> F:
    """--session and --sessions."""
    function = click.option("--session", "session_id", help="Session to work in (default: the newest that fits).")(
        function
    )
    return click.option(
        "--sessions", "base", type=click.Path(path_type=Path, file_okay=False), default=Path(sessions.SESSIONS),
        show_default=True, envvar="FLEET_SESSIONS", help="Folder that holds the sessions.",
    )(function)  # fmt: skip


def json_option(function: F) -> F:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print the data as JSON.")(function)


def quick_option(function: F) -> F:
    """--quick."""
    return click.option(
        "--quick", is_flag=True, help="Seconds instead of ten minutes a unit: to try things out, not submittable."
    )(function)


def new_option(function: F) -> F:
    """--new."""
    return click.option("--new", is_flag=True, help="Begin a new session, even if the last one is not finished.")(
        function
    )


def part_options(function: F) -> F:
    """--limit and --exclude."""
    text = "Host, range such as gpu[01-04], or pattern such as 'gpu*'; may be repeated."
    function = click.option("--exclude", "exclude", multiple=True, metavar="PATTERN", help="Not these. " + text)(
        function
    )
    return click.option("--limit", "limit", multiple=True, metavar="PATTERN", help="Only these. " + text)(function)


def existing(base: Path, session_id: str | None) -> Session:
    """The named session, or the newest.

    Raises SessionError when there is none.
    """
    if session_id:
        if not re.fullmatch(sessions.NAME, session_id):
            raise SessionError(f"{session_id!r} is no session name", hint="fleet sessions")
        session = Session(base / session_id)
        session.about()
        return session
    newest = sessions.latest(base)
    if newest is None:
        raise SessionError(f"no session in {base}", hint="fleet bench")
    return newest


def for_campaign(
    base: Path, session_id: str | None, file: Path, *, new: bool, create: bool = True
) -> tuple[Session, Path]:
    """The session to work in, and the campaign file it goes with.

    A named session keeps the campaign it was made with. Without a name: a new one when `new`, else the newest when it
    was made from this very campaign, else a new one, or SessionError where `create` is off.
    """
    if session_id and (base / session_id).is_dir():
        session = existing(base, session_id)
        return session, Path(str(session.about().get("campaign_file") or session.campaign_file))
    text = _checked(file)
    newest = None if new or session_id else sessions.latest(base)
    if newest is not None and newest.campaign_file.read_text(encoding="utf-8") == text:
        return newest, file
    if not create:
        raise SessionError(f"no session of {file} as it is now", hint="fleet provision")
    made = sessions.create(base, text, name=session_id, campaign_file=file)
    output.say(f"session {made.id} in {made.root}")
    return made, file


def to_go_on_with(base: Path, file: Path, *, quick: bool) -> tuple[Session, Path] | None:
    """The newest session of this very campaign, as quick as is asked for, when units of it are missing."""
    text = _checked(file)
    for session in sessions.listed(base):
        if session.campaign_file.read_text(encoding="utf-8") != text:
            continue
        if not handoff.planned(session):
            output.say(f"session {session.id} goes on: nothing has run in it yet (a new one: --new)")
            return session, file
        planned = handoff.plan(session)
        if planned.quick == quick:
            missing = handoff.missing(planned.units, handoff.records(session), handoff.collected(session))
            if not missing and instances.may_run(session):
                output.say(f"session {session.id} goes on: it has instances that may still run (a new one: --new)")
                return session, file
            if not missing:
                return None
            units = f"{len(missing)} of {len(planned.units)} units are missing"
            output.say(f"session {session.id} goes on: {units} (a new one: --new)")
            return session, file
    return None


def _checked(file: Path) -> str:
    """The campaign's text. Everything that can be wrong with it is found before there is a session."""
    text = campaigns.read_text(file)
    static.hosts(campaigns.load_text(text, str(file)), base=file.resolve().parent, source=str(file))
    return text


@contextmanager
def outing(
    session: Session,
    file: Path,
    *,
    quiet: bool,
    quick: bool = False,
    limit: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Iterator[Outing]:
    """Everything a stage is given, with the session locked and progress shown.

    Raises SessionError naming the owner when another controller has the session.
    """
    from fleet.plays import AnsiblePlays

    campaign = campaigns.load(session.campaign_file)
    subset = Subset(limit=tuple(limit), exclude=tuple(exclude))
    if limit or exclude:
        subset.check(host.name for host in _hosts(session, campaign, file))
    stop = threading.Event()
    say_strays(session)
    with session.locked(typed()), output.watching(quiet=quiet) as watch:
        cancel.forget(session)
        try:
            yield Outing(
                session=session,
                campaign=campaign,
                base=file.resolve().parent,
                source=os.fspath(file),
                plays=AnsiblePlays(cancelled=stop.is_set),
                watch=_Entering(watch, session),
                quick=quick,
                subset=subset,
                stop=stop.set,
            )
        except KeyboardInterrupt as error:
            stop.set()
            session.close()
            if (running := instances.left_running(session)) is not None:
                raise running from None
            said = "units that were started go on at their hosts"
            raise Interrupted(said, hint=f"fleet bench {session.option}") from error


def _hosts(session: Session, campaign: Campaign, file: Path) -> Sequence[Host]:
    if (session.inventory / "hosts.json").is_file():
        return files.hosts(session)
    from fleet.cloud import tagged

    place, source = file.resolve().parent, os.fspath(file)
    instances = tagged.every(session, campaign, base=place, source=source)
    return [*static.hosts(campaign, base=place, source=source), *instances]


def say_strays(session: Session | None) -> None:
    """Say which other sessions of ours may have instances that nobody works with."""
    from fleet.cloud import strays

    for line in strays.lines(session):
        output.say(line)


def typed() -> str:
    """The command as it is shown to others."""
    return " ".join(["fleet", *sys.argv[1:]])


class _Entering:
    """Lets the session say which stage its controller is in, beside telling who watches."""

    def __init__(self, watch: Watch, session: Session) -> None:
        self._session = session
        self.host, self.note, self._stage = watch.host, watch.note, watch.stage

    def stage(self, name: str, text: str) -> None:
        """A stage begins."""
        self._session.enter(name)
        self._stage(name, text)
