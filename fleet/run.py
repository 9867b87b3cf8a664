"""Run the campaign: every host gets its units at once, a supervisor there works through them, the controller polls.

No host waits for another, and none is forgotten: each planned unit has a file in run/units/, from the first moment
on, and ends in a named state with a cause.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from fleet import campaign as campaigns
from fleet import handoff, poll
from fleet.campaign import BenchmarkEntry, Campaign, HostEntry
from fleet.handoff import Plan, UnitRecord
from fleet.harness.contract import Mode, RunSpec, Scenario, UnitState
from fleet.inventory import files, reach, ssh_config
from fleet.mlperf import rules
from fleet.plays import PlayRequest, Plays
from fleet.session import Session
from fleet.terms import HostState
from fleet.watch import Watch

QUICK_ACCURACY_SAMPLES = 10833
"""--quick still evaluates the whole set of a benchmark up to this size: an F1 over fewer says little."""


def plan(session: Session, campaign: Campaign, *, quick: bool) -> Plan:
    """Every unit of the campaign: host by benchmark by scenario by mode, in the order they will run."""
    token = session.token
    work_dirs = {item.host: item.work_dir for item in handoff.readiness(session)}
    units: list[RunSpec] = []
    for host in files.hosts(session):
        entry = campaign.hosts[host.entry]
        for benchmark in campaign.benchmarks:
            for scenario, mode in itertools.product(benchmark.scenarios, benchmark.modes):
                spec = _spec(
                    token,
                    campaign,
                    host.name,
                    entry=entry,
                    benchmark=benchmark,
                    scenario=scenario,
                    mode=mode,
                    quick=quick,
                )
                units.append(replace(spec, work_dir=work_dirs.get(host.name) or campaign.work_dir))
    return Plan(quick=quick, units=tuple(units))


def _spec(
    token: str,
    campaign: Campaign,
    host: str,
    *,
    entry: HostEntry,
    benchmark: BenchmarkEntry,
    scenario: Scenario,
    mode: Mode,
    quick: bool,
) -> RunSpec:
    rule, round_ = rules.load_benchmark(benchmark.name), rules.load_round(campaign.round)
    settings = campaigns.user_conf(entry, benchmark, scenario)
    if quick:
        settings["min_duration"] = round(campaign.run.quick_seconds * 1000)
    seconds = rule.run_seconds
    if mode is Mode.PERFORMANCE:
        # Offline's one query is sized 1.1 times the duration, at a rate 1.2 times the measured one.
        seconds = 60 + 1.4 * settings.get("min_duration", round_.min_duration_ms) / 1000
    return RunSpec(
        unit=f"{host}.{benchmark.name}.{scenario}.{mode}",
        session=token,
        host=host,
        benchmark=benchmark.name,
        module=rule.module,
        loadgen_model=rule.loadgen_model,
        scenario=scenario,
        mode=mode,
        backend=benchmark.backend,
        backend_options=dict(benchmark.backend_options),
        user_conf="".join(f"*.{scenario}.{key} = {value}\n" for key, value in sorted(settings.items())),
        sample_count=min(rule.samples, QUICK_ACCURACY_SAMPLES) if quick else rule.samples,
        performance_sample_count=min(rule.performance_samples, QUICK_ACCURACY_SAMPLES)
        if quick
        else rule.performance_samples,
        deadline_s=seconds * campaign.run.deadline_factor + 120,
        expected_s=seconds,
        work_dir=campaign.work_dir,
        round=campaign.round,
        loadgen_version=round_.loadgen,
        quick=quick,
        labels=rule.labels,
    )


def run(
    session: Session,
    campaign: Campaign,
    plays: Plays,
    watch: Watch,
    *,
    quick: bool,
    bringer: Callable[[], Callable[[reach.Connection, str, UnitRecord], object]],
) -> tuple[UnitRecord, ...]:
    """Run what is not done yet and return one record per planned unit.

    `bringer` is called once the plan is written; what it returns brings the files of an ended unit home.
    """
    watch.stage("run", "LoadGen on every host that is ready")
    planned = plan(session, campaign, quick=quick)
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
        _note(session, UnitRecord(unit=spec.unit, host=spec.host, state=UnitState.PENDING))
    session.write(session.run / "plan.json", planned)
    started = _start(session, plays, watch, wanted)
    if started:
        poll.poll(
            started,
            handoff.records(session),
            lambda record: _note(session, record),
            bringer(),
            watch,
            token=session.token,
            lost_after_s=campaign.run.lost_after_s,
        )
    now = handoff.records(session)
    return tuple(now[spec.unit] for spec in planned.units)


def _note(session: Session, record: UnitRecord) -> None:
    session.write(session.run / "units" / f"{record.unit}.json", record)


def _start(session: Session, plays: Plays, watch: Watch, wanted: Sequence[RunSpec]) -> list[poll.Polled]:
    """Hand every ready host its units; units that cannot start end here, with the cause."""
    found = {item.host: item for item in handoff.readiness(session)}
    queues: dict[str, list[RunSpec]] = {}
    for spec in wanted:
        host = found.get(spec.host)
        record = UnitRecord(unit=spec.unit, host=spec.host, state=UnitState.PENDING)
        if host is None:
            record = replace(record, state=UnitState.NOT_READY, cause="never provisioned: fleet provision")
        elif host.state is not HostState.READY:
            state = UnitState.UNREACHABLE if host.state is HostState.UNREACHABLE else UnitState.NOT_READY
            record = replace(record, state=state, cause=host.cause or str(host.state))
        elif spec.benchmark in host.cannot:
            record = replace(record, state=UnitState.NOT_READY, cause=host.cannot[spec.benchmark])
        else:
            queues.setdefault(spec.host, []).append(spec)
        _note(session, record)
    if not queues:
        return []
    folder = session.run / "queues"
    for name, specs in queues.items():
        session.write(folder / f"{name}.json", {"session": session.token, "specs": specs})
        watch.host(name, f"starting {len(specs)} units")
    request = PlayRequest(
        playbook="run",
        inventory=session.inventory / "hosts.yml",
        hosts=list(queues),
        variables={"benchmark_run_queues": str(folder.resolve())},
        folder=session.plays / "run",
        ssh_arguments=ssh_config.ssh_arguments(),
    )
    outcomes = plays.run(request, lambda _: None)
    by_name = {host.name: host for host in files.hosts(session)}
    started = []
    for name, specs in queues.items():
        outcome = outcomes[name]
        if outcome.state is HostState.READY:
            units = [spec.unit for spec in specs]
            started.append(poll.Polled(host=by_name[name], work_dir=found[name].work_dir, units=units))
            continue
        state = UnitState.UNREACHABLE if outcome.state is HostState.UNREACHABLE else UnitState.FAILED
        for spec in specs:
            _note(session, UnitRecord(unit=spec.unit, host=name, state=state, cause=outcome.cause))
        watch.host(name, outcome.cause, ended=True)
    return started
