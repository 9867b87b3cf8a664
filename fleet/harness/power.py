"""What slows a machine down behind its user's back: battery, sleep and heat. Sampled beside a unit while it runs."""

import contextlib
import importlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fleet.harness import probes

SAMPLE_SECONDS = 10.0
SLEPT_SECONDS = 1.0
"""Both clocks are read one after the other; what differs less is no sleep."""
_CAUSES = {
    "battery": "on battery: plug the charger in",
    "sleep": "the machine was asleep for {:.0f} s: turn suspend off",
    "thermal": "the machine slows down for its heat: cool it",
}
_THERMAL_BITS = 0x08 | 0x20 | 0x40
"""NVML's clock event reasons: hardware slowdown, software and hardware thermal slowdown."""


class Conditions:
    """Seconds of each condition, counted in a thread of its own: a driver that hangs must not hold the supervisor up."""

    def __init__(self, policy: dict[str, str], root: Path = Path("/"), nvml: Any = None) -> None:
        """`policy` is RunSpec.conditions; `nvml` a module like pynvml instead of the installed one."""
        self._policy = policy
        self._root = root
        self._nvml = nvml
        self._seconds: dict[str, float] = {}
        self._ended = threading.Event()
        self._slept = slept()
        self._throttled = throttle_count(root)
        self._sampled = time.monotonic()

    def start(self) -> None:
        """Begin to sample."""
        threading.Thread(target=self._loop, name="conditions", daemon=True).start()

    def stop(self) -> None:
        """Sample no more; the thread is not waited for."""
        self._ended.set()

    @property
    def seen(self) -> dict[str, float]:
        """Seconds of each condition that was seen and is not ignored."""
        return {name: round(value, 1) for name, value in self._seconds.copy().items()}

    @property
    def stops(self) -> str:
        """Why the unit must end, in words for people; empty when it may go on."""
        for name, value in self._seconds.copy().items():
            if self._policy.get(name) == "stop":
                return _CAUSES[name].format(value)
        return ""

    def _loop(self) -> None:
        with contextlib.ExitStack() as stack:
            gpus = _gpus(self._nvml, self._root, stack)
            while True:
                self.sample(gpus)
                if self._ended.wait(SAMPLE_SECONDS):
                    return

    def sample(self, gpus: "list[tuple[Any, Any]]") -> None:
        """Look once; `gpus` are NVML modules and handles."""
        now, asleep, throttled = time.monotonic(), slept(), throttle_count(self._root)
        since = max(now - self._sampled, SAMPLE_SECONDS / 10)
        if on_battery(self._root):
            self._add("battery", since)
        if asleep - self._slept > SLEPT_SECONDS:
            self._add("sleep", asleep - self._slept)
        if throttled > self._throttled or any(_is_hot(nvml, handle) for nvml, handle in gpus):
            self._add("thermal", since)
        self._sampled, self._slept, self._throttled = now, asleep, throttled

    def _add(self, name: str, seconds: float) -> None:
        if self._policy.get(name) != "ignore":
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds


def slept() -> float:
    """Seconds that the machine has been suspended since its boot."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


def on_battery(root: Path = Path("/")) -> bool:
    """Whether the machine runs on a battery of its own; a wireless mouse's is not."""
    keys = ("type", "scope", "online", "status")
    supplies = sorted((root / "sys/class/power_supply").glob("*"))
    return probes.on_battery({key: _read(supply / key) for key in keys} for supply in supplies) is True


def throttle_count(root: Path = Path("/")) -> int:
    """How often the processors have slowed down for heat since the boot; 0 where the kernel does not count."""
    paths = (root / "sys/devices/system/cpu").glob("cpu*/thermal_throttle/*_throttle_count")
    return sum(int(text) for path in paths if (text := _read(path)).isdecimal())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _gpus(nvml: Any, root: Path, stack: contextlib.ExitStack) -> list[tuple[Any, Any]]:
    """NVML and a handle of each GPU, until `stack` ends; none where there is no driver."""
    if nvml is None and not (root / "dev/nvidiactl").exists():
        return []
    try:
        nvml = nvml or importlib.import_module("pynvml")
        nvml.nvmlInit()
        stack.callback(nvml.nvmlShutdown)
        return list(_handles(nvml))
    except Exception:  # noqa: BLE001 - without GPUs the rest is still worth a look, whatever NVML's error is
        return []


def _handles(nvml: Any) -> Iterator[tuple[Any, Any]]:
    for index in range(nvml.nvmlDeviceGetCount()):
        yield nvml, nvml.nvmlDeviceGetHandleByIndex(index)


def _is_hot(nvml: Any, handle: Any) -> bool:
    # NVML's older name is the one that every version of the module has.
    try:
        return bool(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle) & _THERMAL_BITS)
    except Exception:  # noqa: BLE001 - a GPU that does not tell is not hot
        return False
