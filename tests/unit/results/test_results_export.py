"""The three result files hold one row per unit and can be read back."""

from pathlib import Path

import pandas as pd
import pytest

from fleet.results.export import export, units_frame
from fleet.results.load import load
from fleet.results.records import SessionResults
from fleet.session import Session
from fleet.terms import Mode, UnitState
from tests.unit.results.session_files import ALL_FOUR, ROUGE_TEXT, Host, Unit, build


@pytest.fixture
def session(tmp_path: Path) -> Session:
    evil = Unit(state=UnitState.FAILED, cause="=HYPERLINK(1)")
    return build(tmp_path, [Host(name="a", units=ALL_FOUR), Host(name="b", units=(evil,))])


def test_json_reads_back_as_the_same_value(session: Session) -> None:
    results = load(session)
    export(session, results)
    assert session.read(session.results / "results.json", SessionResults) == results


def test_parquet_and_csv_hold_one_row_per_unit(session: Session) -> None:
    results = load(session)
    export(session, results)
    parquet = pd.read_parquet(session.results / "results.parquet")
    csv = pd.read_csv(session.results / "results.csv")
    assert list(parquet.columns) == list(csv.columns)
    assert list(parquet["unit"]) == list(csv["unit"]) == [unit.unit for unit in results.units]
    assert not list(session.results.glob("*.partial"))


def test_numbers(session: Session) -> None:
    frame = units_frame(load(session)).set_index("unit")
    row = frame.loc["a.tiny-bert.SingleStream.performance"]
    assert (row["metric"], row["metric_unit"]) == ("early_stopping_latency_ss", "ms")
    assert row["latency_p50_ms"] <= row["latency_p90_ms"] <= row["latency_p99_ms"]
    assert row["value"] == pytest.approx(row["latency_p90_ms"], rel=0.05)
    assert frame.loc["a.tiny-bert.Offline.accuracy", "F1"] == 87.4417
    assert (row["cpu_sockets"], row["cpu_cores_per_socket"], row["accelerators"]) == (1, 12, 0)


def test_a_unit_without_a_number_keeps_its_row(session: Session) -> None:
    row = units_frame(load(session)).set_index("unit").loc["b.tiny-bert.Offline.performance"]
    assert row["state"] == "failed"
    assert row[["value", "F1", "valid", "loadgen_s"]].isna().all()
    assert not row["submittable"]


def test_summary_metrics_are_columns_of_their_own(tmp_path: Path) -> None:
    unit = Unit(benchmark="tiny-gptj", mode=Mode.ACCURACY, log="offline-accuracy", accuracy=ROUGE_TEXT)
    row = units_frame(load(build(tmp_path, [Host(name="a", units=(unit,))]))).iloc[0]
    assert row[["ROUGE1", "ROUGE2", "ROUGEL", "ROUGELSUM"]].tolist() == [42.9865, 20.1235, 29.9881, 40.1]
    assert row["GEN_LEN"] == 4016878
    assert row[["F1", "exact_match"]].isna().all()


def test_csv_cells_are_no_formulas(session: Session) -> None:
    export(session, load(session))
    assert "'=HYPERLINK(1)" in (session.results / "results.csv").read_text(encoding="utf-8")


def test_no_units_no_crash(tmp_path: Path) -> None:
    session = build(tmp_path, [Host(name="a")])
    export(session, load(session))
    assert len(pd.read_parquet(session.results / "results.parquet")) == 0
