"""Every demo benchmark in every scenario on every backend that installs here, through the real LoadGen.

The table of what came out is printed at the end of the run, whatever its verdict: `pytest -s` or the last test's output.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet.harness import assets, contract, loadgen
from fleet.harness.contract import Mode, RunSpec, Scenario
from fleet.mlperf import rules
from fleet.results import loadgen_log
from tests.unit.harness.units import TOP

SAMPLES = 64
TRIES = 3
"""A target is found in a moment, and other work on this machine may begin, or be over, in the next."""
BACKENDS = ("pytorch", "onnxruntime", "tensorflow", "openai")
BENCHMARKS = ("tiny-bert", "tiny-gptj")
# Short enough for a test and long enough for LoadGen: early stopping wants 64 queries at the 90th percentile.
CONF = {
    Scenario.SINGLE_STREAM: "min_duration = 300",
    Scenario.MULTI_STREAM: "min_duration = 300\n*.MultiStream.target_latency_percentile = 90",
    Scenario.OFFLINE: "min_duration = 300",
    Scenario.SERVER: "min_duration = 300\n*.Server.target_latency = 5000\n*.Server.target_latency_percentile = 90\n"
    "*.Server.ttft_latency = 5000\n*.Server.tpot_latency = 5000\n*.Server.target_qps = 8",
}
FOUND: dict[tuple[str, str, Scenario], str] = {}
OFTEN = {("tiny-bert", "pytorch"), ("tiny-gptj", "pytorch")}
"""Tried in every scenario by `make test`; the others in one, and in all of them by `make test-thorough`."""
UNITS = [
    pytest.param(
        (name, backend, scenario),
        id=f"{name}-{backend}-{scenario}",
        marks=() if (name, backend) in OFTEN or scenario is Scenario.OFFLINE else pytest.mark.thorough,
    )
    for name in BENCHMARKS
    for backend in BACKENDS
    for scenario in Scenario
    if backend in rules.load_benchmark(name).backends
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host's work folder with both demo benchmarks prepared."""
    folder = tmp_path_factory.mktemp("work")
    for name in BENCHMARKS:
        assets.prepare(folder, name, rules.load_benchmark(name).module, "test")
    return folder


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A serving engine with tiny-gptj."""
    model = TOP / "fleet" / "harness" / "benchmarks" / "tiny_gptj"
    with subprocess.Popen(
        [sys.executable, "-m", "tests.serving", str(model)], stdout=subprocess.PIPE, text=True, cwd=TOP
    ) as server:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        yield f"http://127.0.0.1:{port}/v1"
        server.kill()


def options(backend: str, endpoint: str) -> dict[str, Any]:
    if backend == "openai":
        return {"endpoint": endpoint, "concurrency": 2, "timeout_s": 30}
    return {"threads": 1}


def spec(work: Path, name: str, backend: str, scenario: Scenario, given: dict[str, Any]) -> RunSpec:
    rule = rules.load_benchmark(name)
    return RunSpec(
        unit="u", session="s", host="h", benchmark=name, module=rule.module, loadgen_model=rule.loadgen_model,
        scenario=scenario, mode=Mode.PERFORMANCE, backend=backend, backend_options=given,
        user_conf=f"*.{scenario}.{CONF[scenario]}\n", sample_count=SAMPLES, performance_sample_count=SAMPLES,
        deadline_s=100, expected_s=5, work_dir=str(work), round="v6.1", loadgen_version=loadgen.version(), quick=True,
    )  # fmt: skip


def run(folder: Path) -> tuple[int, str]:
    """The unit in a process of its own, started once more when it asks for it."""
    environment = {**os.environ, "PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"}
    said = ""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "fleet.harness", "run", str(folder)],
            capture_output=True, text=True, cwd=folder, env=environment, check=False, timeout=120,
        )  # fmt: skip
        said += done.stdout + done.stderr
        if done.returncode == 0:
            break
    return done.returncode, said


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.timeout(300)
def test_a_unit_is_valid(
    unit: tuple[str, str, Scenario], work: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name, backend, scenario = unit
    endpoint = request.getfixturevalue("endpoint") if backend == "openai" else ""
    FOUND[unit] = "failed"
    for number in range(TRIES):
        folder = tmp_path / str(number)
        folder.mkdir()
        contract.write_json(folder / "run_spec.json", spec(work, name, backend, scenario, options(backend, endpoint)))
        code, said = run(folder)
        assert code == 0, said
        summary = loadgen_log.summarise((folder / "mlperf_log_detail.txt").read_text(encoding="utf-8"))
        if summary.valid:
            break
    FOUND[unit] = "VALID" if summary.valid else f"INVALID: {'; '.join(summary.invalid_reasons)}"
    assert summary.valid, f"{summary.invalid_reasons}\n{said}"
    assert summary.errors == 0
    assert summary.metric is not None
    FOUND[unit] = f"{summary.metric.value:.4g} {summary.metric.unit}"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["peak_memory_bytes"] > 0


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what came out; fails where the tests above were asked for and one left no entry."""
    if not FOUND:
        pytest.skip("none of the units was run")
    with capsys.disabled():
        print("\n\nvalid through LoadGen (64 samples, short runs, this machine: not a measurement)")
        print(f"{'':24}" + "".join(f"{scenario:>20}" for scenario in Scenario))
        for name in BENCHMARKS:
            for backend in BACKENDS:
                cells = [FOUND.get((name, backend, scenario), "-") for scenario in Scenario]
                print(f"{name + ' ' + backend:24}" + "".join(f"{cell:>20}" for cell in cells))
