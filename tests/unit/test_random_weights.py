"""A run on random weights says so in every output and enters no submission, whether it ended well or not."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from fleet.cli import tables
from fleet.cli.main import cli
from fleet.errors import FleetError
from fleet.report import html
from fleet.results.export import export
from fleet.results.load import load
from fleet.session import Session
from fleet.submission import build as submission
from fleet.terms import UnitState
from tests.unit.results import session_files
from tests.unit.results.session_files import ALL_FOUR, Host

LABEL = "random weights"


@pytest.fixture(params=[False, True], ids=["full", "quick"])
def session(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Four units of a host; the last one failed, so that only the plan knows its labels."""
    planned = session_files.spec

    def labelled(*given: object, **more: object) -> object:
        made = planned(*given, **more)  # type: ignore[arg-type]
        return replace(made, labels=(*made.labels, LABEL))

    monkeypatch.setattr(session_files, "spec", labelled)
    units = (*ALL_FOUR[:3], replace(ALL_FOUR[3], state=UnitState.FAILED, cause="out of memory"))
    made = session_files.build(tmp_path / "sessions", [Host(name="a", units=units)], quick=request.param)
    export(made, load(made))
    return made


def test_results_name_it_in_each_row(session: Session) -> None:
    told = json.loads((session.results / "results.json").read_text(encoding="utf-8"))
    assert [LABEL in unit["labels"] for unit in told["units"]] == [True] * 4
    assert [unit["submittable"] for unit in told["units"]] == [False] * 4
    for frame in (pd.read_csv(session.results / "results.csv"), pd.read_parquet(session.results / "results.parquet")):
        assert frame["labels"].str.contains(LABEL).all()
        assert frame["reasons"].str.contains(LABEL).all()


def test_report_and_table_name_it(session: Session) -> None:
    results = load(session)
    page = html.render(results)
    assert "<b>Random weights.</b>" in page
    assert page.count(f'<span class="chip">{LABEL}</span>') >= 3
    columns, rows = tables.results(results)
    assert all(LABEL in row[columns.index("benchmark")] for row in rows)


def test_status_names_it_before_anything_came_home(session: Session) -> None:
    for path in (session.run / "units").iterdir():
        path.unlink()
    done = CliRunner().invoke(cli, ["status", "--session", session.id, "--sessions", str(session.root.parent)])
    assert done.output.count(f"(demo model, {LABEL})") == 4


def test_no_submission_is_made_of_it(session: Session) -> None:
    with pytest.raises(FleetError, match=f"labelled '{LABEL}': never submitted"):
        submission.build(session, load(session))
    assert not session.submission.exists()
