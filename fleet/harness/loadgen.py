"""The only door to mlperf_loadgen: one test per process, one FromConfig, a fresh folder, no stray audit.config."""

import ctypes
import gc
import importlib.metadata
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import mlperf_loadgen as lg

from fleet.harness.contract import Mode, RunSpec, Scenario

EMBEDDED_CONF_AND_USER_CONF = 1
"""FromConfig's conf_type that loads the mlperf.conf compiled into the wheel, with its seeds, and then user.conf."""

MULTI_STREAM_SAMPLES = 8
"""samples_per_query of MultiStream in every round's mlperf.conf."""
OFFLINE_SLACK = 1.1
"""Offline's query is so many times larger than target_qps times the duration."""


@dataclass(frozen=True, slots=True)
class Goal:
    """When a test will end: after so many samples, and not before so many seconds."""

    samples: int
    seconds: float

    def left_s(self, done: int, spent: float) -> float | None:
        """Seconds still to go after `spent` with `done` samples answered; None before enough are."""
        if done < max(8, self.samples // 100):
            return None
        return max(0.0, self.seconds - spent, spent * (self.samples - done) / done)


def version() -> str:
    """The installed mlcommons-loadgen wheel; it decides the round."""
    return importlib.metadata.version("mlcommons-loadgen")


def complete(
    identifiers: Sequence[int], names: Sequence[int], data: Mapping[int, bytes], tokens: Sequence[int] | None = None
) -> None:
    """Hand responses to LoadGen, by its response ids; it has copied what it wants when this returns.

    `names` says which of `data` each has, since many may share one. `tokens` is how many tokens each holds, for
    benchmarks that generate. In bulk, since Python's cost per sample is what the harness adds to every measurement.
    """
    _hand_over(lg.QuerySamplesComplete, identifiers, names, data, tokens)


def first_tokens(identifiers: Sequence[int], names: Sequence[int], data: Mapping[int, bytes]) -> None:
    """Tell LoadGen that the first token of each response is there; it takes the time."""
    _hand_over(lg.FirstTokenComplete, identifiers, names, data, [1] * len(names))


def _hand_over(
    to: Callable[[list[Any]], None],
    identifiers: Sequence[int],
    names: Sequence[int],
    data: Mapping[int, bytes],
    tokens: Sequence[int] | None,
) -> None:
    # LoadGen takes addresses, so the bytes must be alive until it returns.
    held = b"".join(data.values())
    sizes = {name: len(part) for name, part in data.items()}
    addresses = dict(zip(data, accumulate(sizes.values(), initial=_address(held)), strict=False))
    more = () if tokens is None else (tokens,)
    each = map(addresses.__getitem__, names), map(sizes.__getitem__, names)
    to(list(map(lg.QuerySampleResponse, identifiers, *each, *more)))


def _address(held: bytes) -> int:
    return ctypes.cast(ctypes.c_char_p(held), ctypes.c_void_p).value or 0


def execute(
    spec: RunSpec,
    folder: Path,
    *,
    issue: Callable[[list[int], list[int]], None],
    flush: Callable[[], None],
    load: Callable[[Sequence[int]], None],
    unload: Callable[[Sequence[int]], None],
    begins: Callable[[Goal], None],
) -> float:
    """Run one LoadGen test in `folder`, where user.conf lies; returns wall seconds inside StartTest.

    `issue` is given the response ids and the QSL indices of the samples of a query; `begins` is told what the test
    aims at, right before it starts.

    Raises ValueError when the wheel is not the round's, or when user.conf is refused.
    """
    if version() != spec.loadgen_version:
        raise ValueError(f"mlcommons-loadgen {version()} is installed, round {spec.round} needs {spec.loadgen_version}")
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, spec.scenario.value)
    settings.mode = lg.TestMode.AccuracyOnly if spec.mode is Mode.ACCURACY else lg.TestMode.PerformanceOnly
    conf = str(folder / "user.conf")
    if rc := settings.FromConfig(conf, spec.loadgen_model, spec.scenario.value, EMBEDDED_CONF_AND_USER_CONF):
        raise ValueError(f"LoadGen refused user.conf (rc {rc})")
    if spec.quick:
        settings.performance_sample_count_override = spec.performance_sample_count
        settings.min_query_count = min(settings.min_query_count, spec.performance_sample_count)
    output = lg.LogOutputSettings()
    output.outdir = str(folder)
    output.copy_summary_to_stdout = False
    log = lg.LogSettings()
    log.log_output = output
    log.enable_trace = False

    # The fast door hands over two lists of numbers; the usual one an object per sample, two calls to read each.
    sut = lg.ConstructFastSUT(issue, flush)
    qsl = lg.ConstructQSL(spec.sample_count, spec.performance_sample_count, load, unload)
    # What is here stays: a collection in the middle of a query would be measured as the system's.
    gc.collect()
    gc.freeze()
    gc.disable()
    begins(_goal(settings, spec))
    started = time.monotonic()
    try:
        lg.StartTestWithLogSettings(sut, qsl, settings, log, str(folder / "audit.config"))
        return time.monotonic() - started
    finally:
        gc.enable()
        lg.DestroyQSL(qsl)
        lg.DestroyFastSUT(sut)


