"""The whole job is its stages in order. Read this first.

Each stage reads what earlier ones left in the session folder and writes only its own, so each can be run again;
the last three need no machine at all.
"""

import importlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fleet import collect, instances, meanwhile, provision, run, tune
from fleet.campaign import Campaign
from fleet.cloud import spend
from fleet.handoff import Readiness
from fleet.inventory import files
from fleet.plays import Plays
from fleet.session import Session
from fleet.subset import EVERYTHING, Subset
from fleet.terms import HostState
from fleet.watch import Watch

STOPPING_S = 15.0
"""So long an interrupted play may take to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outing:
    """What every stage is given."""

    session: Session
    campaign: Campaign
    base: Path
    """The folder of fleet.yml: relative names in it start here."""
    source: str
    """How to call the campaign file in messages."""
    plays: Plays
    watch: Watch
    quick: bool
    subset: Subset = EVERYTHING
    stop: Callable[[], None] = lambda: None
    """Ends the play that is running."""

    @property
    def asked(self) -> Subset:
        """The hosts that are asked now: without those that are finished with, and those that the campaign's files forgot."""
        needed = instances.asked(self.session, self.campaign, self.subset)
        return replace(needed, spared={**files.gone(self.session), **needed.spared})


def up(outing: Outing) -> Any:
    """Launch the instances that the campaign names and whose units are missing."""
    return instances.up(outing.session, outing.campaign, outing.watch, outing.subset, quick=outing.quick)


def inventory(outing: Outing) -> Any:
    """Expand and probe the campaign's hosts."""
    # boto3 is behind it, which campaigns without instances need not wait for.
    from fleet.cloud import dynamic, tagged

    launched = tagged.every(outing.session, outing.campaign, base=outing.base, source=outing.source)
    outing.watch.stage("inventory", "reaching every host")
    dynamic.write(outing.session, outing.campaign)
    return files.make(
        outing.session,
        outing.campaign,
        base=outing.base,
        source=outing.source,
        # Which hosts the campaign's files name is only now found out.
        left_out=instances.asked(outing.session, outing.campaign, outing.subset).left_out,
        instances=launched,
    )


def look(outing: Outing) -> Any:
    """See whether each host could run the campaign; changes nothing on any of them."""
    return provision.check(outing.session, outing.campaign, outing.plays, outing.watch, outing.asked)


def make_ready(outing: Outing, on_ready: provision.OnReady = lambda _: None) -> Any:
    """Provision the hosts that answered, but those where units of this session run."""
    return provision.provision(
        outing.session,
        outing.campaign,
        outing.plays,
        outing.watch,
        subset=outing.asked,
        spared=meanwhile.busy(outing.session, outing.asked),
        on_ready=on_ready,
    )


def tune_targets(outing: Outing) -> Any:
    """Find what LoadGen must be told; not one of the stages, since a run without a value finds its own."""
    return tune.tune(outing.session, outing.campaign, outing.watch, quick=outing.quick, subset=outing.asked)


def measure(outing: Outing, ready: run.Ready | None = None) -> Any:
    """Run LoadGen on the hosts that are ready, or as they become so; each unit's files come home when it ends."""
    # Importing pandas and plotly takes a second; the hosts are busy now and the controller is not.
    threading.Thread(target=importlib.import_module, args=("fleet.report.html",), daemon=True).start()
    return run.run(
        outing.session,
        outing.campaign,
        outing.watch,
        quick=outing.quick,
        bringer=lambda planned: collect.Collector(outing.session, planned, outing.watch.note).bring,
        subset=outing.asked,
        ready=ready,
    )


def prepare_and_measure(outing: Outing) -> Any:
    """Provision and run at once: a host that is ready measures while others are still being made ready."""
    ready: run.Ready = queue.SimpleQueue()
    begun = threading.Event()
    stopped = threading.Event()
    failed: list[BaseException] = []

    def settled(found: Readiness) -> None:
        if stopped.is_set():
            # Nobody starts anything any more: planning for it would be cut off in the middle of a file.
            return
        ready.put(found)
        if found.state is HostState.READY:
            begun.set()

    def prepare() -> None:
        try:
            make_ready(outing, settled)
        except BaseException as error:  # noqa: BLE001 - raised below, where somebody sees it
            failed.append(error)
        finally:
            if not stopped.is_set():
                ready.put(None)
            begun.set()

    thread = threading.Thread(target=prepare, name="provision", daemon=True)
    thread.start()
    try:
        begun.wait()
        found = measure(outing, ready) if not failed else None
    except BaseException:
        stopped.set()
        outing.stop()
        thread.join(STOPPING_S)
        raise
    thread.join()
    if failed:
        raise failed[0]
    return found


def bring_home(outing: Outing) -> Any:
    """Collect and verify what the run did not bring home."""
    found = collect.collect(outing.session, outing.watch, outing.asked)
    instances.explain(outing.session)
    return found


def again(outing: Outing) -> None:
    """Units whose instance EC2 took back are run on another one, as often as the policy for `interrupted` says."""
    for _ in range(instances.tries(outing.campaign) if outing.campaign.cloud else 0):
        instances.look(outing.session, outing.watch)
        hosts = instances.interrupted(outing.session, outing.campaign)
        if not hosts:
            return
        outing.watch.note(f"interrupted, and run again on another instance: {', '.join(hosts)}")
        instances.down(outing.session, outing.campaign, outing.watch, hosts=hosts)
        part = replace(outing, subset=instances.only(hosts, outing.session, outing.subset))
        without = up(part)
        inventory(part)
        if set(hosts) <= set(without):
            # Each is named with its cause, and what the others measured is worth a result.
            return
        prepare_and_measure(part)
        bring_home(part)


def down(outing: Outing) -> Any:
    """End every instance of the session, and see that they are gone."""
    return instances.down(outing.session, outing.campaign, outing.watch)


def results(outing: Outing) -> Any:
    """Read the session into typed results and tables."""
    from fleet.results import export, load

    outing.watch.stage("results", "reading LoadGen's logs")
    spend.write(outing.session)
    found = load.load(outing.session)
    export.export(outing.session, found)
    return found


def read_results(outing: Outing) -> Any:
    """What the results stage left."""
    from fleet.results.records import SessionResults

    return outing.session.read(outing.session.results / "results.json", SessionResults)


def submission(outing: Outing) -> Any:
    """Build the submission tree."""
    from fleet.submission import build

    outing.watch.stage("submission", "one tree for all hosts")
    return build.build(outing.session, read_results(outing))


def report(outing: Outing) -> Any:
    """Write the report."""
    from fleet.report import html

    outing.watch.stage("report", "one file that opens offline")
    return html.write(outing.session, read_results(outing))


FROM_FILES: dict[str, Callable[[Outing], Any]] = {
    "results": results,
    "submission": submission,
    "report": report,
}
GOING_ON = {"run": measure, "collect": bring_home, "down": down, **FROM_FILES}
"""What is left when every host has its units already."""
STAGES = {
    "up": up,
    "inventory": inventory,
    "run": prepare_and_measure,
    "collect": bring_home,
    "again": again,
    "down": down,
    **FROM_FILES,
}
"""The whole job; provision and run are one stage, since no host waits for another."""
