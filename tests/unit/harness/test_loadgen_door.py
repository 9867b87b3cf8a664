"""The real LoadGen behind the harness's door: every scenario and mode, errors that must not hang, the manifest."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fleet.harness import loadgen, supervise
from fleet.harness.contract import Mode, Scenario
from fleet.harness.run import UNLISTED
from tests.unit.harness.units import again, measured, spec

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


def test_user_conf_has_the_campaigns_settings_and_what_was_measured() -> None:
    value = spec(user_conf="*.Offline.min_duration = 5000\n*.Offline.target_qps = 12.0\n")
    assert loadgen.user_conf(value, {}) == value.user_conf
    lines = loadgen.user_conf(value, {"target_qps": 1234567.0}).splitlines()
    assert lines[0] == "*.Offline.min_duration = 5000"
    assert lines[1].startswith("# Measured")
    assert float(lines[2].removeprefix("*.Offline.target_qps = ")) == pytest.approx(1234567, rel=1e-5)
    assert len(lines) == 3
    assert loadgen.user_conf(spec(), {}) == "# LoadGen's own values throughout.\n"


def test_another_scenarios_setting_is_not_this_ones() -> None:
    value = spec(user_conf="*.Server.target_qps = 1\n")
    assert loadgen.given(value.user_conf, Scenario.OFFLINE) == set()
    assert loadgen.given(value.user_conf, Scenario.SERVER) == {"target_qps"}
    assert "*.Offline.target_qps = 9\n" in loadgen.user_conf(value, {"target_qps": 9.0})


@pytest.mark.parametrize("scenario", [Scenario.OFFLINE, Scenario.SINGLE_STREAM, Scenario.MULTI_STREAM])
def test_a_run_too_short_for_its_target_is_set_aside_and_valid_the_second_time(
    tmp_path: Path, scenario: Scenario
) -> None:
    # The null backend takes that long for a query, or for 32 samples of Offline's.
    latency = {Scenario.OFFLINE: 20, Scenario.SINGLE_STREAM: 4, Scenario.MULTI_STREAM: 0.3}[scenario]
    low = "target_qps = 900" if scenario is Scenario.OFFLINE else "target_latency = 1000"
    text = f"*.{scenario}.min_duration = 400\n*.{scenario}.min_query_count = 1\n*.{scenario}.{low}\n"
    value = spec(scenario=scenario, user_conf=text, backend_options={"latency_ms": latency})
    code, folder = measured(tmp_path, value)
    assert code == supervise.REPEAT, (folder / "harness.log").read_text(encoding="utf-8")
    assert not (folder / "manifest.json").exists()
    first = (folder / "first_attempt" / "mlperf_log_summary.txt").read_text(encoding="utf-8")
    assert "Result is : INVALID" in first
    code, _ = again(folder)
    assert code == 0, (folder / "harness.log").read_text(encoding="utf-8")
    assert "Result is : VALID" in (folder / "mlperf_log_summary.txt").read_text(encoding="utf-8")
    assert {"first_attempt/mlperf_log_summary.txt", "repeat.json"} <= set(manifest(folder)["files"])


def test_a_run_that_is_invalid_for_another_reason_is_not_repeated(tmp_path: Path) -> None:
    summary = (
        "Result is : INVALID\n  Min duration satisfied : NO\n  Min queries satisfied : NO\nSamples per second: 9\n"
    )
    (tmp_path / "mlperf_log_summary.txt").write_text(summary, encoding="utf-8")
    assert loadgen.too_short(tmp_path) is None
    (tmp_path / "mlperf_log_summary.txt").write_text(
        summary.replace("queries satisfied : NO", "queries satisfied : Yes")
    )
    assert loadgen.too_short(tmp_path) == 9.0
    (tmp_path / "mlperf_log_summary.txt").write_text(summary.replace("INVALID", "VALID"))
    assert loadgen.too_short(tmp_path) is None
