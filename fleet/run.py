"""Run the campaign: every host gets its units at once, a supervisor there works through them, the controller polls.

No host waits for another, and none is forgotten: each planned unit has a file in run/units/, from the first moment
on, and ends in a named state with a cause.
"""

import itertools
import json
import shlex
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fleet import campaign as campaigns
from fleet import handoff
from fleet.campaign import BenchmarkEntry, Campaign, HostEntry
from fleet.handoff import Plan, UnitRecord
from fleet.harness.contract import Mode, RunSpec, Scenario, UnitState, UnitStatus
from fleet.inventory import files, reach, ssh_config, static
from fleet.inventory.hosts import Host
from fleet.mlperf import rules
from fleet.plays import PlayRequest, Plays
from fleet.session import Session
from fleet.terms import HostState
from fleet.watch import Watch

POLL_FIRST_S, POLL_LAST_S = 1.0, 3.0
"""The poll interval grows from the first to the last while nothing ends."""
STALE_S = 45.0
"""A running unit whose heartbeat is older, by its host's own clock, has lost its supervisor."""
QUICK_ACCURACY_SAMPLES = 10833
"""--quick still evaluates the whole set of a benchmark up to this size: an F1 over fewer says little."""


@dataclass(slots=True, kw_only=True)
class _Polled:
    """A host being polled."""

    host: Host
    work_dir: str
    units: list[str]
    connection: reach.Connection | None = None
    last_answer: float = field(default_factory=time.monotonic)
    cause: str = ""


def plan(session: Session, campaign: Campaign, *, base: Path, source: str, quick: bool) -> Plan:
    """Every unit of the campaign: host by benchmark by scenario by mode, in the order they will run."""
    token = session.token
    work_dirs = {item.host: item.work_dir for item in handoff.readiness(session)}
    units: list[RunSpec] = []
    for host in files.hosts(session):
        entry = static.entry_of(campaign, host.name, base=base, source=source)
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
    session: Session, campaign: Campaign, plays: Plays, watch: Watch, *, base: Path, source: str, quick: bool
) -> tuple[UnitRecord, ...]:
    """Run what is not done yet and return one record per planned unit."""
    watch.stage("run", "LoadGen on every host that is ready")
    planned = plan(session, campaign, base=base, source=source, quick=quick)
    before = handoff.records(session)
    earlier = {spec.unit: spec for spec in handoff.plan(session).units} if before else {}
    session.write(session.run / "plan.json", planned)
    wanted = [
        spec
        for spec in planned.units
        if not (spec.unit in before and before[spec.unit].state is UnitState.DONE and earlier.get(spec.unit) == spec)
    ]
    started = _start(session, plays, watch, wanted)
    if started:
        _poll(session, campaign, watch, started)
    now = handoff.records(session)
    return tuple(now[spec.unit] for spec in planned.units)


def _note(session: Session, record: UnitRecord) -> None:
    session.write(session.run / "units" / f"{record.unit}.json", record)


def _start(session: Session, plays: Plays, watch: Watch, wanted: Sequence[RunSpec]) -> list[_Polled]:
    """Hand every ready host its units; units that cannot start end here, with the cause."""
    found = {item.host: item for item in handoff.readiness(session)}
    queues: dict[str, list[RunSpec]] = {}
    for spec in wanted:
        host = found[spec.host]
        record = UnitRecord(unit=spec.unit, host=spec.host, state=UnitState.PENDING)
        if host.state is not HostState.READY:
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
            started.append(_Polled(host=by_name[name], work_dir=found[name].work_dir, units=units))
            continue
        state = UnitState.UNREACHABLE if outcome.state is HostState.UNREACHABLE else UnitState.FAILED
        for spec in specs:
            _note(session, UnitRecord(unit=spec.unit, host=name, state=state, cause=outcome.cause))
        watch.host(name, outcome.cause, ended=True)
    return started


def _poll(session: Session, campaign: Campaign, watch: Watch, polled: list[_Polled]) -> None:
    """Ask every host until each of its units has ended or the host counts as lost."""
    known = handoff.records(session)
    interval = POLL_FIRST_S
    waiting = {item.host.name: item for item in polled}
    pending: dict[str, Future[reach.Answer]] = {}
    pool = ThreadPoolExecutor(max_workers=min(32, len(polled)))
    try:
        while waiting:
            for name, item in waiting.items():
                # A host that has not answered the last question is not asked another, and holds nobody up.
                if name not in pending:
                    pending[name] = pool.submit(_ask, item, session.token)
            time.sleep(interval)
            interval = min(POLL_LAST_S, interval * 1.2)
            for name in [name for name, future in pending.items() if future.done()]:
                item, future = waiting[name], pending.pop(name)
                changed = _take_answer(session, item, future, known)
                interval = POLL_FIRST_S if changed else interval
                _tell(watch, item, known)
            for name in list(waiting):
                if _finished(session, campaign, waiting[name], known):
                    watch.host(name, _sum(waiting[name], known), ended=True)
                    _close(waiting.pop(name))
                    pending.pop(name, None)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for item in waiting.values():
            _close(item)


