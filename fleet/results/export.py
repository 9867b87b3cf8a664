"""SessionResults -> results.json, results.csv and results.parquet: one row per planned unit, measured or not."""

from typing import Any

import pandas as pd

from fleet.results.records import SessionResults, System, UnitResult, endings
from fleet.session import Session

NS_PER_MS = 1e6
SUMMARY_METRICS = ("ROUGE1", "ROUGE2", "ROUGEL", "ROUGELSUM", "GEN_LEN")
METRICS = ("F1", "exact_match", *SUMMARY_METRICS)
"""What accuracy.txt may hold; a unit has those of its benchmark."""
_DESCRIPTION = {
    # column to the system description's name
    "cpu_model": "host_processor_model_name",
    "cpu_sockets": "host_processors_per_node",
    "cpu_cores_per_socket": "host_processor_core_count",
    "memory": "host_memory_capacity",
    "accelerator": "accelerator_model_name",
    "accelerators": "accelerators_per_node",
    "operating_system": "operating_system",
    "framework": "framework",
}
_TYPES = {
    # pandas' nullable types, so that a unit without a number keeps its row and the column its type
    **dict.fromkeys(("value", "latency_p50_ms", "latency_p90_ms", "latency_p99_ms", "loadgen_s", *METRICS), "Float64"),
    **dict.fromkeys(("usd_per_hour", "usd", "usd_per_million"), "Float64"),
    **dict.fromkeys(("valid", "submittable", "quick"), "boolean"),
    **dict.fromkeys(
        ("starts", "queries", "loadgen_errors", "cpu_sockets", "cpu_cores_per_socket", "accelerators"), "Int64"
    ),
}


def export(session: Session, results: SessionResults) -> None:
    """Write the three files; the two tables hold the same rows as `units_frame`."""
    session.write(session.results / "results.json", results)
    frame = units_frame(results)
    for name, save in (("results.csv", _csv), ("results.parquet", _parquet)):
        partial = session.results / f"{name}.partial"
        save(frame, str(partial))
        partial.replace(session.results / name)


def units_frame(results: SessionResults) -> pd.DataFrame:
    """One row per unit: times in ms or s as named, lists joined by `; `, missing numbers as NA."""
    systems = {system.host: system for system in results.systems}
    rows = [_row(results, unit, systems[unit.host]) for unit in results.units]
    frame = pd.DataFrame(rows, columns=list(_COLUMNS))
    types = {column: _TYPES.get(column, "string") for column in _COLUMNS}
    return frame.astype(types)


def _row(results: SessionResults, unit: UnitResult, system: System) -> dict[str, Any]:
    return {
        "session": results.session,
        "round": results.round,
        "division": results.division,
        "quick": results.quick,
        **_outcome(unit),
        **_numbers(unit),
        "submittable": unit.submittable,
        "reasons": "; ".join(unit.not_submittable_because),
        "labels": "; ".join(unit.labels),
        "kind": system.kind,
        **{column: system.description.get(name) for column, name in _DESCRIPTION.items()},
        **{column: _whole(system.description.get(_DESCRIPTION[column])) for column in _DESCRIPTION if column in _TYPES},
        "host_state": str(system.state),
        "host_reason": str(system.reason),
        "host_cause": system.cause,
        "warnings": "; ".join(unit.warnings),
        "host_warnings": "; ".join(system.warnings),
        "loadgen_version": unit.summary.loadgen_version if unit.summary else None,
        "versions": "; ".join(f"{name} {version}" for name, version in sorted(unit.versions.items())),
        "folder": unit.folder,
        "usd_per_hour": unit.price.usd_per_hour if unit.price else None,
        "price_market": unit.price.market if unit.price else None,
        "price_source": unit.price.source if unit.price else None,
        "usd": unit.usd,
        "usd_per_million": unit.usd_per_million,
        "million_of": unit.million_of or None,
    }


def _outcome(unit: UnitResult) -> dict[str, Any]:
    return {
        "unit": unit.unit,
        "host": unit.host,
        "system_id": unit.system_id,
        "benchmark": unit.benchmark,
        "scenario": str(unit.scenario),
        "mode": str(unit.mode),
        "backend": unit.backend,
        "state": str(unit.state),
        "cause": unit.cause,
        "reason": str(unit.reason),
        "starts": unit.starts,
        "earlier_causes": "; ".join([*endings(unit.attempts), *(f"later: {text}" for text in endings(unit.later))]),
    }


def _numbers(unit: UnitResult) -> dict[str, Any]:
    summary = unit.summary
    metric = summary.metric if summary else None
    latencies = summary.latencies_ns if summary else {}
    return {
        "valid": summary.valid if summary else None,
        "metric": metric.key if metric else None,
        "value": metric.value if metric else None,
        "metric_unit": metric.unit if metric else None,
        **{f"latency_p{name[:2]}_ms": _ms(latencies.get(name)) for name in ("50.00", "90.00", "99.00")},
        **{name: unit.accuracy.get(name) for name in METRICS},
        "queries": summary.query_count if summary else None,
        "loadgen_errors": summary.errors if summary else None,
        "loadgen_s": unit.loadgen_s,
    }


_COLUMNS = (
    *("session", "round", "division", "quick"),
    *("unit", "host", "system_id", "benchmark", "scenario", "mode", "backend", "state", "cause"),
    *("valid", "metric", "value", "metric_unit", "latency_p50_ms", "latency_p90_ms", "latency_p99_ms"),
    *("F1", "exact_match", "queries", "loadgen_errors", "loadgen_s", "submittable", "reasons", "labels", "kind"),
    *_DESCRIPTION,
    *("loadgen_version", "versions", "folder"),
    *SUMMARY_METRICS,
    *("reason", "starts", "earlier_causes", "warnings"),
    *("host_state", "host_reason", "host_cause", "host_warnings"),
    *("usd_per_hour", "price_market", "price_source", "usd", "usd_per_million", "million_of"),
)
"""The tables' columns in order; a new one goes to the end."""


def _ms(nanoseconds: float | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / NS_PER_MS


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _csv(frame: pd.DataFrame, path: str) -> None:
    """Spreadsheets run cells that begin like a formula, and these texts come from hosts: such cells get a quote."""
    texts = [name for name in _COLUMNS if name not in _TYPES]
    safe = frame.assign(**{name: frame[name].str.replace(r"^(?=[=+\-@\t\r])", "'", regex=True) for name in texts})
    safe.to_csv(path, index=False)


def _parquet(frame: pd.DataFrame, path: str) -> None:
    frame.to_parquet(path, index=False)
