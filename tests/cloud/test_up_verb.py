"""`fleet up` as it is typed."""

import json
from pathlib import Path

import pytest

from fleet.cli.main import cli
from fleet.cloud import arrivals, hosts
from fleet.errors import CampaignError, CloudError, ExitCode, LeakError
from fleet.session import Session
from tests.cloud.cloud import Cloud
from tests.cloud.launching import HOSTS, launched, nothing, quick, running, text

pytestmark = pytest.mark.usefixtures(quick.__name__)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def fleet(*arguments: str) -> int:
    code = cli.main(["up", *arguments], standalone_mode=False)
    return int(code or 0)


def session() -> Session:
    (found,) = Path("sessions").iterdir()
    return Session(found.absolute())


def test_a_dry_run_says_what_it_can_cost_and_makes_nothing(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    Path("fleet.yml").write_text(text(), encoding="utf-8")
    assert fleet("--dry-run") == ExitCode.OK
    said = capsys.readouterr()
    assert "3 instances, at most $" in said.out
    assert "1.006 (pricing-api" in said.out
    assert nothing(cloud)
    assert not {"RunInstances", "ImportKeyPair", "CreateSecurityGroup"} & set(cloud.counted())
    assert not (session().inventory).exists()


def test_a_dry_run_that_would_be_refused_is_an_error_with_what_helps(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("fleet.yml").write_text(text(max_cost=1), encoding="utf-8")
    assert fleet("--dry-run") == ExitCode.ERROR
    said = capsys.readouterr()
    assert "refused: this can cost $" in said.err
    assert "next:  raise cloud.max_cost" in said.err
    assert fleet("--dry-run", "--json") == ExitCode.ERROR
    assert json.loads(capsys.readouterr().out)["refusal"].startswith("this can cost")
    with pytest.raises(CloudError, match="this can cost"):
        fleet()
    assert nothing(cloud)


def test_up_launches_and_says_where(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    Path("fleet.yml").write_text(text(), encoding="utf-8")
    assert fleet("--limit", "g5-[1-2]") == ExitCode.OK
    said = capsys.readouterr()
    assert "2 of 2 instances run, $2.01 an hour" in said.out
    assert all(one in said.out for one in running(cloud))
    assert fleet("--json") == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    assert {name: one["id"] for name, one in found["instances"].items()} == launched(session())
    assert found["instances"].keys() == set(HOSTS)
    assert fleet("--dry-run") == ExitCode.OK
    assert "0 instances" in capsys.readouterr().out


def test_a_host_with_nothing_left_to_do_gets_none(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hosts, "finished", lambda _: frozenset({"g5-2"}))
    Path("fleet.yml").write_text(text(), encoding="utf-8")
    assert fleet() == ExitCode.OK
    assert "no instance for 1 of 3: their units are done and home" in capsys.readouterr().err
    assert launched(session()).keys() == {"g5-1", "g5-3"}
    assert len(running(cloud)) == 2


def test_a_partial_fleet_is_exit_3(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    cloud.capacity("g5.xlarge", 2)
    Path("fleet.yml").write_text(text(partial=True), encoding="utf-8")
    assert fleet() == ExitCode.MISSING
    said = capsys.readouterr()
    assert "2 of 3 instances run" in said.out
    assert "sufficient g5.xlarge capacity" in said.out


def test_who_interrupts_is_told_what_runs(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> dict[str, str]:
        raise KeyboardInterrupt

    Path("fleet.yml").write_text(text(), encoding="utf-8")
    monkeypatch.setattr(arrivals, "wait", interrupted)
    with pytest.raises(LeakError) as caught:
        fleet()
    assert all(one in caught.value.message for one in running(cloud))
    assert len(running(cloud)) == 3
    assert caught.value.hint == f"fleet down --session {session().id}"


def test_there_must_be_something_to_launch(cloud: Cloud) -> None:
    Path("fleet.yml").write_text(
        "submitter: X\nbenchmarks: [{name: tiny-bert}]\nhosts: [{name: h1, kind: server}]\n", encoding="utf-8"
    )
    with pytest.raises(CampaignError, match="nothing to launch"):
        fleet()
    Path("fleet.yml").write_text(text(), encoding="utf-8")
    with pytest.raises(CampaignError, match="--limit nobody: no such host"):
        fleet("--limit", "nobody")
    assert not list(Path().glob("sessions/*"))
    assert cloud.calls() == []
