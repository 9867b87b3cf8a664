"""What the harness adds to LoadGen: the null backend, which answers at once, against a minimal Python SUT.

    python benchmarks/loadgen_overhead.py [--repeat 3]

Both run in turn, each test in a process of its own, on the same QSL size and settings. Prints Offline samples/s and
mean SingleStream latency of both with their ratio and difference; medians over the rounds.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fleet.harness import assets, contract, loadgen  # noqa: E402
from fleet.harness.contract import Mode, RunSpec, Scenario  # noqa: E402

SAMPLES = 10_833
SETTINGS = {
    # Enough for about five seconds at LoadGen's own speed.
    Scenario.OFFLINE: "*.Offline.min_duration = 5000\n*.Offline.target_qps = 500000\n",
    Scenario.SINGLE_STREAM: "*.SingleStream.min_duration = 3000\n*.SingleStream.target_latency = 0.02\n",
}


def minimal(folder: Path, scenario: Scenario) -> None:
    """The least that a Python SUT can do: no data, one response a sample, in LoadGen's own thread."""
    import mlperf_loadgen as lg

    def issue(samples: list[lg.QuerySample]) -> None:
        lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0) for sample in samples])

    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, scenario.value)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.FromConfig(str(folder / "user.conf"), "bert", scenario.value, 1)
    output = lg.LogOutputSettings()
    output.outdir = str(folder)
    log = lg.LogSettings()
    log.log_output = output
    log.enable_trace = False
    sut = lg.ConstructSUT(issue, lambda: None)
    qsl = lg.ConstructQSL(SAMPLES, SAMPLES, lambda _: None, lambda _: None)
    lg.StartTestWithLogSettings(sut, qsl, settings, log, str(folder / "audit.config"))
    lg.DestroyQSL(qsl)
    lg.DestroySUT(sut)


def spec(work: Path, scenario: Scenario) -> RunSpec:
    """The same test for the harness."""
    return RunSpec(
        unit="u", session="s", host="h", benchmark="tiny-bert", module="tiny", loadgen_model="bert",
        scenario=scenario, mode=Mode.PERFORMANCE, backend="null", backend_options={"latency_ms": 0, "batch_size": 1024},
        user_conf=SETTINGS[scenario], sample_count=SAMPLES, performance_sample_count=SAMPLES, deadline_s=60,
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


def measured(who: str, work: Path, scenario: Scenario) -> float:
    """One test in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "user.conf").write_text(SETTINGS[scenario], encoding="utf-8")
        contract.write_json(folder / "run_spec.json", spec(work, scenario))
        command = [sys.executable, __file__, "--only", who, "--scenario", scenario.value, "--folder", name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        aside = folder / "first_attempt"
        return figure(aside if aside.is_dir() else folder)


@click.command()
@click.option("--repeat", default=3, show_default=True)
@click.option("--only", type=click.Choice(["minimal", "harness"]), hidden=True)
@click.option("--scenario", type=click.Choice([item.value for item in SETTINGS]), hidden=True)
@click.option("--folder", type=Path, hidden=True)
def main(repeat: int, only: str | None, scenario: str, folder: Path) -> None:
    """Measure, and print."""
    if only == "minimal":
        minimal(folder, Scenario(scenario))
        return
    if only == "harness":
        from fleet.harness import run

        run.main(folder)
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        assets.prepare(work, "tiny-bert", "tiny", "benchmark")
        found = {
            (item, who): [measured(who, work, item) for _ in range(repeat)]
            for item in SETTINGS
            for who in ("minimal", "harness")
        }
    rates = {who: statistics.median(found[Scenario.OFFLINE, who]) for who in ("minimal", "harness")}
    print(f"Offline, samples/s: minimal {rates['minimal']:,.0f}, harness {rates['harness']:,.0f}, "
          f"ratio {rates['harness'] / rates['minimal']:.2f}, bound 0.8")  # fmt: skip
    times = {who: statistics.median(found[Scenario.SINGLE_STREAM, who]) for who in ("minimal", "harness")}
    print(f"SingleStream, µs a query: minimal {times['minimal']:.1f}, harness {times['harness']:.1f}, "
          f"added {times['harness'] - times['minimal']:.1f}, bound 20")  # fmt: skip
    print(json.dumps({f"{item} {who}": values for (item, who), values in found.items()}))


if __name__ == "__main__":
    main()
