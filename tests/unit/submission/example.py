"""A session of two hosts and two scenarios, made of genuine LoadGen logs (tests/data/loadgen)."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from fleet.mlperf.rules import load_round
from fleet.results import loadgen_log
from fleet.results.records import SessionResults, System, UnitResult
from fleet.session import Session, create
from fleet.terms import HostState, Mode, Scenario, UnitState

LOGS = Path(__file__).parents[2] / "data" / "loadgen"
ROUND = load_round("v6.1")
HOSTS = ("alpha", "beta")
SCENARIOS = (Scenario.SINGLE_STREAM, Scenario.OFFLINE)
ACCURACY_TXT = '{"exact_match": 80.5, "f1": 88.25}\n'
MODEL = {
    "starting_weights_filename": "model.safetensors",
    "weights_sha256": "0" * 64,
    "weight_data_types": "fp32",
    "input_data_types": "int64",
    "weight_transformations": "none",
    "retraining": "no",
}


def description(host: str) -> dict[str, str]:
    """A complete systems/<id>.json of a CPU host."""
    values = {key: f"some {key}" for key in ROUND.system_keys.required}
    values |= dict.fromkeys(ROUND.system_keys.may_be_empty, "")
    return values | {
        "division": "open",
        "submitter": "ExampleLab",
        "status": "available",
        "system_name": host,
        "system_type": "edge",
        "number_of_nodes": "1",
        "accelerators_per_node": "0",
        "host_processors_per_node": "1",
        "host_processor_core_count": "8",
    }


def make(tmp_path: Path, *, quick: bool = False) -> tuple[Session, SessionResults]:
    """A session with collected folders, and its results."""
    session = create(tmp_path / "sessions", "hosts: []\n", name="example")
    units = [
        _unit(session, host, scenario, mode, quick=quick) for host in HOSTS for scenario in SCENARIOS for mode in Mode
    ]
    systems = tuple(
        System(
            system_id=host,
            host=host,
            kind="laptop",
            state=HostState.READY,
            cause="",
            description=description(host),
            identity=host,
            notes={},
        )
        for host in HOSTS
    )
    return session, SessionResults(
        session="example",
        created_at="2026-01-01T00:00:00+00:00",
        fleet_version="0.1.0",
        submitter="ExampleLab",
        division="open",
        category="edge",
        round="v6.1",
        quick=quick,
        systems=systems,
        units=tuple(units),
    )


def change(results: SessionResults, name: str, **values: Any) -> SessionResults:
    """The same results with one unit changed."""
    assert name in {unit.unit for unit in results.units}
    units = tuple(dataclasses.replace(unit, **values) if unit.unit == name else unit for unit in results.units)
    return dataclasses.replace(results, units=units)


def _unit(session: Session, host: str, scenario: Scenario, mode: Mode, *, quick: bool) -> UnitResult:
    name = f"{host}.tiny-bert.{scenario}.{mode}"
    kind = "accuracy" if mode is Mode.ACCURACY else "quick" if quick else "valid"
    folder = session.collect / host / name
    shutil.copytree(LOGS / f"{scenario.lower()}-{kind}", folder)
    if mode is Mode.ACCURACY:
        (folder / "accuracy.txt").write_text(ACCURACY_TXT)
        (folder / "mlperf_log_accuracy.json").write_bytes(accuracy_log())
    summary = loadgen_log.summarise((folder / "mlperf_log_detail.txt").read_text())
    return UnitResult(
        unit=name,
        host=host,
        system_id=host,
        benchmark="tiny-bert",
        scenario=scenario,
        mode=mode,
        backend="pytorch",
        state=UnitState.DONE,
        cause="",
        summary=summary,
        accuracy={"F1": 88.25} if mode is Mode.ACCURACY else {},
        submittable=not quick,
        not_submittable_because=("quick run",) if quick else (),
        labels=("demo model",),
        loadgen_s=601.0,
        started_at=0.0,
        versions={"torch": "2.13.0", "mlcommons-loadgen": "6.0.17"},
        model=MODEL,
        folder=str(folder.relative_to(session.root)),
    )


def accuracy_log() -> bytes:
    """As long and as shaped as an untruncated mlperf_log_accuracy.json."""
    rows = (f'{{ "seq_id" : {i}, "qsl_idx" : {i}, "data" : "{i:08X}" }}' for i in range(10833))
    return ("[\n" + ",\n".join(rows) + "\n]\n").encode()
