"""Options that several verbs share, and how they find the session and the campaign."""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from fleet import campaign as campaigns
from fleet import session as sessions
from fleet.cli import output
from fleet.errors import SessionError
from fleet.inventory import static
from fleet.pipeline import Outing
from fleet.session import Session

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
        "--sessions", "base", type=click.Path(path_type=Path, file_okay=False), default=Path("sessions"),
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
    text = campaigns.read_text(file)
    # Everything that can be wrong with fleet.yml is found before there is a session: nothing is left half made.
    static.hosts(campaigns.load_text(text, str(file)), base=file.resolve().parent, source=str(file))
    newest = None if new or session_id else sessions.latest(base)
    if newest is not None and newest.campaign_file.read_text(encoding="utf-8") == text:
        return newest, file
    if not create:
        raise SessionError(f"no session of {file} as it is now", hint="fleet provision")
    made = sessions.create(base, text, name=session_id, campaign_file=file)
    output.say(f"session {made.id} in {made.root}")
    return made, file


@contextmanager
def outing(session: Session, file: Path, *, quiet: bool, quick: bool = False) -> Iterator[Outing]:
    """Everything a stage is given, with the session locked and progress shown."""
    from fleet.plays import AnsiblePlays

    campaign = campaigns.load(session.campaign_file)
    stop = threading.Event()
    with session.locked(), output.watching(quiet=quiet) as watch:
        try:
            yield Outing(
                session=session,
                campaign=campaign,
                base=file.resolve().parent,
                source=os.fspath(file),
                plays=AnsiblePlays(cancelled=stop.is_set),
                watch=watch,
                quick=quick,
            )
        except KeyboardInterrupt:
            stop.set()
            output.say("units that were started go on at their hosts")
            output.say(f"next:  fleet bench --session {session.id}")
            raise
