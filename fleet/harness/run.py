"""One unit in this process: open the benchmark and backend, run LoadGen, evaluate, write the manifest last."""

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import sys
import threading
import time
import traceback
from pathlib import Path

import fleet
from fleet.harness import contract, loadgen, reasons, space, spec_lock, tuning, whole_logs
from fleet.harness.contract import FileEntry, Mode, Reason, RunManifest, RunSpec, Scenario
from fleet.harness.interfaces import Backend, Benchmark
from fleet.harness.qsl import Samples
from fleet.harness.reasons import UnitError
from fleet.harness.supervise import REPEAT
from fleet.harness.sut import SystemUnderTest
from fleet.harness.wall_clock import WallClock

PROBE_SECONDS = {False: 10.0, True: 1.0}
"""Length of a tuning probe, by `quick`."""
FAILED_GRACE_S = 10.0
"""After a backend failed LoadGen may end by itself for so long; then it is ended, and its logs stay as they are."""
UNLISTED = frozenset({"manifest.json", "status.json", "progress", "cancel", "home"})
"""Files of a unit that the manifest cannot hold: itself, what the supervisor goes on writing, and markers."""


def main(folder: Path) -> int:
    """Run the unit whose run_spec.json lies in `folder`; 0 when the manifest was written, REPEAT to start again."""
    try:
        spec = contract.read_spec(folder / "run_spec.json")
        return run(spec, folder)
    except Exception as error:  # noqa: BLE001 - whatever it was, the supervisor must learn the cause
        # First what others read: on a full disk there may be room for that alone.
        _say_why(folder, error)
        with contextlib.suppress(OSError):
            traceback.print_exc()
        return 1


def _say_why(folder: Path, error: BaseException) -> None:
    cause = f"{type(error).__name__}: {error}".splitlines()[0] if str(error) else type(error).__name__
    assets = folder.parents[2] / "assets"
    with contextlib.suppress(OSError):
        told = {"cause": cause[:500], "reason": reasons.of(error, assets).value}
        space.write(folder / "error.json", told, folder.parent)


def run(spec: RunSpec, folder: Path) -> int:
    """Execute `spec` in `folder` and write what the manifest promises."""
    started, began = time.time(), time.monotonic()
    spec_lock.verify(spec.lock)
    work = Path(spec.work_dir).expanduser()
    module = importlib.import_module(f"fleet.harness.benchmarks.{spec.module}")
    benchmark: Benchmark = module.open(spec.benchmark, work / "assets" / spec.benchmark)
    if spec.sample_count > benchmark.sample_count:
        raise UnitError(
            f"{spec.benchmark} has {benchmark.sample_count} samples here, {spec.sample_count} are asked for:"
            " bring the official dataset, then: fleet provision",
            Reason.MISSING_ASSET,
        )
    spec_lock.verify_weights(spec.lock, benchmark)
    backend: Backend = importlib.import_module(f"fleet.harness.backends.{spec.backend}").open(
        benchmark, spec.backend_options
    )
    measured = _targets(spec, folder, benchmark, backend, began)
    seconds = 0.0
    accuracy: dict[str, float] = {}
    if not spec.tune_only:
        (folder / "user.conf").write_text(loadgen.user_conf(spec, measured), encoding="utf-8")
        seconds = _test(spec, folder, benchmark, backend)
        whole_logs.check(folder, spec.mode)
        if spec.mode is Mode.ACCURACY:
            accuracy = benchmark.evaluate(folder / "mlperf_log_accuracy.json", spec.sample_count)
            (folder / "accuracy.txt").write_text(benchmark.accuracy_text(accuracy), encoding="utf-8")
        elif _set_aside(spec, folder):
            return REPEAT
    sys.stdout.write(f"peak memory {peak_memory_bytes() / 2**30:.2f} GiB\n")
    _silence()
    _sync(folder)
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
        peak_memory_bytes=peak_memory_bytes(),
        files=entries(folder),
    )
    contract.write_json(folder / "manifest.json", manifest)
    return 0


