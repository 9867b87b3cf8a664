"""Run specs and a benchmark small enough to be measured in a blink, and LoadGen in a process of its own."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fleet.harness.contract import Mode, RunSpec, Scenario, write_json

TOP = Path(__file__).parents[3]

SPEC = RunSpec(
    unit="u", session="s", host="h", benchmark="probe", module="probe", loadgen_model="bert",
    scenario=Scenario.OFFLINE, mode=Mode.PERFORMANCE, backend="null", backend_options={"latency_ms": 0.2},
    user_conf="", sample_count=64, performance_sample_count=64, deadline_s=60.0, expected_s=1.0,
    work_dir="/nowhere", round="v6.1", loadgen_version="6.0.17", quick=True, labels=("demo model",),
)  # fmt: skip


def spec(unit: str = "u", **changes: Any) -> RunSpec:
    """SPEC with changes."""
    return replace(SPEC, unit=unit, **changes)


# What a process must do before fleet.harness.run: put the benchmark (and backends that fail) where they are looked for.
PRELUDE = """
import json, sys, types
from pathlib import Path
import numpy as np
from fleet.harness import loadgen, run
from fleet.harness.interfaces import Features

class Probe:
    sample_count = 64
    model_dir = Path("/nowhere")
    model = {"weights_filename": "none", "weights_sha256": "0" * 64}
    generation, config = None, {}
    def features(self, index):
        ids = np.arange(1 + index % 5, dtype=np.int64)
        return Features(ids, np.zeros_like(ids))
    def response(self, output):
        return bytes([len(output)]) * 4
    def evaluate(self, log, sample_count):
        found = {row["qsl_idx"]: row["data"] for row in json.loads(log.read_text())}
        right = sum(found.get(i) == (bytes([1 + i % 5]) * 4).hex().upper() for i in range(sample_count))
        return {"right": float(right), "answers": float(len(found))}
    def accuracy_text(self, metrics):
        return json.dumps(metrics) + "\\n"

class Broken:
    batch_size, by_length, labels, model = 4, True, (), {}
    def __init__(self, after): self.left = after
    def versions(self): return {}
    def close(self): pass
    def predict(self, samples):
        self.left -= 1
        if self.left < 0: raise RuntimeError("the engine is on fire")
        return [np.zeros((len(s.input_ids), 2), dtype=np.float32) for s in samples]

class Short(Broken):
    def predict(self, samples):
        self.left -= 1
        found = [np.zeros((len(s.input_ids), 2), dtype=np.float32) for s in samples]
        return found if self.left >= 0 else found[:-1]

def module(name, opened):
    made = types.ModuleType(name)
    made.open = opened
    sys.modules[name] = made

module("fleet.harness.benchmarks.probe", lambda name, assets: Probe())
module("fleet.harness.backends.broken", lambda benchmark, options: Broken(options["after"]))
module("fleet.harness.backends.short", lambda benchmark, options: Short(options["after"]))
run.PROBE_SECONDS = {True: 0.1, False: 0.1}
"""


def folder_of(base: Path, value: RunSpec) -> Path:
    """A unit's folder with its run_spec.json."""
    folder = base / value.unit
    folder.mkdir(parents=True)
    write_json(folder / "run_spec.json", value)
    return folder


def measured(base: Path, value: RunSpec, *, more: str = "", timeout: float = 60) -> tuple[int, Path]:
    """Run a unit in a process of its own, for LoadGen takes one test per process; its exit status and folder."""
    return again(folder_of(base, value), more=more, timeout=timeout)


def again(folder: Path, *, more: str = "", timeout: float = 60) -> tuple[int, Path]:
    """Run the unit in `folder`, as its supervisor would; its exit status and folder."""
    code = f"{PRELUDE}\n{more}\nsys.exit(run.main(Path(sys.argv[1])))\n"
    with (folder / "harness.log").open("ab") as log:
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            stdout=log, stderr=log, cwd=TOP, check=False, timeout=timeout,
        )  # fmt: skip
    return done.returncode, folder


def queue(*specs: RunSpec) -> dict[str, Any]:
    """What the controller sends to `start`."""
    return {"session": "s", "specs": [json.loads(json.dumps(asdict(item))) for item in specs]}
