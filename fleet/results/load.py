"""A session folder -> SessionResults. Reads earlier stages' files and nothing else; no machine is needed.

Every planned unit and every host gets its record, with a state and a cause. What came from hosts (collect/, facts)
is not trusted: a file that is missing, too big, outside the session or broken is the cause of its unit, never an
exception. What the controller wrote itself must be sound: there SessionError says which stage to run again.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from fleet import campaign, handoff
from fleet.errors import ResultsError, SessionError
from fleet.handoff import Collected, Plan, UnitRecord
from fleet.harness.contract import RunManifest, RunSpec, SystemFacts
from fleet.mlperf.rules import load_benchmark, load_round
from fleet.results import accuracy, loadgen_log, systems, verdict
from fleet.results.records import LoadgenSummary, SessionResults, System, UnitResult
from fleet.session import Session
from fleet.terms import HostState, Mode, UnitState

MAX_FILE_BYTES = 256 * 2**20
"""Detail logs of the models here are below 1 MB; a log full of errors may be much longer, but not this long."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostRow:
    """A host in reachability.json or readiness.json."""

    host: str
    state: HostState
    kind: str = ""
    cause: str = ""
    hint: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostNotes:
    """A host in inventory/hosts.json: its owner's notes over the campaign's."""

    name: str
    notes: dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UnitFiles:
    """All there is of one unit, read but not judged."""

    run: UnitRecord | None = None
    """What the run stage last knew of it; None when it never looked."""
    folder: str = ""
    cause: str = ""
    """Why the collected files are missing or cannot be used; empty when they can."""
    manifest: RunManifest | None = None
    summary: LoadgenSummary | None = None
    accuracy: dict[str, float] = dataclasses.field(default_factory=dict)


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
    hosts = _hosts(session, plan)
    facts, broken = _facts(session, hosts)
    hosts = [dataclasses.replace(row, cause=row.cause or broken.get(row.host, "")) for row in hosts]
    named = session.read(session.inventory / "hosts.json", tuple[HostNotes, ...])
    notes = {host.name: host.notes for host in named}
    return assemble(header, hosts, facts=facts, notes=notes, plan=plan, files=_unit_files(session, plan))


def assemble(
    header: Header,
    hosts: Sequence[HostRow],
    *,
    facts: Mapping[str, SystemFacts],
    notes: Mapping[str, Mapping[str, str]],
    plan: Plan,
    files: Mapping[str, UnitFiles],
) -> SessionResults:
    """The records for what was read; no IO. A unit without files is pending.

    Raises CampaignError when the round or a benchmark is not known to this fleet.
    """
    ids = systems.assign_ids((row.host, facts.get(row.host), notes.get(row.host, {})) for row in hosts)
    units = tuple(_unit(header, spec, files.get(spec.unit, UnitFiles()), ids) for spec in plan.units)
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
            )
            for row in hosts
        ),
        units=units,
    )


def _unit(header: Header, spec: RunSpec, files: UnitFiles, ids: Mapping[str, str]) -> UnitResult:
    manifest, status = files.manifest, files.run.status if files.run else None
    state = files.run.state if files.run else UnitState.PENDING
    cause = (files.run.cause if files.run else "") or (files.cause if state is UnitState.DONE else "")
    # labels may be known to the plan (demo model) and to the host alone (random weights): a reader gets both
    labels = tuple(dict.fromkeys([*spec.labels, *(manifest.labels if manifest else ())]))
    evidence = verdict.Evidence(
        spec=spec,
        state=state,
        cause=cause,
        manifest=manifest,
        summary=files.summary,
        accuracy=files.accuracy,
        labels=labels,
    )
    against = verdict.reasons(evidence, load_benchmark(spec.benchmark), load_round(header.round), header.division)
    if not cause and files.summary and files.summary.valid is False:
        cause = f"INVALID: {'; '.join(files.summary.invalid_reasons)}"
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
        summary=files.summary,
        accuracy=files.accuracy,
        submittable=not against,
        not_submittable_because=against,
        labels=labels,
        loadgen_s=manifest.loadgen_s if manifest else None,
        started_at=manifest.started_at if manifest else (status.started_at if status else None),
        versions=dict(manifest.versions) if manifest else {},
        model=dict(manifest.model) if manifest else {},
        folder=files.folder,
    )