def _goal(settings: Any, spec: RunSpec) -> Goal:
    """Worked out as LoadGen does: whole passes over the set where it issues every sample equally often."""
    if spec.mode is Mode.ACCURACY:
        return Goal(spec.sample_count, 0.0)
    seconds, samples = settings.min_duration_ms / 1000, int(settings.min_query_count)
    whole = spec.performance_sample_count if settings.sample_concatenate_permutation else 1
    if spec.scenario is Scenario.OFFLINE:
        # All of them are sent at once, and the test ends with the last.
        samples = max(samples, int(OFFLINE_SLACK * seconds * settings.offline_expected_qps))
        return Goal(-(-samples // whole) * whole, 0.0)
    if spec.scenario is Scenario.SERVER:
        samples = max(samples, int(seconds * settings.server_target_qps))
        return Goal(-(-samples // whole) * whole, seconds)
    if spec.scenario is Scenario.MULTI_STREAM:
        return Goal(samples * MULTI_STREAM_SAMPLES, seconds)
    if whole > 1:
        samples = max(samples, int(2e9 * seconds / settings.single_stream_expected_latency_ns))
        samples = (samples // whole + 1) * whole  # one more where it is a whole number already
    return Goal(samples, seconds)


def given(text: str, scenario: Scenario) -> set[str]:
    """The keys that a user.conf sets for `scenario`."""
    keys = (line.partition("=")[0].strip() for line in text.splitlines())
    return {key.rpartition(".")[2] for key in keys if key.startswith(f"*.{scenario.value}.")}


def user_conf(spec: RunSpec, measured: dict[str, float]) -> str:
    """user.conf's text: the campaign's settings, but for keys in `measured`, whose values were found on this system."""
    names = {f"*.{spec.scenario.value}.{key}" for key in measured}
    lines = [line for line in spec.user_conf.splitlines() if line.partition("=")[0].strip() not in names]
    for key, value in measured.items():
        lines += ["# Measured on this system by short probes.", f"*.{spec.scenario.value}.{key} = {value:.6g}"]
    return "\n".join(lines) + "\n" if lines else "# LoadGen's own values throughout.\n"


_CONSTRAINTS = re.compile(r"^\s*(\S.*?) satisfied ?: (Yes|NO)\s*$", re.MULTILINE)


def too_short(folder: Path) -> float | None:
    """What the run in `folder` measured, when it is INVALID for nothing but its length; else None.

    The cause of such a run is a target that was too low: LoadGen had too few samples to send. Samples/s in Offline,
    mean ms in SingleStream and MultiStream.
    """
    try:
        text = (folder / "mlperf_log_summary.txt").read_text(encoding="utf-8")
    except OSError:
        return None
    constraints = dict(_CONSTRAINTS.findall(text))
    if "Result is : INVALID" not in text or constraints.get("Min duration") != "NO":
        return None
    # Early stopping wants a number of queries, which a run that is long enough has.
    if any(answer == "NO" for name, answer in constraints.items() if name not in {"Min duration", "Early stopping"}):
        return None
    if match := re.search(r"^Samples per second: ([0-9.e+]+)$", text, re.MULTILINE):
        return float(match[1])
    match = re.search(r"^Mean latency \(ns\) *: ([0-9]+)$", text, re.MULTILINE)
    return int(match[1]) / 1e6 if match else None
