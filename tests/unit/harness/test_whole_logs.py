"""LoadGen's logs, whole or cut off anywhere."""

import shutil
from pathlib import Path

import pytest

from fleet.harness import whole_logs
from fleet.harness.contract import Mode, Reason, Scenario
from fleet.harness.reasons import UnitError
from tests.unit.harness.units import measured, spec


@pytest.fixture(scope="module", params=[Mode.PERFORMANCE, Mode.ACCURACY])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mode]:
    conf = (
        "*.SingleStream.min_duration = 50\n*.SingleStream.min_query_count = 10\n*.SingleStream.target_latency = 0.1\n"
    )
    value = spec(scenario=Scenario.SINGLE_STREAM, mode=request.param, user_conf=conf)
    code, folder = measured(tmp_path_factory.mktemp("run"), value)
    assert code == 0, (folder / "harness.log").read_text(encoding="utf-8")
    return folder, request.param


def test_a_log_that_ends_in_the_middle_is_seen_wherever_it_was_cut(tmp_path: Path, run: tuple[Path, Mode]) -> None:
    folder, mode = run
    whole_logs.check(folder, mode)
    for name in ("mlperf_log_summary.txt", "mlperf_log_detail.txt", "mlperf_log_accuracy.json"):
        data = (folder / name).read_bytes()
        for left in {0, 1, len(data) // 2, len(data) - 2}:
            copy = tmp_path / f"{name}.{left}"
            shutil.copytree(folder, copy)
            (copy / name).write_bytes(data[:left])
            with pytest.raises(UnitError, match=f"^{name} ends in the middle$") as caught:
                whole_logs.check(copy, mode)
            assert caught.value.reason is Reason.CORRUPT_FILES


def test_a_log_that_is_cut_on_a_full_disk_says_so(
    tmp_path: Path, run: tuple[Path, Mode], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mode = run
    shutil.copytree(folder, tmp_path / "u")
    (tmp_path / "u" / "mlperf_log_detail.txt").write_bytes(b"")
    monkeypatch.setattr(whole_logs, "_is_full", lambda _: True)
    with pytest.raises(UnitError, match="the disk is full") as caught:
        whole_logs.check(tmp_path / "u", mode)
    assert caught.value.reason is Reason.NO_SPACE
