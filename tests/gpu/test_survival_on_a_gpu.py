"""What a real GPU adds to survival: who holds it, its heat, and that a killed unit leaves it empty."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pynvml
import pytest

from fleet.harness import accelerator_locks, power, unit_queue
from fleet.harness.contract import Mode, Reason, RunSpec, Scenario, UnitState, UnitStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.gpu

_HARNESS = Path(unit_queue.__file__).parent
_SPEC = RunSpec(
    unit="one", session="s", host="h", benchmark="tiny-bert", module="tiny", loadgen_model="bert",
    scenario=Scenario.OFFLINE, mode=Mode.PERFORMANCE, backend="pytorch", backend_options={"device": "cuda"},
    user_conf="*.Offline.min_duration = 20000\n", sample_count=512, performance_sample_count=512, deadline_s=120.0,
    expected_s=30.0, work_dir="/nowhere", round="v6.1", loadgen_version="6.0.17", quick=True, labels=("demo model",),
)  # fmt: skip


@pytest.fixture(scope="module")
def uuids() -> Iterator[list[str]]:
    pynvml.nvmlInit()
    yield [pynvml.nvmlDeviceGetUUID(handle) for handle in _handles()]
    pynvml.nvmlShutdown()


def _handles() -> list[Any]:
    return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]


def _in_use() -> int:
    """Bytes that NVML says are used on all GPUs; a machine that others use as well cannot run these tests."""
    return sum(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in _handles())


def _start(work: Path, *specs: RunSpec) -> None:
    _harness("prepare", work, "tiny-bert", "tiny", "digest")
    text = json.dumps({"session": "s", "specs": [asdict(spec) for spec in specs]})
    _harness("start", work, text=text)


def _harness(verb: str, *arguments: str | Path, text: str = "") -> None:
    command = [sys.executable, str(_HARNESS), verb, *map(str, arguments)]
    subprocess.run(command, input=text, text=True, check=True, timeout=120)


def _status(work: Path, unit: str = "one") -> UnitStatus:
    found = unit_queue.read_status(work / "runs" / "s" / unit)
    assert found is not None
    return found


def _wait(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@contextlib.contextmanager
def _cancelled(work: Path) -> Iterator[None]:
    try:
        yield
    finally:
        unit_queue.cancel(work, "s")


def test_the_locks_are_named_as_nvml_names_the_gpus(uuids: list[str]) -> None:
    assert accelerator_locks.gpus() == sorted(uuids)


def test_heat_is_asked_of_the_real_library(uuids: list[str]) -> None:
    conditions = power.Conditions({"thermal": "warn"})
    with contextlib.ExitStack() as stack:
        gpus = power._gpus(None, Path("/"), stack)
        assert len(gpus) == len(uuids)
        conditions.sample(gpus)
        # Idle and in a cooled rack; what NVML says itself must agree.
        hot = [bool(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(h) & power._THERMAL_BITS) for h in _handles()]
        assert ("thermal" in conditions.seen) == any(hot)


def test_a_unit_holds_its_gpu_and_killed_leaves_it_empty(uuids: list[str], tmp_path: Path) -> None:
    before = _in_use()
    spec = replace(_SPEC, work_dir=str(tmp_path))
    with _cancelled(tmp_path):
        _start(tmp_path, spec)
        _wait(lambda: _status(tmp_path).samples_done > 0)
        with pytest.raises(accelerator_locks.BusyError, match=uuids[0][:12]):
            accelerator_locks.take(uuids)
        # Another user's session, from another folder, waits for the very same GPU.
        other = tmp_path / "other"
        other.mkdir()
        with _cancelled(other):
            _start(other, replace(spec, unit="one", work_dir=str(other), deadline_s=2.0))
            _wait(lambda: _status(other).state.ended)
            assert (_status(other).state, _status(other).reason) == (UnitState.FAILED, Reason.BUSY)
        held = _in_use() - before
        assert held > 100 * 2**20
        owner = json.loads((tmp_path / "supervisor.lock").read_text(encoding="utf-8"))
        os.kill(owner["unit"], signal.SIGKILL)
        _wait(lambda: _status(tmp_path).state.ended)
    assert (_status(tmp_path).state, _status(tmp_path).cause) == (UnitState.INTERRUPTED, "killed by SIGKILL")
    _wait(lambda: _in_use() - before < held / 4)
    accelerator_locks.release(accelerator_locks.take(uuids))


def test_a_cancelled_unit_leaves_the_gpu_within_fifteen_seconds(uuids: list[str], tmp_path: Path) -> None:
    before = _in_use()
    with _cancelled(tmp_path):
        _start(tmp_path, replace(_SPEC, work_dir=str(tmp_path)))
        _wait(lambda: _status(tmp_path).samples_done > 0)
        begun = time.monotonic()
        unit_queue.cancel(tmp_path, "s")
        assert time.monotonic() - begun < 15
        _wait(lambda: _in_use() - before < 50 * 2**20, 15)
    assert _status(tmp_path).state is UnitState.INTERRUPTED
    accelerator_locks.release(accelerator_locks.take(uuids))