def _system(
    header: Header,
    row: HostRow,
    *,
    system_id: str,
    facts: SystemFacts | None,
    notes: dict[str, str],
    units: Sequence[UnitResult],
) -> System:
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
        cause=row.cause,
        hint=row.hint,
        description=description,
        identity=facts.identity if facts else "",
        notes=notes,
    )


def _hosts(session: Session, plan: Plan) -> list[HostRow]:
    """One row per host that any stage knew of: readiness where there is one, else reachability."""
    reached = session.read(session.inventory / "reachability.json", list[HostRow])
    ready = handoff.readiness(session) if (session.provision / "readiness.json").exists() else ()
    rows = {row.host: row for row in reached}
    for found in ready:
        kind = rows[found.host].kind if found.host in rows else ""
        rows[found.host] = HostRow(host=found.host, state=found.state, kind=kind, cause=found.cause, hint=found.hint)
    for spec in plan.units:
        rows.setdefault(
            spec.host, HostRow(host=spec.host, state=HostState.FAILED, cause="planned, but in no inventory")
        )
    return list(rows.values())


def _facts(session: Session, hosts: Sequence[HostRow]) -> tuple[dict[str, SystemFacts], dict[str, str]]:
    """Facts by host, and for the hosts whose facts cannot be read the reason."""
    facts: dict[str, SystemFacts] = {}
    broken: dict[str, str] = {}
    for row in hosts:
        path = session.provision / "facts" / f"{row.host}.json"
        if not path.exists():
            continue
        try:
            facts[row.host] = session.read(path, SystemFacts)
        except SessionError as error:
            broken[row.host] = error.message
    return facts, broken


def _unit_files(session: Session, plan: Plan) -> dict[str, UnitFiles]:
    known, home = handoff.records(session), handoff.collected(session)
    return {spec.unit: _files_of(session, spec, known.get(spec.unit), home.get(spec.unit)) for spec in plan.units}


def _files_of(session: Session, spec: RunSpec, run: UnitRecord | None, collected: Collected | None) -> UnitFiles:
    if collected is None:
        return UnitFiles(run=run, cause="not collected")
    if not collected.complete:
        return UnitFiles(run=run, cause=f"not collected: {collected.cause or 'files are missing or changed'}")
    relative = ""
    try:
        folder = _inside(session, collected.folder)
        relative = collected.folder
        return UnitFiles(
            run=run,
            folder=relative,
            manifest=session.read(_file(session, folder / "manifest.json"), RunManifest),
            summary=loadgen_log.summarise(_text(session, folder / "mlperf_log_detail.txt")),
            accuracy=_accuracy(session, folder) if spec.mode is Mode.ACCURACY else {},
        )
    except (ResultsError, SessionError) as error:
        return UnitFiles(run=run, folder=relative, cause=f"collected, but {error.message}")


def _accuracy(session: Session, folder: Path) -> dict[str, float]:
    path = folder / "accuracy.txt"
    return accuracy.parse(_text(session, path)) if path.exists() else {}


def _inside(session: Session, relative: str) -> Path:
    folder = session.root / relative
    if not folder.resolve().is_relative_to(session.collect.resolve()):
        raise ResultsError(f"{relative!r} is not inside collect/")
    return folder


def _file(session: Session, path: Path) -> Path:
    """The path, when it is a plain file of the session: a host may have sent a link."""
    name = path.name
    if not path.is_file():
        raise ResultsError(f"{name} is missing")
    if not path.resolve().is_relative_to(session.collect.resolve()):
        raise ResultsError(f"{name} points outside the session")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise ResultsError(f"{name} has {size} bytes, more than {MAX_FILE_BYTES}")
    return path


def _text(session: Session, path: Path) -> str:
    # LoadGen writes ASCII; anything else becomes a replacement sign instead of a reason to lose the unit
    return _file(session, path).read_text(encoding="utf-8", errors="replace")