def peak_memory_bytes() -> int:
    """The most RAM that this process has held; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _targets(spec: RunSpec, folder: Path, benchmark: Benchmark, backend: Backend, began: float) -> dict[str, float]:
    """What user.conf must say beyond the campaign: from a run that was too short, or from probes.

    `began` is when the unit did, by time.monotonic(): the time that loading took is not there for probes.
    """
    with contextlib.suppress(FileNotFoundError):
        told: dict[str, float] = json.loads((folder / "repeat.json").read_text(encoding="utf-8"))["measured"]
        return told
    # Server sends at its target rate in accuracy mode too: at LoadGen's own value, one a second, it would take hours.
    if spec.mode is Mode.ACCURACY and spec.scenario is not Scenario.SERVER:
        return {}
    key = tuning.wanted(spec.scenario)
    if key in loadgen.given(spec.user_conf, spec.scenario) and not spec.tune_only:
        return {}
    found = tuning.tune(
        benchmark,
        backend,
        spec.scenario,
        seconds=PROBE_SECONDS[spec.quick],
        limit_ms=spec.latency_limit_ms if spec.mode is Mode.PERFORMANCE else None,
        start=spec.start.get(key),
        budget_s=max(tuning.LEAST_S, tuning.BUDGET_S - (time.monotonic() - began)),
    )
    contract.write_json(folder / "tuning.json", found.to_json())
    return found.values


def _test(spec: RunSpec, folder: Path, benchmark: Benchmark, backend: Backend) -> float:
    """LoadGen's test; wall seconds inside it. Raises what the backend raised, once LoadGen has ended."""
    samples = Samples(benchmark)
    sut = SystemUnderTest(benchmark, backend, samples, spec.scenario)
    ended = threading.Event()
    clock = WallClock()

    def begins(goal: loadgen.Goal) -> None:
        threading.Thread(target=_watch, args=(sut, folder, ended, goal, clock), daemon=True).start()

    try:
        seconds = loadgen.execute(
            spec, folder, issue=sut.issue, flush=sut.flush, load=samples.load, unload=samples.unload, begins=begins
        )
    finally:
        ended.set()
        try:
            sut.close()
        finally:
            backend.close()
    if error := clock.error():
        raise error
    return seconds


def _set_aside(spec: RunSpec, folder: Path) -> bool:
    """Whether a first run was too short by its target alone: its logs move to first_attempt/, its figure is kept."""
    measured = loadgen.too_short(folder)
    if measured is None or spec.scenario is Scenario.SERVER or (folder / "repeat.json").exists():
        return False
    # The margin twice: this system is faster at times, and a second run that is too short would stay INVALID.
    factor = (tuning.RATE_MARGIN if spec.scenario is Scenario.OFFLINE else tuning.LATENCY_MARGIN) ** 2
    aside = folder / "first_attempt"
    aside.mkdir()
    for path in [*folder.glob("mlperf_log_*"), folder / "user.conf"]:
        path.replace(aside / path.name)
    contract.write_json(folder / "repeat.json", {"measured": {tuning.wanted(spec.scenario): factor * measured}})
    sys.stdout.write(f"INVALID: the run was too short for its target; once more with {factor * measured:.6g}\n")
    return True


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


def _sync(folder: Path) -> None:
    """Have every file on the disk before the manifest that vouches for them: after a power cut it may be all there is."""
    for path in [*(found for found in folder.rglob("*") if found.is_file() and not found.is_symlink()), folder]:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _watch(sut: SystemUnderTest, folder: Path, ended: threading.Event, goal: loadgen.Goal, clock: WallClock) -> None:
    """Say how far it is; end a test whose backend has failed, or which a set clock prolongs, and LoadGen goes on with."""
    path = folder / "progress"
    partial = folder / "progress.partial"
    failed_at: float | None = None
    began = time.monotonic()
    while not ended.wait(0.5):
        done = sut.done
        told = {"samples_done": done, "left_s": goal.left_s(done, time.monotonic() - began)}
        with contextlib.suppress(OSError):  # On a full disk nobody is told how far it is.
            partial.write_text(json.dumps(told), encoding="ascii")
            partial.replace(path)
        error = sut.error or clock.error()
        if error is None:
            continue
        failed_at = failed_at or time.monotonic()
        if time.monotonic() - failed_at > FAILED_GRACE_S:
            _say_why(folder, error)
            with contextlib.suppress(OSError):
                traceback.print_exception(error)
                sys.stderr.flush()
            os._exit(1)


def _silence() -> None:
    """harness.log is about to be hashed: whatever this process still prints goes nowhere."""
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
