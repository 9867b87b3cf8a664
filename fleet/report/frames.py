"""SessionResults -> the pandas frames that the report's tables and charts are made of. No IO."""

from collections.abc import Hashable
from typing import Any

import pandas as pd

from fleet.results.export import METRICS, units_frame
from fleet.results.records import SessionResults

KEYS = ["host", "system_id", "benchmark", "backend", "scenario"]
_PERFORMANCE = ["value", "metric_unit", "valid", "latency_p50_ms", "latency_p90_ms", "latency_p99_ms"]
_BOTH = ["unit", "state", "cause", "labels", "submittable", "reasons"]
_ACCURACY = [*METRICS]


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
    """Performance units with a number that LoadGen calls VALID, in the session's order of hosts: no ranking.

    The column `remarks` holds a tuple: what a reader must know beside the number.
    """
    frame = units_frame(results)
    chosen = frame[(frame["mode"] == "performance") & frame["value"].notna() & frame["valid"].fillna(value=False)]
    remarks = pd.Series([_remarks(row) for row in records(chosen)], index=chosen.index, dtype=object)
    order = {system.system_id: place for place, system in enumerate(results.systems)}
    return chosen.assign(remarks=remarks).sort_values("system_id", key=lambda ids: ids.map(order), kind="stable")


def records(frame: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """Rows as dicts of plain Python values, None for NA."""
    plain = frame.astype(object)
    return plain.where(plain.notna(), None).to_dict(orient="records")


def _remarks(row: dict[Hashable, Any]) -> tuple[str, ...]:
    texts = (*str(row["labels"] or "").split("; "), *str(row["warnings"] or "").split("; "))
    labels = tuple(text for text in texts if text)
    return (*labels, "quick run") if row["quick"] else labels
