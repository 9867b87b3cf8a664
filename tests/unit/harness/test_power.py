"""Battery, sleep and heat, from a /sys made for it; preflight's copy of the probe must agree with the harness's."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fleet.harness import power
from tests.unit.harness.units import TOP

LAPTOP = {"BAT0": {"type": "Battery", "status": "Discharging"}, "AC": {"type": "Mains", "online": "0"}}
PLUGGED = {"BAT0": {"type": "Battery", "status": "Charging"}, "AC": {"type": "Mains", "online": "1"}}
MOUSE = {"hidpp_battery_0": {"type": "Battery", "status": "Discharging", "scope": "Device"}}
MOUSE_AND_MAINS = {**MOUSE, "AC": {"type": "Mains", "online": "0"}}
TABLET = {"BAT0": {"type": "Battery", "status": "Discharging"}}
USB_C = {"BAT0": {"type": "Battery", "status": "Not charging"}, "usb": {"type": "USB", "online": "1"}}


def sysfs(root: Path, supplies: dict[str, dict[str, str]], throttled: int = 0) -> Path:
    for name, values in supplies.items():
        folder = root / "sys" / "class" / "power_supply" / name
        folder.mkdir(parents=True, exist_ok=True)
        for key, value in values.items():
            (folder / key).write_text(value + "\n")
    throttle(root, throttled)
    return root


def throttle(root: Path, count: int) -> None:
    folder = root / "sys" / "devices" / "system" / "cpu" / "cpu0" / "thermal_throttle"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package_throttle_count").write_text(f"{count}\n")


@pytest.fixture(scope="module")
def preflight() -> Any:
    path = TOP / "roles" / "preflight" / "library" / "fleet_preflight.py"
    spec = importlib.util.spec_from_file_location("fleet_preflight", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("supplies", "answer"),
    [
        (LAPTOP, True), (TABLET, True), (PLUGGED, False), (MOUSE, False), (MOUSE_AND_MAINS, False), (USB_C, False),
        ({**LAPTOP, **MOUSE}, True), ({**PLUGGED, **MOUSE}, False), ({}, False),
    ],
)  # fmt: skip
def test_a_machine_is_on_its_own_battery_or_not(
    tmp_path: Path, preflight: Any, supplies: dict[str, dict[str, str]], answer: bool
) -> None:
    root = sysfs(tmp_path, supplies)
    assert power.on_battery(root) is answer
    assert preflight.on_battery(root) is answer


def test_what_is_seen_is_counted_in_seconds_and_stops_where_the_campaign_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = sysfs(tmp_path, LAPTOP, throttled=3)
    asleep = [5.0]
    monkeypatch.setattr(power, "slept", lambda: asleep[0])
    conditions = power.Conditions({"battery": "warn", "sleep": "stop", "thermal": "ignore"}, root)
    conditions.sample([])
    assert set(conditions.seen) == {"battery"}
    assert conditions.stops == ""
    throttle(root, 4)
    asleep[0] = 45.0
    conditions.sample([])
    assert set(conditions.seen) == {"battery", "sleep"}
    assert conditions.seen["sleep"] == 40.0
    assert conditions.stops == "the machine was asleep for 40 s: turn suspend off"
    # Once it is over, nothing is added.
    conditions.sample([])
    assert conditions.seen["sleep"] == 40.0


def test_processors_and_gpus_that_slow_down_for_heat_are_seen(tmp_path: Path, preflight: Any) -> None:
    root = sysfs(tmp_path, {}, throttled=3)

    class Nvml:
        active = 0x40

        @classmethod
        def nvmlDeviceGetCurrentClocksThrottleReasons(cls, _handle: object) -> int:  # noqa: N802 - NVML's name
            return cls.active

    conditions = power.Conditions({"thermal": "stop"}, root)
    conditions.sample([])
    assert conditions.stops == ""
    assert not preflight.is_hot(3, [], root)
    throttle(root, 5)
    conditions.sample([])
    assert conditions.stops == "the machine slows down for its heat: cool it"
    assert preflight.is_hot(3, [], root)
    conditions = power.Conditions({}, root)
    Nvml.active = 0x04  # The power cap: how the card is meant to be run.
    conditions.sample([(Nvml, 0)])
    assert conditions.seen == {}
    Nvml.active = 0x40
    conditions.sample([(Nvml, 0)])
    assert set(conditions.seen) == {"thermal"}


def test_preflight_warns_stops_or_says_nothing_as_the_campaign_says(
    tmp_path: Path, preflight: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        preflight, "conditions", lambda *_: {"battery": "on battery", "sleep": "slept", "thermal": "hot"}
    )
    options = {
        "work_dir": str(tmp_path), "needs": {}, "spare_gib": 0.0, "python_env_digest": "", "harness_digest": "",
        "on_battery": "stop",
    }  # fmt: skip
    said = preflight.look({**options, "conditions": {"sleep": "ignore"}})
    assert (said["msg"], said["host_warnings"]) == ("on battery", ["hot"])
    said = preflight.look({**options, "conditions": {"battery": "warn", "thermal": "stop"}})
    assert (said["msg"], said["host_warnings"]) == ("hot", ["on battery", "slept"])
