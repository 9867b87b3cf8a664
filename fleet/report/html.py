"""SessionResults -> report/index.html: one file that opens offline. The only import of jinja2.

Everything a host said is text to jinja's autoescape, data in JSON blocks to the charts, and a Content-Security-Policy
with a nonce forbids every script but the page's own and every request.
"""

import secrets
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import jinja2

from fleet import __version__
from fleet.report import charts, frames
from fleet.results import dollars
from fleet.results.export import METRICS
from fleet.results.records import SessionResults, UnitResult, missing_as
from fleet.session import Session

EXPLAINED = {
    "demo model": "A small model that ships with fleet. It shows that the fleet works from end to end; "
    "its numbers say nothing about the official benchmark's model.",
    "random weights": "The model's weights are random: speed may be real, accuracy is meaningless.",
    "simulated": "The null backend computes nothing: these numbers measure LoadGen and the harness, not the machine.",
}
"""What a label means to somebody who sees the report first."""


def write(session: Session, results: SessionResults) -> Path:
    """Write the report and return its path.

    Raises OSError when the session cannot be written to.
    """
    path = session.report / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("index.html.partial")
    partial.write_text(render(results), encoding="utf-8")
    partial.replace(path)
    return path


def render(results: SessionResults) -> str:
    """The whole page. Plotly's 5 MB come along only when there is a chart to draw."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fleet.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["words"] = _words
    environment.filters["scores"] = _scores
    environment.filters["dollars"] = dollars.dollars
    environment.filters["hourly"] = dollars.hourly
    drawn = charts.charts(frames.measured(results))
    labels = list(dict.fromkeys(label for unit in results.units for label in unit.labels))
    return environment.get_template("report.html.j2").render(
        results=results,
        benchmarks=_benchmarks(results),
        charts=drawn,
        plotlyjs=charts.library() if drawn else "",
        labels=[(label, EXPLAINED.get(label, "")) for label in labels],
        units={unit.unit: unit for unit in results.units},
        missing_hosts=[(system, missing_as(system)) for system in results.missing_hosts],
        missing_units=_grouped((unit, (unit.outcome, unit.cause, unit.history)) for unit in results.missing_units),
        system_warnings=[(system.host, text) for system in results.systems for text in system.warnings],
        unit_remarks=_grouped(
            (unit, (*unit.warnings, *([unit.history] if unit.history else [])))
            for unit in results.units
            if unit.warnings or unit.history
        ),
        refused=_grouped(
            (unit, unit.not_submittable_because) for unit in results.units if unit.measured and not unit.submittable
        ),
        cost_lines=dollars.lines(results.cost) if results.cost else [],
        measured_usd=_measured(results),
        submittable=sum(unit.submittable for unit in results.units),
        nonce=secrets.token_urlsafe(16),
        version=__version__,
    )


def number(value: float | None) -> str:
    """For people: about four digits, thousands separated; a dash for none."""
    if value is None:
        return "-"
    size = abs(value)
    if size >= 1000 or value == 0:  # noqa: PLR2004
        return f"{value:,.0f}"
    decimals = 1 if size >= 100 else 2 if size >= 10 else 3  # noqa: PLR2004
    return f"{value:.{decimals}f}" if size >= 0.01 else f"{value:.3g}"  # noqa: PLR2004


def _grouped(found: Iterable[tuple[UnitResult, tuple[str, ...]]]) -> list[tuple[str, list[str], tuple[str, ...]]]:
    """Host, its units that share a fate, and that fate: a lost host is one line, not one per unit."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for unit, fate in found:
        name = f"{unit.benchmark} {unit.scenario} {unit.mode}"
        groups.setdefault((unit.host, fate), []).append(name)
    return [(host, units, fate) for (host, fate), units in groups.items()]


def _scores(row: dict[Hashable, Any]) -> list[tuple[str, float]]:
    """The accuracy metrics that a row has; exact_match says nothing that F1 does not."""
    return [(name, row[name]) for name in METRICS if row[name] is not None and name != "exact_match"]


def _words(text: str | None) -> list[str]:
    return [word for word in (text or "").split("; ") if word]


def _measured(results: SessionResults) -> dict[str, float | None]:
    """Host to the dollars of its units' time; None where no unit's is known."""
    found: dict[str, float | None] = {system.host: None for system in results.systems}
    for unit in results.units:
        if unit.usd is not None:
            found[unit.host] = (found[unit.host] or 0.0) + unit.usd
    return found


def _benchmarks(results: SessionResults) -> dict[str, list[dict[Hashable, Any]]]:
    """Benchmark to its rows, hosts in the session's order: no ranking."""
    order = {system.host: place for place, system in enumerate(results.systems)}
    rows = sorted(frames.records(frames.scenarios(results)), key=lambda row: order[row["host"]])
    return {name: [r for r in rows if r["benchmark"] == name] for name in sorted({str(r["benchmark"]) for r in rows})}
