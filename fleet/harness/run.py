"""One unit in this process: open the benchmark and backend, run LoadGen, evaluate, write the manifest last."""

import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import threading
import time
import traceback
from pathlib import Path

import fleet
from fleet.harness import contract, loadgen
from fleet.harness.contract import FileEntry, Mode, RunManifest, RunSpec, Scenario
from fleet.harness.interfaces import Backend, Benchmark
from fleet.harness.qsl import Samples
from fleet.harness.sut import SystemUnderTest, measure

WARM_UP_SECONDS = {False: 3.0, True: 1.0}
"""Length of the warm-up measurement, by `quick`."""
UNLISTED = frozenset({"manifest.json", "status.json", "progress"})
"""Files of a unit that the manifest cannot hold: itself, and what the supervisor goes on writing."""


def main(folder: Path) -> int:
    """Run the unit whose run_spec.json lies in `folder`; 0 when the manifest was written."""
    try:
        spec = contract.read_spec(folder / "run_spec.json")
        run(spec, folder)
    except Exception as error:  # noqa: BLE001 - whatever it was, the supervisor must learn the cause
        traceback.print_exc()
        cause = f"{type(error).__name__}: {error}".splitlines()[0] if str(error) else type(error).__name__
        contract.write_json(folder / "error.json", {"cause": cause[:500]})
        return 1
    return 0


def run(spec: RunSpec, folder: Path) -> RunManifest:
    """Execute `spec` in `folder` and write what the manifest promises."""
    started = time.time()
    work = Path(spec.work_dir).expanduser()
    module = importlib.import_module(f"fleet.harness.benchmarks.{spec.module}")
    benchmark: Benchmark = module.open(spec.benchmark, work / "assets" / spec.benchmark)
    backend: Backend = importlib.import_module(f"fleet.harness.backends.{spec.backend}").open(
        benchmark, spec.backend_options
    )
    measured: dict[str, float] = {}
    # Server sends at its target rate in accuracy mode too: at LoadGen's own value, one a second, it would take hours.
    if spec.mode is Mode.PERFORMANCE or spec.scenario is Scenario.SERVER:
        measured = measure(benchmark, backend, spec.scenario, seconds=WARM_UP_SECONDS[spec.quick])
    (folder / "user.conf").write_text(loadgen.user_conf(spec, measured), encoding="utf-8")
    samples = Samples(benchmark)
    sut = SystemUnderTest(benchmark, backend, samples, spec.scenario)
    ended = threading.Event()
    threading.Thread(target=_report_progress, args=(sut, folder, ended), daemon=True).start()
    try:
        seconds = loadgen.execute(
            spec, folder, issue=sut.issue, flush=sut.flush, load=samples.load, unload=samples.unload
        )
    finally:
        ended.set()
        try:
            sut.close()
        finally:
            backend.close()
    accuracy: dict[str, float] = {}
    if spec.mode is Mode.ACCURACY:
        accuracy = benchmark.evaluate(folder / "mlperf_log_accuracy.json", spec.sample_count)
        (folder / "accuracy.txt").write_text(benchmark.accuracy_text(accuracy), encoding="utf-8")
    _silence()
    manifest = RunManifest(
        unit=spec.unit,
        spec_sha256=sha256(folder / "run_spec.json"),
        started_at=started,
        finished_at=time.time(),
        loadgen_s=seconds,
        versions=versions(backend),
        accuracy=accuracy,
        model={**benchmark.model, **backend.model},
        labels=tuple(dict.fromkeys([*spec.labels, *backend.labels])),
        files=entries(folder),
    )
    contract.write_json(folder / "manifest.json", manifest)
    return manifest


def versions(backend: Backend) -> dict[str, str]:
    """What ran: Python, fleet, LoadGen, numpy and the backend's own."""
    return {
        "python": platform.python_version(),
        "mlperf-fleet": fleet.__version__,
        "mlcommons-loadgen": loadgen.version(),
        "numpy": importlib.metadata.version("numpy"),
        **backend.versions(),
    }


def entries(folder: Path) -> dict[str, FileEntry]:
    """sha256 and size of every regular file in `folder`, but those that cannot be listed."""
    return {
        path.relative_to(folder).as_posix(): FileEntry(sha256=sha256(path), size=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.name not in UNLISTED and path.suffix != ".partial"
    }


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _report_progress(sut: SystemUnderTest, folder: Path, ended: threading.Event) -> None:
    path = folder / "progress"
    partial = folder / "progress.partial"
    while not ended.wait(0.5):
        partial.write_text(json.dumps(sut.done), encoding="ascii")
        partial.replace(path)


def _silence() -> None:
    """harness.log is about to be hashed: whatever this process still prints goes nowhere."""
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
