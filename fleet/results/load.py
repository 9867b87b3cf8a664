"""A session folder -> SessionResults. Reads earlier stages' files and nothing else; no machine is needed.

Every planned unit and every host gets its record, with a state, a reason and a cause. What came from hosts (collect/,
facts) is not trusted: what is wrong with it is the cause of its unit or host. What the controller wrote itself must be
sound: there SessionError says which stage to run again.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from fleet import campaign, handoff, retries
from fleet.errors import SessionError
from fleet.handoff import Plan
from fleet.harness.contract import RunSpec, SystemFacts
from fleet.mlperf.rules import load_benchmark, load_round
from fleet.results import caveats, cost, home, systems, verdict
from fleet.results.home import UnitFiles
from fleet.results.records import Price, SessionResults, System, UnitResult
from fleet.session import Session
from fleet.terms import HostState, Reason, UnitState

_BY_STATE = {
    UnitState.TIMEOUT: Reason.TIMEOUT,
    UnitState.INTERRUPTED: Reason.INTERRUPTED,
    UnitState.UNREACHABLE: Reason.UNREACHABLE,
    UnitState.FAILED: Reason.OTHER,
    HostState.UNREACHABLE: Reason.UNREACHABLE,
    HostState.UNKNOWN_KEY: Reason.HOST_KEY,
    HostState.CHANGED_KEY: Reason.HOST_KEY,
    HostState.NOT_READY: Reason.OTHER,
    HostState.FAILED: Reason.OTHER,
}
"""The reason where a stage gave none."""
CAUSES = 2
"""So many different causes of its units stand beside a host that is missing; all of them stand beside the units."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostRow:
    """A host in reachability.json, readiness.json or run/hosts/."""

    host: str
    state: HostState
    kind: str = ""
    cause: str = ""
    hint: str = ""
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostNotes:
    """A host in inventory/hosts.json: its owner's notes over the campaign's, and what it costs."""

    name: str
    notes: dict[str, str]
    usd_per_hour: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What session.json and the campaign say about the whole session."""

    session: str
    created_at: str
    fleet_version: str
    submitter: str
    division: str
    category: str
    availability: str
    round: str


def load(session: Session) -> SessionResults:
    """Everything the session folder says.

    Raises SessionError when a file that the controller wrote is missing or broken, CampaignError when campaign.yml is
    not a campaign or names a round or benchmark that this fleet does not know.
    """
    about = session.about()
    plan = handoff.plan(session)
    text = campaign.read_text(session.campaign_file)
    asked = campaign.load_text(text, session.campaign_file.name)
    header = Header(
        session=session.id,
        created_at=str(about.get("created_at", "")),
        fleet_version=str(about.get("fleet", "")),
        submitter=asked.submitter,
        division=str(asked.division),
        category=str(asked.category),
        availability=str(asked.availability),
        round=asked.round,
    )
    named = session.read(session.inventory / "hosts.json", tuple[HostNotes, ...])
    hosts = _hosts(session, plan, named)
    measured = _instances(session, plan)
    facts, broken = _facts(session, hosts, measured)
    hosts = [
        dataclasses.replace(
            row,
            cause=row.cause or broken.get(row.host, ""),
            warnings=(*row.warnings, *caveats.of_instances(measured.get(row.host, {}))),
        )
        for row in hosts
    ]
    notes = {host.name: host.notes for host in named}
    rates = cost.Rates(own={host.name: host.usd_per_hour for host in named}, spend=handoff.spend(session))
    return assemble(header, hosts, facts=facts, notes=notes, plan=plan, files=_unit_files(session, plan), rates=rates)


def assemble(
    header: Header,
    hosts: Sequence[HostRow],
    *,
    facts: Mapping[str, SystemFacts],
    notes: Mapping[str, Mapping[str, str]],
    plan: Plan,
    files: Mapping[str, UnitFiles],
    rates: cost.Rates,
) -> SessionResults:
    """The records for what was read; no IO. A unit without files is pending.

    Raises CampaignError when the round or a benchmark is not known to this fleet.
    """
    ids = systems.assign_ids((row.host, facts.get(row.host), notes.get(row.host, {})) for row in hosts)
    doubtful = caveats.of_identity((row.host, facts.get(row.host)) for row in hosts)
    made = (_unit(header, spec, files.get(spec.unit, UnitFiles()), ids) for spec in plan.units)
    units = tuple(_priced(unit, files.get(unit.unit, UnitFiles()), rates) for unit in made)
    return SessionResults(
        session=header.session,
        created_at=header.created_at,
        fleet_version=header.fleet_version,
        submitter=header.submitter,
        division=header.division,
        category=header.category,
        round=header.round,
        quick=plan.quick,
        systems=tuple(
            _system(
                header,
                row,
                system_id=ids[row.host],
                facts=facts.get(row.host),
                notes=dict(notes.get(row.host, {})),
                units=[unit for unit in units if unit.host == row.host],
                doubt=doubtful.get(row.host, ""),
                price=rates.price(row.host),
            )
            for row in hosts
        ),
        units=units,
        cost=cost.of(rates, units, [row.host for row in hosts]),
    )


def _unit(header: Header, spec: RunSpec, files: UnitFiles, ids: Mapping[str, str]) -> UnitResult:
    run, manifest = files.run, files.manifest
    status = run.status if run else None
    state = run.state if run else UnitState.PENDING
    # A number stands only beside `done`: what lies at home of a unit that was started again is an earlier start's.
    summary, scores = (files.summary, files.accuracy) if state is UnitState.DONE else (None, {})
    cause = (run.cause if run else "") or (files.cause if state is UnitState.DONE else "")
    # labels may be known to the plan (demo model) and to the host alone (random weights): a reader gets both
    labels = tuple(dict.fromkeys([*spec.labels, *(manifest.labels if manifest else ())]))
    evidence = verdict.Evidence(
        spec=spec, state=state, cause=cause, manifest=manifest, summary=summary, accuracy=scores, labels=labels
    )
    against = verdict.reasons(evidence, load_benchmark(spec.benchmark), load_round(header.round), header.division)
    if not cause and summary and summary.valid is False:
        cause = f"INVALID: {'; '.join(summary.invalid_reasons)}"
    return UnitResult(
        unit=spec.unit,
        host=spec.host,
        system_id=ids[spec.host],
        benchmark=spec.benchmark,
        scenario=spec.scenario,
        mode=spec.mode,
        backend=spec.backend,
        state=state,
        cause=cause,
        reason=_reason(state, files, invalid=summary is not None and summary.valid is False),
        attempts=run.attempts if run else (),
        later=run.later if run else (),
        warnings=caveats.of_unit(status, spec.conditions),
        summary=summary,
        accuracy=scores,
        submittable=not against,
        not_submittable_because=against,
        labels=labels,
        loadgen_s=manifest.loadgen_s if manifest else None,
        started_at=manifest.started_at if manifest else (status.started_at if status else None),
        versions=dict(manifest.versions) if manifest else {},
        model=dict(manifest.model) if manifest else {},
        folder=files.folder,
    )


def _priced(unit: UnitResult, files: UnitFiles, rates: cost.Rates) -> UnitResult:
    status = files.run.status if files.run else None
    begun = unit.started_at or (status.started_at if status else None)
    # A unit that failed leaves no manifest, and costs money all the same.
    ended = files.manifest.finished_at if files.manifest else (status.ended_at if status else None)
    price, wall = rates.price(unit.host, begun), cost.seconds(begun, ended)
    each, things = cost.per_million(price, unit.summary)
    return dataclasses.replace(
        unit,
        price=price,
        usd=None if price is None or wall is None else price.usd_per_hour * wall / 3600,
        usd_per_million=each,
        million_of=things,
    )


def _reason(state: UnitState, files: UnitFiles, *, invalid: bool) -> Reason:
    """The cause for machines: of the files where the unit is done, else of the run."""
    if state is UnitState.DONE:
        return Reason.INVALID_RESULT if invalid else files.reason
    run = files.run
    said = run.reason or (run.status.reason if run.status else Reason.NONE) if run else Reason.NONE
    return said or _BY_STATE.get(state, Reason.NONE)


def _system(
    header: Header,
    row: HostRow,
    *,
    system_id: str,
    facts: SystemFacts | None,
    notes: dict[str, str],
    units: Sequence[UnitResult],
    doubt: str,
    price: Price | None,
) -> System:
    lacking = [unit for unit in units if not unit.measured]
    complete = bool(units) and not lacking
    cause = row.cause
    warnings = [*row.warnings, *([doubt] if doubt else [])]
    if complete and row.state is not HostState.READY:
        warnings.append(f"{row.state} when last asked{f' ({cause})' if cause else ''}; all its units are home")
    if not complete and row.state is HostState.READY:
        cause = _in_sum(units, lacking) if units else cause or "no unit was planned for it"
    description: dict[str, str] = {}
    if facts is not None:
        used = (systems.framework_text(unit.versions) for unit in units)
        description = systems.describe(
            facts,
            notes,
            submitter=header.submitter,
            division=header.division,
            category=header.category,
            availability=header.availability,
            framework=next((text for text in used if text), systems.framework_text(facts.software)),
            system_name=system_id,
        )
    return System(
        system_id=system_id,
        host=row.host,
        kind=row.kind,
        state=row.state,
        cause=cause,
        reason=Reason.NONE if complete else _BY_STATE.get(row.state) or next((u.reason for u in lacking), Reason.NONE),
        warnings=tuple(warnings),
        hint=row.hint,
        description=description,
        identity=facts.identity if facts else "",
        notes=notes,
        price=price,
    )


def _in_sum(units: Sequence[UnitResult], lacking: Sequence[UnitResult]) -> str:
    """Why a host that is ready is missing all the same."""
    causes = list(dict.fromkeys(f"{u.outcome}: {u.cause}" if u.cause else u.outcome for u in lacking))
    more = [f"and {len(causes) - CAUSES} more"] if len(causes) > CAUSES else []
    return f"{len(units) - len(lacking)} of {len(units)} units; {'; '.join([*causes[:CAUSES], *more])}"


def _hosts(session: Session, plan: Plan, named: Sequence[HostNotes]) -> list[HostRow]:
    """One row per host that any stage knew of: what the last stage that looked at it found."""
    rows = {row.host: row for row in session.read(session.inventory / "reachability.json", list[HostRow])}
    ready = handoff.readiness(session) if (session.provision / "readiness.json").exists() else ()
    for found in ready:
        kind = rows[found.host].kind if found.host in rows else ""
        rows[found.host] = HostRow(
            host=found.host,
            state=found.state,
            kind=kind,
            cause=found.cause,
            hint=found.hint,
            warnings=found.warnings,
        )
    known = handoff.records(session)
    not_done = {s.host for s in plan.units if s.unit not in known or known[s.unit].state is not UnitState.DONE}
    for path in sorted((session.run / "hosts").glob("*.json")):
        lost = session.read(path, HostRow)
        # Lost while it ran. Where all is done this is old news, and a host that was not ready was not asked.
        if lost.host in not_done and rows.get(lost.host, lost).state is HostState.READY is not lost.state:
            rows[lost.host] = dataclasses.replace(rows[lost.host], state=lost.state, cause=lost.cause)
    for host in named:
        rows.setdefault(host.name, HostRow(host=host.name, state=HostState.FAILED, cause="no stage looked at it"))
    for spec in plan.units:
        rows.setdefault(
            spec.host, HostRow(host=spec.host, state=HostState.FAILED, cause="planned, but in no inventory")
        )
    return list(rows.values())


def _instances(session: Session, plan: Plan) -> dict[str, dict[str, int]]:
    """Host to the EC2 instances that its numbers are from, with how many units; empty for other hosts."""
    known = handoff.records(session)
    found: dict[str, dict[str, int]] = {}
    for spec in plan.units:
        if spec.instance and spec.unit in known and known[spec.unit].state is UnitState.DONE:
            counts = found.setdefault(spec.host, {})
            counts[spec.instance] = counts.get(spec.instance, 0) + 1
    return found


def _facts(
    session: Session, hosts: Sequence[HostRow], measured: Mapping[str, Mapping[str, int]]
) -> tuple[dict[str, SystemFacts], dict[str, str]]:
    """Facts by host, and for the hosts whose facts cannot be read the reason.

    Of a host that was several instances they are those of the instance that measured the most.
    """
    facts: dict[str, SystemFacts] = {}
    broken: dict[str, str] = {}
    for row in hosts:
        path = session.provision / "facts" / f"{row.host}.json"
        if counts := measured.get(row.host):
            of_instance = handoff.facts_of(session, max(counts, key=lambda name: counts[name]))
            path = of_instance if of_instance.exists() else path
        if not path.exists():
            continue
        try:
            facts[row.host] = session.read(path, SystemFacts)
        except SessionError as error:
            broken[row.host] = error.message
    return facts, broken


def _unit_files(session: Session, plan: Plan) -> dict[str, UnitFiles]:
    known, came = handoff.records(session), handoff.collected(session)
    # Also where the host was lost during a further start, and nobody knows yet what comes of that.
    known = {unit: retries.settled(record) if record.state.ended else record for unit, record in known.items()}
    return {spec.unit: home.read(session, spec, known.get(spec.unit), came.get(spec.unit)) for spec in plan.units}
