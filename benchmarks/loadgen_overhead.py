"""What the harness adds to LoadGen: the null backend, which answers at once, against a minimal Python SUT.

    python benchmarks/loadgen_overhead.py [--repeat 5] [--batch-size 1024]

Each test runs in a process of its own, on the same QSL size and settings; they take turns, and the order turns from
round to round. Prints Offline samples/s and mean SingleStream latency with the harness's ratio or difference to the
minimal SUT: medians over the rounds, and their spread. The bounds are for `minimal`, made with ConstructSUT as
everybody does; `fast` is the same SUT made with ConstructFastSUT, as the harness is.
"""

import json
import operator
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fleet.harness import assets, contract, loadgen  # noqa: E402
from fleet.harness.contract import Mode, RunSpec, Scenario  # noqa: E402

SAMPLES = 10_833
WHO = ["minimal", "fast", "harness"]
SETTINGS = {
    # 2,750,000 samples in one query, which is over in two or three seconds: INVALID as too short, but measured.
    Scenario.OFFLINE: "*.Offline.min_duration = 5000\n*.Offline.target_qps = 500000\n",
    Scenario.SINGLE_STREAM: "*.SingleStream.min_duration = 3000\n*.SingleStream.target_latency = 0.02\n",
}


def minimal(folder: Path, scenario: Scenario, *, fast: bool) -> None:
    """The least that a Python SUT can do: no data, one response a sample, in LoadGen's own thread."""
    import mlperf_loadgen as lg

    def issue(samples: list[lg.QuerySample]) -> None:
        lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0) for sample in samples])

    def issue_fast(identifiers: list[int], _: list[int]) -> None:
        lg.QuerySamplesComplete([lg.QuerySampleResponse(identifier, 0, 0) for identifier in identifiers])

    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, scenario.value)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.FromConfig(str(folder / "user.conf"), "bert", scenario.value, 1)
    output = lg.LogOutputSettings()
    output.outdir = str(folder)
    log = lg.LogSettings()
    log.log_output = output
    log.enable_trace = False
    sut = lg.ConstructFastSUT(issue_fast, lambda: None) if fast else lg.ConstructSUT(issue, lambda: None)
    qsl = lg.ConstructQSL(SAMPLES, SAMPLES, lambda _: None, lambda _: None)
    lg.StartTestWithLogSettings(sut, qsl, settings, log, str(folder / "audit.config"))
    lg.DestroyQSL(qsl)
    (lg.DestroyFastSUT if fast else lg.DestroySUT)(sut)


def spec(work: Path, scenario: Scenario, batch_size: int) -> RunSpec:
    """The same test for the harness."""
    return RunSpec(
        unit="u", session="s", host="h", benchmark="tiny-bert", module="tiny", loadgen_model="bert",
        scenario=scenario, mode=Mode.PERFORMANCE, backend="null",
        backend_options={"latency_ms": 0, "batch_size": batch_size}, user_conf=SETTINGS[scenario],
        sample_count=SAMPLES, performance_sample_count=SAMPLES, deadline_s=60,
        expected_s=5, work_dir=str(work), round="v6.1", loadgen_version=loadgen.version(), quick=False,
    )  # fmt: skip


def figure(folder: Path) -> float:
    """Samples/s, or mean latency in µs."""
    text = (folder / "mlperf_log_summary.txt").read_text(encoding="utf-8")
    if match := re.search(r"^Samples per second: ([0-9.e+]+)", text, re.MULTILINE):
        return float(match[1])
    match = re.search(r"^Mean latency \(ns\) *: ([0-9]+)", text, re.MULTILINE)
    if match is None:
        raise SystemExit(f"LoadGen wrote no figure:\n{text}")
    return int(match[1]) / 1000


def measured(who: str, work: Path, scenario: Scenario, batch_size: int) -> float:
    """One test in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "user.conf").write_text(SETTINGS[scenario], encoding="utf-8")
        contract.write_json(folder / "run_spec.json", spec(work, scenario, batch_size))
        command = [sys.executable, __file__, "--only", who, "--scenario", scenario.value, "--folder", name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        aside = folder / "first_attempt"
        return figure(aside if aside.is_dir() else folder)


def turn(work: Path, scenario: Scenario, batch_size: int, at: int) -> dict[str, float]:
    """Round `at`: one right after the other, each in every place in turn."""
    first = at % len(WHO)
    return {who: measured(who, work, scenario, batch_size) for who in WHO[first:] + WHO[:first]}


def said(
    rounds: list[dict[str, float]], what: str, compare: Callable[[float, float], float], form: str, bound: str
) -> None:
    """Print the medians, and what the rounds come to: median and spread."""
    medians = {who: statistics.median(item[who] for item in rounds) for who in WHO}
    print(f"{what}: " + ", ".join(f"{who} {value:,.{form}f}" for who, value in medians.items()))
    for who in WHO[:2]:
        each = [compare(item["harness"], item[who]) for item in rounds]
        print(f"  to {who}: {statistics.median(each):.2f} (rounds {min(each):.2f} to {max(each):.2f})"
              + (f", bound {bound}" if who == "minimal" else ""))  # fmt: skip


@click.command()
@click.option("--repeat", default=5, show_default=True)
@click.option("--batch-size", default=1024, show_default=True, help="The null backend's.")
@click.option("--only", type=click.Choice(WHO), hidden=True)
@click.option("--scenario", type=click.Choice([item.value for item in SETTINGS]), hidden=True)
@click.option("--folder", type=Path, hidden=True)
def main(repeat: int, batch_size: int, only: str | None, scenario: str, folder: Path) -> None:
    """Measure, and print."""
    if only in {"minimal", "fast"}:
        minimal(folder, Scenario(scenario), fast=only == "fast")
        return
    if only == "harness":
        from fleet.harness import run

        run.main(folder)
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        assets.prepare(work, "tiny-bert", "tiny", "benchmark")
        found = {item: [turn(work, item, batch_size, at) for at in range(repeat)] for item in SETTINGS}
    said(found[Scenario.OFFLINE], "Offline, samples/s", operator.truediv, "0", "at least 0.8")
    said(found[Scenario.SINGLE_STREAM], "SingleStream, µs a query", operator.sub, "1", "at most 20")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