def _ask(item: _Polled, token: str) -> reach.Answer:
    """One shell command that says the host's time, its boot, and every unit's status."""
    if item.connection is None:
        item.connection = reach.connect(item.host)
    folder = shlex.quote(f"{item.work_dir}/runs/{token}")
    try:
        return item.connection.run(
            f"date +%s; cat /proc/sys/kernel/random/boot_id; cat {folder}/*/status.json", timeout=15
        )
    except reach.Unreachable:
        _close(item)
        item.connection = None
        raise


def _close(item: _Polled) -> None:
    if item.connection is not None:
        item.connection.close()


def parse_answer(text: str) -> tuple[float, str, dict[str, UnitStatus]]:
    """The host's time in Unix seconds, its boot id, and its units' statuses; what cannot be read is left out."""
    time_line, _, rest = text.partition("\n")
    boot, _, rest = rest.partition("\n")
    now = float(time_line) if time_line.strip().isdigit() else 0.0
    found = {}
    for data in _documents(rest):
        try:
            status = TypeAdapter(UnitStatus).validate_python(data)
        except ValidationError:
            continue
        found[status.unit] = status
    return now, boot.strip(), found


def _documents(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    at = 0
    while at < len(text):
        while at < len(text) and text[at].isspace():
            at += 1
        try:
            data, at = decoder.raw_decode(text, at)
        except ValueError:
            return
        yield data


def _take_answer(session: Session, item: _Polled, future: "Future[reach.Answer]", known: dict[str, UnitRecord]) -> bool:
    """Digest one answer into unit records; True when a unit changed its state."""
    try:
        now, boot, statuses = parse_answer(future.result().out)
    except reach.Unreachable as error:
        item.cause = error.cause
        return False
    item.last_answer, item.cause = time.monotonic(), ""
    changed = False
    for unit in item.units:
        record, status = known[unit], statuses.get(unit)
        if status is None:
            updated = record
            if record.status is not None:
                updated = replace(record, state=UnitState.FAILED, cause="its folder vanished from the host")
        else:
            state, cause = judge(status, now=now, boot=boot)
            updated = replace(record, state=state, cause=cause, status=status)
        if updated.state is not record.state:
            _note(session, updated)
            changed = True
        known[unit] = updated
    return changed


def judge(status: UnitStatus, *, now: float, boot: str) -> tuple[UnitState, str]:
    """A unit's state as the controller sees it: a host that was rebooted or lost its supervisor cannot say so itself."""
    if status.state is UnitState.RUNNING:
        if status.boot_id and boot and status.boot_id != boot:
            return UnitState.INTERRUPTED, "the host was rebooted"
        if status.heartbeat_at is not None and now - status.heartbeat_at > STALE_S:
            return UnitState.FAILED, "its supervisor died"
    return status.state, status.cause


def _finished(session: Session, campaign: Campaign, item: _Polled, known: dict[str, UnitRecord]) -> bool:
    if all(known[unit].state.ended for unit in item.units):
        return True
    silent = time.monotonic() - item.last_answer
    if silent < campaign.run.lost_after_s:
        return False
    cause = f"no answer for {silent:.0f} s ({item.cause or 'the last question is still open'}); it may still run there"
    for unit in item.units:
        if not known[unit].state.ended:
            known[unit] = replace(known[unit], state=UnitState.UNREACHABLE, cause=cause)
            _note(session, known[unit])
    return True


def _tell(watch: Watch, item: _Polled, known: dict[str, UnitRecord]) -> None:
    if item.cause:
        watch.host(item.host.name, f"no answer: {item.cause}")
        return
    for number, unit in enumerate(item.units, start=1):
        status = known[unit].status
        if status is not None and status.state is UnitState.RUNNING:
            spent = (status.heartbeat_at or 0.0) - (status.started_at or 0.0)
            fraction = min(0.99, spent / status.expected_s) if status.expected_s else None
            short = unit.removeprefix(item.host.name + ".")
            text = f"{short} ({number}/{len(item.units)}), {status.samples_done} samples, {spent:.0f} s"
            watch.host(item.host.name, text, fraction=fraction)
            return


def _sum(item: _Polled, known: dict[str, UnitRecord]) -> str:
    done = sum(known[unit].state is UnitState.DONE for unit in item.units)
    causes = {known[unit].cause for unit in item.units if known[unit].cause}
    return f"{done} of {len(item.units)} units done" + (f": {min(causes)}" if causes else "")
