"""Builds session folders for tests: genuine LoadGen logs and recorded facts under made-up hosts."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fleet import session as sessions
from fleet.handoff import Attempt, UnitRecord
from fleet.harness.contract import FileEntry, RunManifest, RunSpec, SystemFacts, UnitStatus
from fleet.mlperf.rules import load_benchmark, load_round
from fleet.session import Session
from fleet.terms import HostState, Mode, Reason, Scenario, UnitState

DATA = Path(__file__).parents[2] / "data"
LOGS = DATA / "loadgen"
ROUGE_TEXT = "{'rouge1': 42.9865, 'rouge2': 20.1235, 'rougeL': 29.9881, 'rougeLsum': 40.1, 'gen_len': 4016878}\n"
F1_TEXT = '{"exact_match": 79.2301, "f1": 87.4417}\n'


@dataclasses.dataclass(kw_only=True)
class Unit:
    """One planned unit and what became of it; `log` names a folder of tests/data/loadgen."""

    scenario: Scenario = Scenario.OFFLINE
    mode: Mode = Mode.PERFORMANCE
    log: str = "offline-valid"
    state: UnitState = UnitState.DONE
    cause: str = ""
    collected: bool = True
    collect_cause: str = ""
    backend: str = "pytorch"
    labels: tuple[str, ...] = ()
    detail: str | None = None
    """Text in place of the log's."""
    scale: float = 1.0
    """Only to give the hosts of a sample page different numbers."""
    accuracy: str = F1_TEXT
    benchmark: str = "tiny-bert"
    reason: Reason = Reason.NONE
    attempts: tuple[Attempt, ...] = ()
    later: tuple[Attempt, ...] = ()
    conditions: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds on battery, asleep or throttled, as the host counted them."""
    ran: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the spec in which what ran differs from what is planned."""


@dataclasses.dataclass(kw_only=True)
class Host:
    """One host; `facts` names a folder of tests/data/hosts."""

    name: str
    kind: str = "laptop"
    facts: str = "laptop-hybrid-cores"
    machine_id: str = ""
    state: HostState = HostState.READY
    cause: str = ""
    hint: str = ""
    warnings: tuple[str, ...] = ()
    units: tuple[Unit, ...] = ()
    usd_per_hour: float | None = None


ALL_FOUR = (
    Unit(),
    Unit(scenario=Scenario.SINGLE_STREAM, log="singlestream-valid"),
    Unit(mode=Mode.ACCURACY, log="offline-accuracy"),
    Unit(mode=Mode.ACCURACY, scenario=Scenario.SINGLE_STREAM, log="singlestream-accuracy"),
)


def facts(name: str, **changes: Any) -> SystemFacts:
    """Recorded facts, with changes."""
    found = TypeAdapter(SystemFacts).validate_json((DATA / "hosts" / name / "expected.json").read_bytes())
    return dataclasses.replace(found, **changes)


def spec(host: str, unit: Unit, *, quick: bool = False, **changes: Any) -> RunSpec:
    """The run spec that a plan would hold."""
    rule = load_benchmark(unit.benchmark)
    values: dict[str, Any] = {
        "unit": f"{host}.{unit.benchmark}.{unit.scenario}.{unit.mode}",
        "session": "s1",
        "host": host,
        "benchmark": rule.name,
        "module": rule.module,
        "loadgen_model": rule.loadgen_model,
        "scenario": unit.scenario,
        "mode": unit.mode,
        "backend": unit.backend,
        "backend_options": {},
        "user_conf": "",
        "sample_count": rule.samples,
        "performance_sample_count": rule.performance_samples,
        "deadline_s": 2000.0,
        "expected_s": 660.0,
        "work_dir": "~/.mlperf-fleet",
        "round": "v6.1",
        "loadgen_version": load_round("v6.1").loadgen,
        "quick": quick,
        "labels": rule.labels,
    }
    return RunSpec(**(values | changes))


