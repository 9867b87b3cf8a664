"""The real LoadGen behind the harness's door: every scenario and mode, errors that must not hang, the manifest."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fleet.harness import loadgen
from fleet.harness.contract import Mode, Scenario
from fleet.harness.run import UNLISTED
from tests.unit.harness.units import measured, spec

CONF = {
    Scenario.SINGLE_STREAM: "",
    Scenario.MULTI_STREAM: "",
    Scenario.OFFLINE: "",
    Scenario.SERVER: "*.Server.target_qps = 200\n*.Server.target_latency = 100\n",
}


def conf(scenario: Scenario, duration: int = 300) -> str:
    return CONF[scenario] + f"*.{scenario}.min_duration = {duration}\n*.{scenario}.max_query_count = 2000\n"


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return found


def detail(folder: Path) -> dict[str, Any]:
    """Key to value of mlperf_log_detail.txt."""
    lines = (folder / "mlperf_log_detail.txt").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines if line.startswith(":::MLLOG ")]
    return {row["key"]: row["value"] for row in found}


@pytest.mark.parametrize("scenario", list(Scenario))
def test_performance(tmp_path: Path, scenario: Scenario) -> None:
    code, folder = measured(tmp_path, spec(scenario=scenario, user_conf=conf(scenario)))
    assert code == 0, (folder / "harness.log").read_text(encoding="utf-8")
    found = manifest(folder)
    logged = detail(folder)
    assert logged["effective_scenario"] == scenario
    assert logged["effective_test_mode"] == "PerformanceOnly"
    assert logged["effective_min_duration_ms"] == 300
    assert logged["effective_performance_sample_count"] == 64
    assert logged["effective_qsl_rng_seed"] == 2085463073848966840
    assert found["accuracy"] == {}
    assert found["loadgen_s"] > 0.05
    assert found["labels"] == ["demo model", "simulated"]
    assert found["versions"]["mlcommons-loadgen"] == "6.0.17"
    assert found["model"]["weight_transformations"] == "none, answers are simulated"
    check_manifest(folder)
    assert not (folder / "error.json").exists()


@pytest.mark.parametrize("scenario", list(Scenario))
def test_accuracy(tmp_path: Path, scenario: Scenario) -> None:
    code, folder = measured(tmp_path, spec(scenario=scenario, mode=Mode.ACCURACY, user_conf=conf(scenario)))
    assert code == 0, (folder / "harness.log").read_text(encoding="utf-8")
    assert detail(folder)["effective_test_mode"] == "AccuracyOnly"
    assert manifest(folder)["accuracy"] == {"right": 64.0, "answers": 64.0}
    assert json.loads((folder / "accuracy.txt").read_text(encoding="utf-8"))["right"] == 64.0
    check_manifest(folder)


def check_manifest(folder: Path) -> None:
    """Every file is listed with the hash it has, and the manifest came last."""
    found = manifest(folder)
    there = {path.name for path in folder.iterdir()} - UNLISTED - {"progress.partial"}
    assert set(found["files"]) == there
    assert {"mlperf_log_detail.txt", "mlperf_log_summary.txt", "user.conf", "run_spec.json", "harness.log"} <= there
    for name, entry in found["files"].items():
        data = (folder / name).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest()), name
        assert (folder / name).stat().st_mtime_ns <= (folder / "manifest.json").stat().st_mtime_ns
    assert found["spec_sha256"] == found["files"]["run_spec.json"]["sha256"]


def error(folder: Path) -> str:
    assert not (folder / "manifest.json").exists()
    return str(json.loads((folder / "error.json").read_text(encoding="utf-8"))["cause"])


def test_a_wrong_wheel_is_refused(tmp_path: Path) -> None:
    code, folder = measured(tmp_path, spec(loadgen_version="5.0.1"))
    assert code == 1
    assert error(folder) == "ValueError: mlcommons-loadgen 6.0.17 is installed, round v6.1 needs 5.0.1"
    assert not (folder / "mlperf_log_detail.txt").exists()


def test_an_unknown_backend_option_is_the_cause(tmp_path: Path) -> None:
    code, folder = measured(tmp_path, spec(backend_options={"batch": 3}))
    assert code == 1
    assert "no option 'batch'" in error(folder)


def test_a_spec_of_another_schema_is_refused(tmp_path: Path) -> None:
    code, folder = measured(tmp_path, spec(schema=99))
    assert code == 1
    assert "not a run spec of schema 1" in error(folder)


@pytest.mark.parametrize("scenario", [Scenario.SERVER, Scenario.OFFLINE, Scenario.SINGLE_STREAM])
def test_a_backend_that_fails_midway_ends_the_unit_with_its_words(tmp_path: Path, scenario: Scenario) -> None:
    value = spec(scenario=scenario, mode=Mode.ACCURACY, backend="broken", backend_options={"after": 3},
                 user_conf=conf(scenario))  # fmt: skip
    code, folder = measured(tmp_path, value, timeout=40)
    assert code == 1
    assert error(folder) == "RuntimeError: the engine is on fire"


@pytest.mark.parametrize("scenario", [Scenario.SERVER, Scenario.OFFLINE])
def test_a_backend_that_answers_too_few_ends_the_unit(tmp_path: Path, scenario: Scenario) -> None:
    value = spec(scenario=scenario, mode=Mode.ACCURACY, backend="short", backend_options={"after": 2},
                 user_conf=conf(scenario))  # fmt: skip
    code, folder = measured(tmp_path, value, timeout=5)
    assert code == 1
    assert error(folder) == "ValueError: the backend left 1 samples without an output"


def test_user_conf_has_the_campaigns_settings_and_measures_the_rest() -> None:
    value = spec(user_conf="*.Offline.min_duration = 5000\n*.Offline.target_qps = 12.0\n")
    assert loadgen.user_conf(value, {"target_qps": 99.0}) == value.user_conf
    text = loadgen.user_conf(spec(user_conf="*.Offline.min_duration = 5000\n"), {"target_qps": 1234567.0})
    assert text.splitlines()[0] == "*.Offline.min_duration = 5000"
    assert text.splitlines()[1].startswith("# Measured")
    assert float(text.splitlines()[2].removeprefix("*.Offline.target_qps = ")) == pytest.approx(1234567, rel=1e-5)
    assert loadgen.user_conf(spec(), {}) == "# LoadGen's own values throughout.\n"


def test_another_scenarios_setting_is_not_this_ones() -> None:
    text = loadgen.user_conf(spec(user_conf="*.Server.target_qps = 1\n"), {"target_qps": 9.0})
    assert "*.Offline.target_qps = 9\n" in text


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        (Scenario.SINGLE_STREAM, {"target_latency": 7.0}),
        (Scenario.MULTI_STREAM, {"target_latency": 7.0}),
        (Scenario.OFFLINE, {"target_qps": 120.0}),
        (Scenario.SERVER, {"target_qps": 50.0}),
    ],
)
def test_what_loadgen_must_be_told(scenario: Scenario, expected: dict[str, float]) -> None:
    assert loadgen.wanted_measurements(scenario, 0.010, 100.0) == pytest.approx(expected)
