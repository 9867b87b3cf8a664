"""The whole job is its stages in order. Read this first.

Each stage reads what earlier ones left in the session folder and writes only its own, so each can be run again;
the last three need no machine at all.
"""

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet import collect, provision, run, tune
from fleet.campaign import Campaign
from fleet.inventory import files
from fleet.plays import Plays
from fleet.session import Session
from fleet.watch import Watch


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


def inventory(outing: Outing) -> Any:
    """Expand and probe the campaign's hosts."""
    outing.watch.stage("inventory", "reaching every host")
    return files.make(outing.session, outing.campaign, base=outing.base, source=outing.source)


def make_ready(outing: Outing) -> Any:
    """Provision the hosts that answered."""
    return provision.provision(outing.session, outing.campaign, outing.plays, outing.watch)


def tune_targets(outing: Outing) -> Any:
    """Find what LoadGen must be told; not one of the stages, since a run without a value finds its own."""
    return tune.tune(outing.session, outing.campaign, outing.watch, quick=outing.quick)


def measure(outing: Outing) -> Any:
    """Run LoadGen on the hosts that are ready; each unit's files come home when it ends."""
    # Importing pandas and plotly takes a second; the hosts are busy now and the controller is not.
    threading.Thread(target=importlib.import_module, args=("fleet.report.html",), daemon=True).start()
    return run.run(
        outing.session,
        outing.campaign,
        outing.watch,
        quick=outing.quick,
        bringer=lambda: collect.Collector(outing.session).bring,
    )


def bring_home(outing: Outing) -> Any:
    """Collect and verify what the run did not bring home."""
    return collect.collect(outing.session, outing.watch)


def results(outing: Outing) -> Any:
    """Read the session into typed results and tables."""
    from fleet.results import export, load

    outing.watch.stage("results", "reading LoadGen's logs")
    found = load.load(outing.session)
    export.export(outing.session, found)
    return found


def submission(outing: Outing) -> Any:
    """Build the submission tree."""
    from fleet.results.records import SessionResults
    from fleet.submission import build

    outing.watch.stage("submission", "one tree for all hosts")
    found = outing.session.read(outing.session.results / "results.json", SessionResults)
    return build.build(outing.session, found)


def report(outing: Outing) -> Any:
    """Write the report."""
    from fleet.report import html
    from fleet.results.records import SessionResults

    outing.watch.stage("report", "one file that opens offline")
    return html.write(outing.session, outing.session.read(outing.session.results / "results.json", SessionResults))


STAGES: dict[str, Callable[[Outing], Any]] = {
    "inventory": inventory,
    "provision": make_ready,
    "run": measure,
    "collect": bring_home,
    "results": results,
    "submission": submission,
    "report": report,
}
