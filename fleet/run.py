"""Run the campaign: every host gets its units at once, a supervisor there works through them, the controller polls.

No host waits for another, and none is forgotten: each planned unit has a file in run/units/, from the first moment
on, and ends in a named state with a cause.
"""

from collections.abc import Callable

from fleet import handoff, launch, planning
from fleet.campaign import Campaign
from fleet.handoff import UnitRecord
from fleet.harness.contract import UnitState
from fleet.session import Session
from fleet.watch import Watch


def run(
    session: Session,
    campaign: Campaign,
    watch: Watch,
    *,
    quick: bool,
    bringer: Callable[[], launch.Bring],
) -> tuple[UnitRecord, ...]:
    """Run what is not done yet and return one record per planned unit.

    `bringer` is called once the plan is written; what it returns brings the files of an ended unit home.
    """
    watch.stage("run", "LoadGen on every host that is ready")
    launcher = launch.Launcher(session=session, campaign=campaign, watch=watch, folder=session.run, token=session.token)
    planned = planning.plan(session, campaign, quick=quick)
    before = handoff.records(session)
    earlier = {spec.unit: spec for spec in handoff.plan(session).units} if handoff.planned(session) else {}
    wanted = [
        spec
        for spec in planned.units
        if not (
            spec.unit in before
            and before[spec.unit].state is UnitState.DONE
            and spec.unit in earlier
            and handoff.same_run(earlier[spec.unit], spec)
        )
    ]
    # In this order: a controller that dies in between must not take a unit of the old plan for one of the new.
    for spec in wanted:
        launcher.note(handoff.pending(spec))
    session.write(session.run / "plan.json", planned)
    launcher.launch(launch.batches(launch.by_host(handoff.readiness(session), wanted)), bringer)
    now = handoff.records(session)
    return tuple(now[spec.unit] for spec in planned.units)