def build(base: Path, hosts: list[Host], *, quick: bool = False, notes: dict[str, str] | None = None) -> Session:
    """The folder as the stages up to collect leave it."""
    campaign = "submitter: ExampleLab\nbenchmarks: [{name: tiny-bert}]\nhosts:\n"
    campaign += "".join(f"- {{name: {host.name}, kind: {host.kind}}}\n" for host in hosts)
    made = sessions.create(base, campaign, name="20261123-150000")
    rows = [
        {
            "host": host.name,
            "kind": host.kind,
            "state": host.state,
            "cause": host.cause,
            "hint": host.hint,
            "warnings": host.warnings,
        }
        for host in hosts
    ]
    made.write(made.inventory / "hosts.json", [_named(host, notes) for host in hosts])
    made.write(made.inventory / "reachability.json", rows)
    made.write(made.provision / "readiness.json", {"schema": 1, "hosts": rows})
    specs = [spec(host.name, unit, quick=quick) for host in hosts for unit in host.units]
    made.write(made.run / "plan.json", {"schema": 1, "quick": quick, "units": specs})
    index: dict[str, Any] = {}
    for host in hosts:
        if host.state is HostState.READY:
            machine_id = host.machine_id or host.name.encode().hex().ljust(32, "0")[:32]
            made.write(made.provision / "facts" / f"{host.name}.json", facts(host.facts, machine_id=machine_id))
        for unit in host.units:
            index |= _unit(made, spec(host.name, unit, quick=quick), unit)
    made.write(made.collect / "collected.json", {"schema": 1, "units": index})
    return made


def _named(host: Host, notes: dict[str, str] | None) -> dict[str, Any]:
    return {"name": host.name, "notes": notes or {}, "usd_per_hour": host.usd_per_hour}


def _unit(made: Session, planned: RunSpec, unit: Unit) -> dict[str, Any]:
    status = UnitStatus(unit=planned.unit, state=unit.state, cause=unit.cause, conditions=unit.conditions)
    record = UnitRecord(
        unit=planned.unit,
        host=planned.host,
        state=unit.state,
        cause=unit.cause,
        status=status if unit.conditions else None,
        reason=unit.reason,
        attempts=unit.attempts,
        later=unit.later,
    )
    made.write(made.run / "units" / f"{planned.unit}.json", record)
    if unit.state is not UnitState.DONE:
        return {}
    relative = f"collect/{planned.host}/{planned.unit}"
    if unit.collected:
        _files(made, made.root / relative, planned, unit)
    return {planned.unit: {"folder": relative, "complete": unit.collected, "cause": unit.collect_cause}}


def _files(made: Session, folder: Path, planned: RunSpec, unit: Unit) -> None:
    shutil.copytree(LOGS / unit.log, folder)
    detail = folder / "mlperf_log_detail.txt"
    text = detail.read_text(encoding="utf-8") if unit.detail is None else unit.detail
    detail.write_text(scaled(text, unit.scale), encoding="utf-8")
    if unit.mode is Mode.ACCURACY:
        (folder / "accuracy.txt").write_text(unit.accuracy, encoding="utf-8")
    made.write(folder / "run_spec.json", dataclasses.replace(planned, **unit.ran))
    entries = {
        path.name: FileEntry(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size=path.stat().st_size)
        for path in sorted(folder.iterdir())
    }
    manifest = RunManifest(
        unit=planned.unit,
        spec_sha256=entries["run_spec.json"].sha256,
        started_at=1.0,
        finished_at=612.0,
        loadgen_s=601.0,
        versions={"python": "3.11.2", "torch": "2.13.0", "mlcommons-loadgen": "6.0.17"},
        accuracy={},
        model={
            "starting_weights_filename": "model.safetensors",
            "input_data_types": "int32",
            "weight_data_types": "fp32",
            "weight_transformations": "none",
            "retraining": "no",
        },
        labels=unit.labels,
        files=entries,
    )
    made.write(folder / "manifest.json", manifest)


def scaled(text: str, factor: float) -> str:
    """The log with its results multiplied: times by `factor`, rates divided by it."""
    if factor == 1.0:
        return text
    lines = []
    for line in text.splitlines():
        key = line.partition('"key": "')[2].partition('"')[0]
        if key.startswith(("result_", "early_stopping_latency")):
            head, _, tail = line.partition('"value": ')
            value, comma, rest = tail.partition(",")
            if key.endswith(("_ns", "_ss", "_ms")):
                value = str(int(float(value) * factor))
            elif "per_sec" in key:
                value = str(float(value) / factor)
            lines.append(f'{head}"value": {value}{comma}{rest}')
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def sign(folder: Path) -> None:
    """Make the manifest name the files as they are now: a host that cut its own log off signs that, too."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    for name in data["files"]:
        content = (folder / name).read_bytes()
        data["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    path.write_text(json.dumps(data), encoding="utf-8")
