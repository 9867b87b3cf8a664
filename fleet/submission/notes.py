"""The texts for people in a submission: how to reproduce, what is missing, what the numbers are not."""

from fleet.mlperf.rules import BenchmarkRule, load_round
from fleet.results import dollars
from fleet.results.records import SessionResults, System, UnitResult, missing_as
from fleet.submission.select import Entry, Left


def entry(results: SessionResults, one: Entry) -> str:
    """README.md beside measurements.json."""
    summary = one.performance.summary
    metric = summary.metric if summary else None
    lines = [
        f"# {one.benchmark.name}, {one.scenario}, on {one.system.system_id}",
        "",
        f"Measured by mlperf-fleet {results.fleet_version}, session `{results.session}`, round {results.round}.",
        "",
        f"- result: {f'{metric.value:g} {metric.unit}' if metric else 'none in the log'}",
        *(f"- accuracy: {name} {value:g}" for name, value in sorted(one.accuracy.accuracy.items())),
        f"- backend: {one.performance.backend}",
        f"- performance unit: `{one.performance.unit}`; accuracy unit: `{one.accuracy.unit}`",
        *_label_lines(one.performance.labels),
        *(f"- {unit.mode} unit: {text}" for unit in (one.performance, one.accuracy) for text in remarks(unit)),
        *(f"- warning: {text}" for text in one.system.warnings),
        "",
        "## Model",
        "",
        *(f"- {name}: {value}" for name, value in sorted(one.performance.model.items())),
        "",
        "## Software on the host",
        "",
        *(f"- {name} {version}" for name, version in sorted(one.performance.versions.items())),
        "",
        f"How to run it again: `src/{one.benchmark.name}/README.md`.",
    ]
    return _text(lines)


def source(results: SessionResults, rule: BenchmarkRule, entries: tuple[Entry, ...]) -> str:
    """src/<benchmark>/README.md: the open way to the same numbers."""
    versions = sorted({pair for one in entries for pair in one.performance.versions.items()})
    lines = [
        f"# How to reproduce {rule.name}",
        "",
        f"Task: {rule.task}. Official benchmark it stands for: {rule.official}. Metric: {', '.join(rule.metrics)}.",
        *_label_lines(rule.labels),
        "",
        f"The code is mlperf-fleet {results.fleet_version}; the benchmark is `fleet/harness/benchmarks/{rule.module}.py`",
        f"in it. LoadGen is the wheel `mlcommons-loadgen=={load_round(results.round).loadgen}`, which carries the seeds",
        f"of {results.round}.",
        "",
        "```",
        "fleet init         # then edit fleet.yml:",
        f"                   #   round: {results.round}",
        f"                   #   benchmarks: [{{name: {rule.name}}}]",
        "fleet bench",
        "```",
        "",
        "Wheels on the measured hosts:",
        "",
        *(f"- {name} {version}" for name, version in versions),
    ]
    return _text(lines)


def documentation(results: SessionResults, entries: tuple[Entry, ...], left: tuple[Left, ...]) -> str:
    """documentation/README.md: the first line says how much of the fleet is in it."""
    lines = [
        results.headline,
        "",
        f"Session `{results.session}`, made {results.created_at} by mlperf-fleet {results.fleet_version}.",
        "Each system is one machine; numbers of several machines are never added.",
        "",
        "## In this submission",
        "",
        *(f"- {one.system.system_id}: {one.benchmark.name} {one.scenario} (host {one.system.host})" for one in entries),
        "",
        "## Hosts that are missing",
        "",
        *([f"- {host_text(s)}" for s in results.missing_hosts] or ["none"]),
        "",
        "## Units that are missing",
        "",
        *([f"- {one.unit}: {one.reason}" for one in left] or ["none"]),
        "",
        "## Started more than once",
        "",
        *([f"- {unit.unit}: {unit.history}" for unit in results.units if unit.history] or ["none"]),
        "",
        "## Warnings",
        "",
        *([f"- {name}: {text}" for name, text in results.warnings] or ["none"]),
        *_cost_lines(results, entries),
    ]
    return _text(lines)


def _cost_lines(results: SessionResults, entries: tuple[Entry, ...]) -> list[str]:
    """Nothing where no host has a price: an unknown price is not 0."""
    if results.cost is None:
        return []
    per_unit = [
        f"- {one.system.system_id}: {one.benchmark.name} {one.scenario}: {dollars.per_million(one.performance)} "
        f"at {dollars.hourly(price.usd_per_hour)} an hour ({price.cited})"
        for one in entries
        if (price := one.performance.price) is not None
    ]
    return [
        "",
        "## What it cost",
        "",
        "Derived from the results and recorded prices; not an MLPerf metric, not verified by MLCommons Association.",
        "",
        *(f"- {line}" for line in dollars.lines(results.cost)),
        *per_unit,
    ]


def quick(results: SessionResults) -> str:
    """The file at the root of a tree that nobody may upload."""
    return _text(
        [
            results.headline,
            "",
            "# Not submittable",
            "",
            f"Session `{results.session}` is a quick run: its tests are shorter than {results.round} demands. This tree",
            "shows what a submission of this fleet would look like. Run again without `--quick` for one to upload.",
        ]
    )


def host_text(system: System) -> str:
    """A missing host in a line."""
    return f"{system.host}: {missing_as(system)}: {system.cause or 'no cause known'}"


def remarks(unit: UnitResult) -> list[str]:
    """Warnings and earlier starts of a unit whose number counts."""
    return [*(f"warning: {text}" for text in unit.warnings), *([unit.history] if unit.history else [])]


def _label_lines(labels: tuple[str, ...]) -> list[str]:
    return [f"- note: {label}" for label in labels]


def _text(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
