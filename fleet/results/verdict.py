"""May this unit's number be submitted, and if not, every reason in words. Pure; select.py of submission trusts it.

Rules: the checker's performance and accuracy checks at mlcommons/inference b66003e1, taken strictly: LoadGen's
verdict and errors count here although that checker, by a bug, lets both pass in v6.x.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fleet.harness.contract import RANDOM_WEIGHTS, SIMULATED, RunManifest, RunSpec
from fleet.mlperf.rules import BenchmarkRule, Round
from fleet.results.records import LoadgenSummary
from fleet.terms import Division, Mode, Scenario, UnitState

NULL_BACKEND = "null"
_TOLERANCE = 1e-3
"""accuracy.txt may be rounded; the manifest is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of one unit when its files have been read."""

    spec: RunSpec
    state: UnitState
    cause: str
    """Why it did not end well, or why its files are not here or cannot be read."""
    manifest: RunManifest | None
    summary: LoadgenSummary | None
    accuracy: Mapping[str, float]
    labels: tuple[str, ...]


def reasons(evidence: Evidence, benchmark: BenchmarkRule, round_: Round, division: str) -> tuple[str, ...]:
    """Every reason against submitting; empty when the unit can be submitted."""
    found = [*_run(evidence)]
    if evidence.summary is not None:
        found += _log(evidence, evidence.summary)
        if evidence.spec.mode is Mode.PERFORMANCE:
            found += _performance(evidence.spec, evidence.summary, benchmark, round_, division)
        else:
            found += _accuracy(evidence, evidence.summary, benchmark)
    return tuple(dict.fromkeys(found))


def _run(evidence: Evidence) -> Iterator[str]:
    if evidence.state is not UnitState.DONE:
        yield f"{evidence.state}: {evidence.cause}" if evidence.cause else str(evidence.state)
    elif evidence.summary is None:
        yield evidence.cause or "not collected"
    if evidence.spec.quick:
        yield "quick run"
    if evidence.spec.backend == NULL_BACKEND or SIMULATED in evidence.labels:
        yield "simulated: the null backend computes nothing"
    if RANDOM_WEIGHTS in evidence.labels:
        yield "random weights"


def _log(evidence: Evidence, summary: LoadgenSummary) -> Iterator[str]:
    spec = evidence.spec
    if summary.scenario is not spec.scenario:
        yield f"the log is of {summary.scenario}, planned was {spec.scenario}"
    if (summary.valid is None) is not (spec.mode is Mode.ACCURACY):
        yield f"the log is not of {spec.mode} mode"
    if evidence.manifest is not None and evidence.manifest.unit != spec.unit:
        yield f"the manifest is of {evidence.manifest.unit}"
    if summary.errors:
        yield f"LoadGen logged {summary.errors} error{'s' if summary.errors > 1 else ''}"


def _performance(
    spec: RunSpec, summary: LoadgenSummary, benchmark: BenchmarkRule, round_: Round, division: str
) -> Iterator[str]:
    if summary.valid is False:
        yield f"INVALID: {'; '.join(summary.invalid_reasons)}"
    if summary.metric is None:
        yield f"LoadGen wrote no figure for {spec.scenario}"
    # accuracy runs issue each sample once, and no checker looks at their seeds
    if wrong := sorted(name for name, seed in round_.seeds.items() if summary.seeds.get(name) != seed):
        yield f"{', '.join(wrong)}: not the seed of round {round_.name} (LoadGen {summary.loadgen_version})"
    if summary.min_duration_ms < round_.min_duration_ms:
        yield f"min_duration {summary.min_duration_ms / 1000:g} s, the round wants {round_.min_duration_ms / 1000:g} s"
    if summary.performance_sample_count < benchmark.performance_samples:
        yield f"{summary.performance_sample_count} of {benchmark.performance_samples} performance samples"
    too_few = spec.scenario is Scenario.OFFLINE and summary.samples_per_query < benchmark.samples
    if too_few and division == Division.CLOSED:  # this checker asks for it in closed only
        yield f"{summary.samples_per_query} Offline samples, closed wants {benchmark.samples}"


def _accuracy(evidence: Evidence, summary: LoadgenSummary, benchmark: BenchmarkRule) -> Iterator[str]:
    if missing := [metric for metric in benchmark.metrics if metric not in evidence.accuracy]:
        yield f"accuracy missing: accuracy.txt has no {', '.join(missing)}"
    covered = min(summary.accuracy_sample_count or 0, evidence.spec.sample_count)
    if covered < benchmark.samples:
        yield f"{covered} of {benchmark.samples} samples: not the whole dataset"
    told = evidence.manifest.accuracy if evidence.manifest else {}
    both = told.keys() & evidence.accuracy.keys()
    if any(abs(told[name] - evidence.accuracy[name]) > _TOLERANCE for name in both):
        yield "accuracy.txt and manifest.json disagree"
