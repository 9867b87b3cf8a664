"""Find out what LoadGen must be told about each host, before any run: by short probes that are never submitted.

One host of each kind of system goes first; the others begin where it ended. A host without a value still gets one
by itself when a run starts, so this stage may be left out.
"""

import shlex
from collections.abc import Sequence

from pydantic import BaseModel, ValidationError

from fleet import campaign as campaigns
from fleet import handoff, launch, planning
from fleet.campaign import BenchmarkEntry, Campaign
from fleet.handoff import TunedFile, UnitRecord
from fleet.harness.contract import Scenario, UnitState
from fleet.inventory import files, reach, static
from fleet.inventory.hosts import Host
from fleet.session import Session
from fleet.subset import EVERYTHING, Subset
from fleet.watch import Watch

_Task = tuple[Host, BenchmarkEntry, Scenario]


class _Told(BaseModel):
    """tuning.json, as far as it matters here; what comes from a host is not trusted."""

    values: dict[str, float]


def tune(
    session: Session, campaign: Campaign, watch: Watch, *, quick: bool = False, subset: Subset = EVERYTHING
) -> tuple[TunedFile, ...]:
    """Tune every scenario for which the campaign gives no value; one answer per host of `subset`.

    Each is written to tune/<host>.json.
    """
    watch.stage("tune", "short probes: what LoadGen must be told about each host")
    hosts = [host for host in files.hosts(session) if not (subset.left_out(host.name) or host.missing)]
    found = {
        host.name: TunedFile(host=host.name, values={}, instance_type=host.instance.type if host.instance else "")
        for host in hosts
    }
    wanted = [
        (host, benchmark, scenario)
        for host in hosts
        for benchmark in campaign.benchmarks
        for scenario in benchmark.scenarios
        if not _is_given(campaign, host, benchmark, scenario)
    ]
    kinds = handoff.system_kinds(session)
    first: dict[tuple[str, ...], str] = {}
    for host, *_ in wanted:
        if host.name in kinds:
            first.setdefault(kinds[host.name], host.name)
    leaders = [task for task in wanted if task[0].name in first.values()]
    launcher = launch.Launcher(
        session=session, campaign=campaign, watch=watch, folder=session.tune, token=f"{session.token}-tune"
    )
    for wave in (leaders, [task for task in wanted if task not in leaders]):
        _tune(launcher, wave, found, quick=quick)
    return tuple(found.values())


def _is_given(campaign: Campaign, host: Host, benchmark: BenchmarkEntry, scenario: Scenario) -> bool:
    settings = campaigns.user_conf(static.entry(host, campaign), benchmark, scenario)
    return (
        "target_latency" if scenario in {Scenario.SINGLE_STREAM, Scenario.MULTI_STREAM} else "target_qps"
    ) in settings


def _tune(launcher: launch.Launcher, wave: Sequence[_Task], found: dict[str, TunedFile], *, quick: bool) -> None:
    """Tune a wave of hosts and write what they say."""
    session = launcher.session
    planner = planning.Planner(session, launcher.campaign, quick=quick)
    tasks = {spec.unit: task for task in wave for spec in [planner.tuning(*task)]}
    told: dict[str, _Told | str] = {}

    def bring(connection: reach.Connection, work_dir: str, record: UnitRecord) -> None:
        told[record.unit] = _ask(connection, f"{work_dir}/runs/{launcher.token}/{record.unit}/tuning.json", record)

    specs = [planner.tuning(*task) for task in wave]
    launcher.launch(launch.batches(launch.by_host(handoff.readiness(session), specs)), lambda: bring)
    records = handoff.records(session, session.tune)
    for unit, (host, benchmark, scenario) in tasks.items():
        answer = told.get(unit, records[unit].cause or str(records[unit].state))
        entry = found[host.name]
        if isinstance(answer, _Told):
            entry.values.setdefault(benchmark.name, {})[scenario] = answer.values
        else:
            entry.causes[unit] = answer
    for name in {host.name for host, *_ in wave}:
        session.write(session.tune / f"{name}.json", found[name])


def _ask(connection: reach.Connection, path: str, record: UnitRecord) -> _Told | str:
    if record.state is not UnitState.DONE:
        return record.cause or str(record.state)
    try:
        return _Told.model_validate_json(connection.run(f"cat {shlex.quote(path)}", timeout=15).out)
    except reach.Unreachable as error:
        return error.cause
    except ValidationError:
        return "its tuning.json cannot be read"
