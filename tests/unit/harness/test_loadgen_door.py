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

TRIES = 4
"""How fast this machine is, is measured, and other work on it may be over a moment later."""
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


@pytest.mark.parametrize(
    ("goal", "done", "spent", "left"),
    [
        (loadgen.Goal(1000, 0.0), 5, 10.0, None),  # too few to say
        (loadgen.Goal(1000, 0.0), 100, 10.0, 90.0),
        (loadgen.Goal(100, 600.0), 100, 10.0, 590.0),  # enough, but not long enough
        (loadgen.Goal(100, 600.0), 10, 200.0, 1800.0),  # long enough before there are enough
        (loadgen.Goal(100, 60.0), 2000, 61.0, 0.0),
    ],
)
def test_what_is_left_of_a_test(goal: loadgen.Goal, done: int, spent: float, left: float | None) -> None:
    assert goal.left_s(done, spent) == (None if left is None else pytest.approx(left))


SPY = """
goals = []
real = loadgen._goal
def spy(settings, spec):
    goals.append(real(settings, spec))
    (Path(sys.argv[1]) / "goal.json").write_text(json.dumps([goals[0].samples, goals[0].seconds]))
    return goals[0]
loadgen._goal = spy
"""


@pytest.mark.parametrize("model", ["bert", "llama3_1-8b-edge"])
@pytest.mark.parametrize("scenario", list(Scenario))
def test_a_test_ends_with_the_samples_that_were_foreseen(tmp_path: Path, scenario: Scenario, model: str) -> None:
    # Targets so low that the duration decides nothing: LoadGen sends the least it must, and calls the run too short.
    low = "target_latency = 9999" if scenario in {Scenario.SINGLE_STREAM, Scenario.MULTI_STREAM} else "target_qps = 90"
    text = f"*.{scenario}.min_duration = 1000\n*.{scenario}.{low}\n*.Server.target_latency = 999\n"
    _, folder = measured(tmp_path, spec(scenario=scenario, user_conf=text, loadgen_model=model), more=SPY)
    samples, seconds = json.loads((folder / "goal.json").read_text())
    assert seconds == (0.0 if scenario is Scenario.OFFLINE else 1.0)
    logged = detail(folder / "first_attempt" if (folder / "first_attempt").is_dir() else folder)
    sent = logged["generated_query_count"] * logged["generated_samples_per_query"]
    # Server draws its arrivals, and MultiStream's queries overlap where every sample is issued equally often.
    assert sent == pytest.approx(samples, rel=0.25)
    if scenario in {Scenario.OFFLINE, Scenario.SINGLE_STREAM}:
        assert sent == samples


def test_a_performance_unit_says_how_long_it_still_takes(tmp_path: Path) -> None:
    seen = """
import threading, time
def look():
    path = Path(sys.argv[1]) / "progress"
    while True:
        if path.is_file() and json.loads(path.read_text())["left_s"] is not None:
            (path.parent / "seen.json").write_text(path.read_text())
            return
        time.sleep(0.05)
threading.Thread(target=look, daemon=True).start()
"""
    text = "*.SingleStream.min_duration = 2000\n*.SingleStream.target_latency = 0.1\n"
    code, folder = measured(tmp_path, spec(scenario=Scenario.SINGLE_STREAM, user_conf=text), more=seen)
    assert code == 0, (folder / "harness.log").read_text(encoding="utf-8")
    told = json.loads((folder / "seen.json").read_text())
    assert told["samples_done"] > 8
    assert 0.5 < told["left_s"] < 2


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
    for number in range(TRIES):
        code, folder = measured(tmp_path / str(number), value)
        said = (folder / "harness.log").read_text(encoding="utf-8")
        if code == 0:
            # Slowed down by others, it took long enough: that is valid too, and not what is looked for here.
            assert "Result is : VALID" in (folder / "mlperf_log_summary.txt").read_text(encoding="utf-8")
            continue
        assert code == supervise.REPEAT, said
        assert not (folder / "manifest.json").exists()
        first = (folder / "first_attempt" / "mlperf_log_summary.txt").read_text(encoding="utf-8")
        assert "Result is : INVALID" in first
        code, _ = again(folder)
        assert code == 0, (folder / "harness.log").read_text(encoding="utf-8")
        assert {"first_attempt/mlperf_log_summary.txt", "repeat.json"} <= set(manifest(folder)["files"])
        if "Result is : VALID" in (folder / "mlperf_log_summary.txt").read_text(encoding="utf-8"):
            return
    pytest.fail(f"not once in {TRIES} tries was it too short and then long enough: {said}")


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
