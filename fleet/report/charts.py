"""Frames -> plotly figures as plain JSON values, one per benchmark and scenario. The only import of plotly.

Colours, fonts and background come from the page's style sheet, so that one figure serves light, dark and paper.
"""

import html
import json
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

COLOURS = ("#2f6fc9", "#e69f00", "#cc5f8a", "#2a9d74")
"""Told apart by people with colour-blindness, and readable on white and on dark grey."""
PERCENTILES = {"latency_p50_ms": "p50", "latency_p90_ms": "p90", "latency_p99_ms": "p99"}
THROUGHPUT = ("Offline", "Server")
LATENCY = ("SingleStream", "MultiStream", "Server")
POSITIONS = ("top center", "bottom center", "middle right", "middle left")
"""In turn, so that the names of neighbouring points stay readable."""
LOG_FROM = 30
"""Ratio of the largest to the smallest value from which the scatter's axes are logarithmic."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure with the words around it."""

    title: str
    note: str
    remarks: tuple[str, ...]
    """What holds for every number in it: `demo model`; what holds for one system stands beside its name."""
    figure: dict[str, Any]
    """`data` and `layout` for Plotly.newPlot."""


def charts(measured: pd.DataFrame) -> list[Chart]:
    """Every chart that `frames.measured` has numbers for."""
    found: list[Chart] = []
    for benchmark, rows in measured.groupby("benchmark", sort=True):
        for scenario, mine in rows.groupby("scenario", sort=True):
            if scenario in THROUGHPUT:
                found.append(_throughput(str(benchmark), str(scenario), mine))
            if scenario in LATENCY and mine[list(PERCENTILES)].notna().to_numpy().any():
                found.append(_latency(str(benchmark), str(scenario), mine))
        found += _tradeoff(str(benchmark), rows)
        found += _worth(str(benchmark), rows)
    return found


def library() -> str:
    """plotly.js, about 5 MB, to stand in the page itself."""
    text: str = get_plotlyjs()
    return text


def _throughput(benchmark: str, scenario: str, rows: pd.DataFrame) -> Chart:
    unit = str(rows["metric_unit"].iloc[0])
    values = [float(value) for value in rows["value"]]
    bar = go.Bar(
        x=values,
        y=_names(rows),
        orientation="h",
        marker={"color": COLOURS[0]},
        text=[f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in values],  # noqa: PLR2004
        textposition="auto",
        hovertemplate="%{y}<br>%{x:,.6g} " + html.escape(unit) + "<extra></extra>",
    )
    figure = _bars([bar], unit, len(values))
    return Chart(f"{benchmark} {scenario}: throughput", "Longer is faster.", _common(rows), figure)


def _latency(benchmark: str, scenario: str, rows: pd.DataFrame) -> Chart:
    bars = [
        go.Bar(
            x=_floats(rows[column]),
            y=_names(rows),
            name=name,
            orientation="h",
            marker={"color": COLOURS[index]},
            hovertemplate="%{y}<br>" + name + " %{x:,.6g} ms<extra></extra>",
        )
        for index, (column, name) in enumerate(PERCENTILES.items())
    ]
    figure = _bars(bars, "ms", 2 * len(rows))
    note = "Shorter is faster. p99: 99 of 100 queries took no longer."
    return Chart(f"{benchmark} {scenario}: latency", note, _common(rows), figure)


def _tradeoff(benchmark: str, rows: pd.DataFrame) -> list[Chart]:
    """Throughput over latency, for systems that have both; nothing to compare below two of them."""
    keys = ["system_id", "backend"]
    offline = rows[rows["scenario"] == "Offline"]
    single = rows[rows["scenario"] == "SingleStream"].dropna(subset=["latency_p90_ms"])
    both = offline.merge(single[[*keys, "latency_p90_ms"]], on=keys, suffixes=("", "_single"))
    if both["system_id"].nunique() < 2:  # noqa: PLR2004
        return []
    across = ("SingleStream p90 latency, ms", "%{x:,.4g} ms")
    note = "Up and to the left is faster in both."
    figure = _points(both, both["latency_p90_ms_single"], across, str(both["metric_unit"].iloc[0]))
    return [Chart(f"{benchmark}: throughput and latency", note, _common(both), figure)]


