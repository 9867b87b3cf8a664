"""What would fail before anyone uploads: the rules as data, applied to a submission tree.

Stricter than the official checker where that has holes (section numbers are of its facts): a run must be VALID,
LoadGen must not have logged errors, an empty tree is no success, a missing log is called a missing log.
"""

from collections.abc import Generator, Iterator
from pathlib import Path

from fleet.mlperf.rules import BenchmarkRule, Round, benchmark_names, load_benchmark
from fleet.session import Session
from fleet.submission.check_files import DIVISIONS, check_files
from fleet.submission.check_runs import SCENARIOS, Place, RunFindings, check_runs, read_object
from fleet.submission.check_system import SYSTEM_TYPES, check_system
from fleet.submission.findings import Finding, Reporter, Severity, has_errors
from fleet.submission.layout import QUICK_NOTE, SubmissionLayout
from fleet.terms import Division

__all__ = ["Finding", "Severity", "check", "has_errors"]


def check(where: Session | Path, rules: Round) -> tuple[Finding, ...]:
    """Everything that is wrong with the session's submission tree, or with the tree in a folder.

    An empty tuple means that nothing is known to be wrong. All short runs together make one finding.
    """
    root = where.submission if isinstance(where, Session) else where
    report = Reporter(root)
    if not root.is_dir():
        return (report.error(root, "no results: there is no submission tree", "run `fleet submission`"),)
    findings = list(check_files(report))
    runs: list[RunFindings] = []
    for layout in _layouts(root, rules):
        findings.extend(_check_submitter(layout, rules, report, runs))
    if not runs:
        fix = "run `fleet submission`; the official checker calls an empty tree OK"
        findings.append(report.error(root, "no results in the tree", fix))
    quick = (root / QUICK_NOTE).is_file()
    for run in runs:
        findings.extend(run.plain)
        findings.extend([] if quick or run.short_ms is not None else run.timing)
        findings.extend([] if quick else run.coverage)
    findings.extend(_short(runs, rules, report, quick=quick))
    return tuple(findings)


def _layouts(root: Path, rules: Round) -> Iterator[SubmissionLayout]:
    for division in sorted(DIVISIONS):
        for home in sorted((root / division).glob("*/")):
            yield SubmissionLayout(root, division, home.name, rules.layout)


def _check_submitter(
    layout: SubmissionLayout, rules: Round, report: Reporter, runs: list[RunFindings]
) -> Iterator[Finding]:
    mapping = yield from _mapping(layout, rules, report)
    systems: dict[str, str] = {}
    official: dict[str, str] = {}
    for system, benchmark, scenario in layout.scenarios():
        if system not in systems:
            systems[system] = yield from _system_type(layout, system, rules, report)
        if benchmark not in official:
            official[benchmark] = _official(layout, benchmark, mapping, rules)
            yield from _check_benchmark(layout, benchmark, official[benchmark], report)
        rule = _rule_for(benchmark, official[benchmark])
        place = Place(layout, system, benchmark, scenario, rule, rules, report)
        yield from _check_scenario(place, systems[system])
        runs.append(check_runs(place))
    for path in sorted(layout.system_json("*").parent.glob("*.json")):
        if path.stem not in systems:
            yield report.warning(path, "the system has no results: checkers before v6 refuse that", "remove it")
    if layout.division != Division.OPEN and systems:
        message = f"fleet does not check the compliance runs that the {layout.division} division demands"
        yield report.warning(layout.home, message, "run the official checker as well")


def _mapping(layout: SubmissionLayout, rules: Round, report: Reporter) -> Generator[Finding, None, dict[str, str]]:
    path = layout.model_mapping
    if not path.exists():
        return {}
    data = read_object(path, report)
    if isinstance(data, Finding):
        yield data
        return {}
    for name, target in data.items():
        if target not in rules.benchmarks:
            message = f"{name} is mapped to {target!r}, which is no benchmark of {rules.name}"
            yield report.error(path, message, "map it to an official name")
    return {name: str(target) for name, target in data.items()}


def _system_type(
    layout: SubmissionLayout, system: str, rules: Round, report: Reporter
) -> Generator[Finding, None, str]:
    path = layout.system_json(system)
    data = read_object(path, report)
    if isinstance(data, Finding):
        yield data
        return ""
    yield from check_system(path, data, layout, rules, report)
    return str(data.get("system_type", ""))


def _check_benchmark(layout: SubmissionLayout, benchmark: str, official: str, report: Reporter) -> Iterator[Finding]:
    source = layout.source_dir(benchmark)
    if not source.parent.is_dir():
        yield report.error(source.parent, "the folder is missing", "put the benchmark's code or its recipe there")
    elif not source.is_dir():
        yield report.warning(source, "the folder is missing: checkers before v6 refuse that", "put a README.md there")
    if not official:
        message = f"{benchmark} is no official benchmark and model_mapping.json does not map it to one"
        yield report.error(layout.results_dir, message, "map it in model_mapping.json (open division only)")


def _official(layout: SubmissionLayout, benchmark: str, mapping: dict[str, str], rules: Round) -> str:
    """The official name, or empty; official names win over the mapping, as in the checker."""
    if benchmark in rules.benchmarks:
        return benchmark
    return mapping.get(benchmark, "") if layout.division == Division.OPEN else ""


def _rule_for(benchmark: str, official: str) -> BenchmarkRule | None:
    """Fleet's own rule of that name, else any that stands for the same official benchmark."""
    mine = [load_benchmark(name) for name in benchmark_names()]
    same = [rule for rule in mine if rule.official == official]
    return next((rule for rule in same if rule.name == benchmark), same[0] if same else None)


def _check_scenario(place: Place, system_type: str) -> Iterator[Finding]:
    path = place.layout.results_dir.joinpath(*place.key)
    if place.scenario.lower() not in SCENARIOS:
        yield place.report.error(path, f"{place.scenario} is no scenario", "name the folder as LoadGen does")
    elif place.rule and system_type in SYSTEM_TYPES:
        allowed = place.rule.scenarios_of(system_type)
        if place.scenario.lower() not in {scenario.lower() for scenario in allowed}:
            # The open division's checker does not look, the rules' table does.
            make = place.report.warning if place.layout.division == Division.OPEN else place.report.error
            message = f"{place.scenario} is not among the scenarios of {place.rule.official} for {system_type} systems"
            yield make(path, message, "leave the scenario out")


def _short(runs: list[RunFindings], rules: Round, report: Reporter, *, quick: bool) -> Iterator[Finding]:
    """One finding for all short runs, because they have one cause."""
    short = [run.short_ms for run in runs if run.short_ms is not None]
    if not short and not quick:
        return
    what = "a quick run, not submittable" if quick else "not submittable"
    message = what
    if short:
        message += (
            f": {len(short)} of {len(runs)} performance runs are short, the shortest was asked for "
            f"{min(short) / 1000:g} s and {rules.name} demands {rules.min_duration_ms / 1000:g} s"
        )
    yield report.error(report.root, message, "run again without --quick, and without min_duration in user.conf")
