"""Instances of other sessions of ours that nobody looks after: said at the start of every verb that works.

A session's secrets stay on this machine until `down` has seen everything gone; so who has none costs nothing, not even
an import.
"""

import queue
import time
from collections.abc import Iterable, Mapping

from fleet import threads
from fleet.cloud import keys
from fleet.errors import CloudError, SessionError
from fleet.session import Session

BUDGET_S = 5.0
"""So long all of it may take."""


def lines(current: Session | None, *, budget_s: float = BUDGET_S) -> list[str]:
    """What is to be said of sessions other than `current` that no controller holds; raises nothing."""
    here = current.root.resolve() if current else None
    known = [(token, root) for token, root in keys.known() if root.resolve() != here]
    lost = [token for token, root in known if not (root / "session.json").is_file()]
    left = {token: Session(root) for token, root in known if token not in lost}
    left = {token: session for token, session in left.items() if not session.is_held()}
    said = [
        f"session {token} may have instances, and its folder is gone: fleet reap --session {token}" for token in lost
    ]
    return said + (_left(left, budget_s) if left else [])


def _left(sessions: Mapping[str, Session], budget_s: float) -> list[str]:
    end = time.monotonic() + budget_s
    answers: queue.SimpleQueue[tuple[str, list[tuple[str, str]] | None]] = queue.SimpleQueue()
    regions, unread = _regions(sessions)
    sessions = {token: session for token, session in sessions.items() if token not in unread}
    for region in regions:
        threads.start(lambda region=region: answers.put((region, _alive(region, sorted(sessions)))))  # type: ignore[misc]
    alive: list[tuple[str, str]] = []
    unasked = set(regions)
    while unasked:
        try:
            region, found = answers.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            break
        if found is None:
            break
        alive += found
        unasked.discard(region)
    if unasked:
        named = ", ".join(session.id for session in sessions.values())
        return [*unread.values(), f"EC2 gave no answer whether instances are left of: {named}"]
    told = (_line(session, [lease for owner, lease in alive if owner == token]) for token, session in sessions.items())
    return [*unread.values(), *told]


def _line(session: Session, alive: list[str]) -> str:
    """What is said of one session; `alive` has the lease of each instance that is not gone."""
    from fleet.cloud import down, leases

    again = down.command(session)
    if not alive:
        return f"session {session.id} has no instance any more; its key pair, group and secrets go with: {again}"
    try:
        prices = {lease.id: lease.usd_per_hour for lease in leases.read(session)}
    except SessionError:
        prices = {}
    known = all(lease in prices for lease in alive)
    cost = f", {sum(prices[lease] for lease in alive):.2f} US dollars an hour" if known else ""
    some = "1 instance" if len(alive) == 1 else f"{len(alive)} instances"
    return f"session {session.id} has {some} that nobody works with{cost}: {again}"


def _regions(sessions: Mapping[str, Session]) -> tuple[list[str], dict[str, str]]:
    """Where to look, and what is to be said of sessions whose leases cannot be read, by token."""
    from fleet.cloud import down

    found: set[str] = set()
    unread = {}
    for token, session in sessions.items():
        try:
            found |= down.regions(session).keys()
        except (SessionError, OSError) as error:
            unread[token] = f"session {session.id} may have instances, and {error}: fleet reap --session {token}"
    return sorted(found), unread


def _alive(region: str, tokens: Iterable[str]) -> list[tuple[str, str]] | None:
    """Token and lease of every instance that is not gone; None when EC2 does not say."""
    from fleet.cloud import described

    try:
        found = described.instances(region, values=list(tokens))
    except CloudError:
        return None
    return [(item.session, item.lease) for item in found if item.state not in described.ENDING]