def _worth(benchmark: str, rows: pd.DataFrame) -> list[Chart]:
    """Throughput over dollars per million, for systems with a price; nothing to compare below two of them."""
    offline = rows[rows["scenario"] == "Offline"].dropna(subset=["usd_per_million"])
    if offline["system_id"].nunique() < 2:  # noqa: PLR2004
        return []
    unit, things = str(offline["metric_unit"].iloc[0]), str(offline["million_of"].iloc[0])
    across = (f"US dollars per million {things}", "$%{x:,.4g} / M " + things)
    note = "Up is faster, left is cheaper. By the prices below."
    return [
        Chart(
            f"{benchmark}: throughput and cost",
            note,
            _common(offline),
            _points(offline, offline["usd_per_million"], across, unit),
        )
    ]


def _points(rows: pd.DataFrame, x: "pd.Series[Any]", across: tuple[str, str], unit: str) -> dict[str, Any]:
    """Offline throughput of each system over `x`; `across` is its axis and how hovering says it."""
    along, up = _floats(x), _floats(rows["value"])
    points = go.Scatter(
        x=along,
        y=up,
        text=_names(rows),
        mode="markers+text",
        textposition=[POSITIONS[place % len(POSITIONS)] for place in range(len(rows))],
        cliponaxis=False,
        marker={"size": 11, "color": COLOURS[0]},
        hovertemplate="%{text}<br>" + across[1] + ", %{y:,.5g} " + html.escape(unit) + "<extra></extra>",
    )
    layout = {
        **_layout(380),
        "margin": {"l": 70, "r": 90, "t": 30, "b": 50},
        "xaxis": {**_axis(across[0]), "type": _scale(along)},
        "yaxis": {**_axis(f"Offline, {unit}"), "type": _scale(up)},
    }
    return _plain(go.Figure([points], layout))


def _bars(bars: list[go.Bar], unit: str, lines: int) -> dict[str, Any]:
    layout = {
        **_layout(100 + 26 * lines),
        "barmode": "group",
        "bargap": 0.25,
        "legend": {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        "margin": {"l": 10, "r": 30, "t": 30, "b": 45},
        "xaxis": {**_axis(unit), "rangemode": "tozero"},
        # the first system on top, as in the tables
        "yaxis": {"automargin": True, "autorange": "reversed", "type": "category", "ticksuffix": "  "},
    }
    return _plain(go.Figure(bars, layout))


def _layout(height: int) -> dict[str, Any]:
    clear = "rgba(0,0,0,0)"
    return {
        "template": "none",
        "height": height,
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "hoverlabel": {"align": "left"},
    }


def _axis(title: str) -> dict[str, Any]:
    grid = "rgba(128,128,128,0.25)"
    return {"title": {"text": title}, "gridcolor": grid, "zerolinecolor": grid, "automargin": True}


def _scale(values: list[float | None]) -> str:
    known = [value for value in values if value]
    return "log" if known and min(known) > 0 and max(known) / min(known) >= LOG_FROM else "linear"


def _common(rows: pd.DataFrame) -> tuple[str, ...]:
    shared = set.intersection(*(set(remarks) for remarks in rows["remarks"]))
    return tuple(sorted(shared))


def _names(rows: pd.DataFrame) -> list[str]:
    """Each system with what is said of it and not of all; escaped, for plotly reads a subset of HTML in texts."""
    common = set(_common(rows))
    names = []
    for system_id, remarks in zip(rows["system_id"], rows["remarks"], strict=True):
        own = [remark for remark in remarks if remark not in common]
        names.append(html.escape(f"{system_id} ({', '.join(own)})" if own else str(system_id)))
    return names


def _floats(column: "pd.Series[Any]") -> list[float | None]:
    return [None if pd.isna(value) else float(value) for value in column]


def _plain(figure: go.Figure) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(figure.to_json())
    return value
