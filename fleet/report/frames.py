"""SessionResults -> the pandas frames that the report's tables and charts are made of. No IO."""

from collections.abc import Hashable
from typing import Any

import pandas as pd

from fleet.results.export import units_frame
from fleet.results.records import SessionResults

KEYS = ["host", "system_id", "benchmark", "backend", "scenario"]
_PERFORMANCE = ["value", "metric_unit", "valid", "latency_p50_ms", "latency_p90_ms", "latency_p99_ms"]
_BOTH = ["state", "cause", "labels", "submittable", "reasons"]
_ACCURACY = ["F1", "exact_match"]


def scenarios(results: SessionResults) -> pd.DataFrame:
    """One row per host x benchmark x backend x scenario: its performance and its accuracy unit side by side.

    Columns of both units end in `_performance` and `_accuracy`; NA where such a unit was not planned.
    """
    frame = units_frame(results)
    sides = [
        frame[frame["mode"] == mode][KEYS + columns + _BOTH]
        for mode, columns in (("performance", _PERFORMANCE), ("accuracy", _ACCURACY))
    ]
    merged = sides[0].merge(sides[1], on=KEYS, how="outer", suffixes=("_performance", "_accuracy"), sort=False)
    return merged.sort_values(["benchmark", "host", "backend", "scenario"], kind="stable", ignore_index=True)


def measured(results: SessionResults) -> pd.DataFrame:
    """Performance units that have a number, with `name`: the system and what a reader must know beside the number."""
    frame = units_frame(results)
    chosen = frame[(frame["mode"] == "performance") & frame["value"].notna()].copy()
    chosen["name"] = [_name(row) for row in records(chosen)]
    return chosen.sort_values(["benchmark", "scenario", "system_id"], kind="stable", ignore_index=True)


def records(frame: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """Rows as dicts of plain Python values, None for NA."""
    plain = frame.astype(object)
    return plain.where(plain.notna(), None).to_dict(orient="records")


def _name(row: dict[Hashable, Any]) -> str:
    remarks = [remark for remark in str(row["labels"] or "").split("; ") if remark]
    remarks += ["quick run"] if row["quick"] else []
    remarks += ["INVALID"] if row["valid"] is False else []
    return f"{row['system_id']} ({', '.join(remarks)})" if remarks else str(row["system_id"])
