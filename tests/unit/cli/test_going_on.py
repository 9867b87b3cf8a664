"""`fleet bench` again: the same campaign goes on in its session as long as units are missing."""

from dataclasses import replace
from pathlib import Path

import pytest

from fleet import handoff, planning
from fleet.cli import options
from fleet.handoff import Attempt, Collected, CollectedFile, UnitRecord
from fleet.harness.contract import Reason, UnitState
from tests.unit.fakes import MINIMAL, Scene, scene


@pytest.fixture
def made(tmp_path: Path) -> Scene:
    (tmp_path / "fleet.yml").write_text(MINIMAL, encoding="utf-8")
    return scene(tmp_path)


def found(made: Scene, *, quick: bool = False) -> str:
    session = options.to_go_on_with(made.base / "sessions", made.base / "fleet.yml", quick=quick)
    return session[0].id if session else ""


def finish(made: Scene, *, but: int = 0) -> None:
    plan = planning.plan(made.session, made.campaign, quick=False)
    made.session.write(made.session.run / "plan.json", plan)
    done = plan.units[but:]
    for spec in done:
        record = UnitRecord(unit=spec.unit, host=spec.host, state=UnitState.DONE)
        made.session.write(made.session.run / "units" / f"{spec.unit}.json", record)
    home = {spec.unit: Collected(folder="x", complete=True) for spec in done}
    made.session.write(made.session.collect / "collected.json", CollectedFile(units=home))


def test_a_session_that_was_only_prepared_goes_on(made: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(made) == "s1"
    assert "session s1 goes on: nothing has run in it yet (a new one: --new)" in capsys.readouterr().err


def test_missing_units_are_counted(made: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    finish(made, but=1)
    assert found(made) == "s1"
    assert "session s1 goes on: 1 of 4 units are missing (a new one: --new)" in capsys.readouterr().err


def test_done_but_not_home_is_missing(made: Scene) -> None:
    finish(made)
    assert found(made) == ""
    home = handoff.collected(made.session)
    unit = next(iter(home))
    home[unit] = Collected(folder="", complete=False, cause="the transfer broke off")
    made.session.write(made.session.collect / "collected.json", CollectedFile(units=home))
    assert found(made) == "s1"


def test_done_again_under_another_lock_and_not_home_is_missing(made: Scene) -> None:
    """Whoever dies before the files of the last unit came, with those of its earlier measurement here."""
    finish(made)
    home = handoff.collected(made.session)
    made.session.write(
        made.session.collect / "collected.json",
        CollectedFile(units={unit: replace(item, attempt=1) for unit, item in home.items()}),
    )
    assert found(made) == ""
    unit = next(iter(home))
    before = Attempt(state=UnitState.DONE, reason=Reason.LOCK_CHANGED, cause="driver 1 → 2", ended_at=1.0)
    record = replace(handoff.records(made.session)[unit], attempts=(before,))
    made.session.write(made.session.run / "units" / f"{unit}.json", record)
    assert found(made) == "s1"


def test_another_campaign_or_another_quickness_is_another_session(made: Scene) -> None:
    finish(made, but=1)
    assert found(made, quick=True) == ""
    (made.base / "fleet.yml").write_text(MINIMAL + "# changed\n", encoding="utf-8")
    assert found(made) == ""


def test_what_was_cancelled_is_asked_for_again_from_the_commands_first_moment_on(made: Scene) -> None:
    finish(made, but=1)
    folder = made.session.run / "cancel"
    folder.mkdir()
    (folder / "h01").touch()
    with options.outing(made.session, made.base / "fleet.yml", quiet=True):
        assert list(folder.iterdir()) == []
        (folder / "h02").touch()
    # Cancelled while the command was at work: that holds until the next one.
    assert [path.name for path in folder.iterdir()] == ["h02"]
