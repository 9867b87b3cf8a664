"""Provision and run at once: who is ready measures, whoever else is not; and what ends one ends the other."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fleet import handoff, pipeline, provision, run
from fleet.errors import PlayError
from fleet.handoff import Readiness
from fleet.inventory import reach
from fleet.pipeline import Outing
from fleet.results import load
from fleet.terms import HostState, UnitState
from tests.unit.fakes import MINIMAL, FakeConnection, FakePlays, RecordingWatch, answer, scene, status

READY, AWAY = Readiness(host="h01", state=HostState.READY), Readiness(host="h02", state=HostState.UNREACHABLE)
Prepare = Callable[[provision.OnReady], None]


def outing(base: Path, stop: Callable[[], None] = lambda: None, text: str = MINIMAL) -> Outing:
    made = scene(base, text)
    return Outing(
        session=made.session, campaign=made.campaign, base=base, source="fleet.yml", plays=FakePlays(),
        watch=RecordingWatch(), quick=True, stop=stop,
    )  # fmt: skip


def install(monkeypatch: pytest.MonkeyPatch, prepare: Prepare, measure: Callable[[run.Ready], Any]) -> None:
    monkeypatch.setattr(provision, "provision", lambda *_, on_ready, **__: prepare(on_ready))
    monkeypatch.setattr(run, "run", lambda *_, ready, **__: measure(ready))


def everything(ready: run.Ready) -> list[str]:
    return [item.host for item in iter(ready.get, None)]


def test_a_host_that_is_ready_measures_while_others_are_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring = threading.Event()

    def prepare(on_ready: provision.OnReady) -> None:
        on_ready(AWAY)
        on_ready(READY)
        assert measuring.wait(10), "the run waited for the rest of provision"

    def measure(ready: run.Ready) -> list[str]:
        measuring.set()
        return everything(ready)

    install(monkeypatch, prepare, measure)
    assert pipeline.prepare_and_measure(outing(tmp_path)) == ["h02", "h01"]


def test_without_any_ready_host_the_run_still_says_what_became_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, lambda on_ready: on_ready(AWAY), everything)
    assert pipeline.prepare_and_measure(outing(tmp_path)) == ["h02"]


def test_a_broken_playbook_is_an_error_and_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(_: provision.OnReady) -> None:
        raise PlayError("broken")

    install(monkeypatch, prepare, lambda _: pytest.fail("it was measured"))
    with pytest.raises(PlayError):
        pipeline.prepare_and_measure(outing(tmp_path))


def test_ctrl_c_in_the_run_ends_the_play_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Event()
    ended: list[bool] = []

    def prepare(on_ready: provision.OnReady) -> None:
        on_ready(READY)
        ended.append(stopped.wait(10))

    def measure(_: run.Ready) -> None:
        raise KeyboardInterrupt

    install(monkeypatch, prepare, measure)
    with pytest.raises(KeyboardInterrupt):
        pipeline.prepare_and_measure(outing(tmp_path, stopped.set))
    assert ended == [True]


@pytest.mark.parametrize("done", [True, False])
def test_a_host_that_is_not_named_any_more_stays_in_the_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    named = tmp_path / "lab.txt"
    named.write_text("h[01-02]\n", encoding="utf-8")
    text = MINIMAL.replace("name: h01, kind: server", "file: lab.txt, kind: server, connection: local")
    text = text.replace("name: tiny-bert", "name: tiny-bert, scenarios: [Offline], modes: [performance]")
    going = outing(tmp_path, text=text)
    session, units = going.session, [f"h0{number}.tiny-bert.Offline.performance" for number in (1, 2)]
    asked = {host: FakeConnection([answer(status(unit))]) for host, unit in zip(("h01", "h02"), units, strict=True)}
    monkeypatch.setattr(reach, "connect", lambda host: asked[host.name])
    if done:
        run.run(session, going.campaign, RecordingWatch(), quick=True, bringer=lambda _: lambda *_: None)
    named.write_text("h01\n", encoding="utf-8")
    pipeline.inventory(going)
    started = len(asked["h02"].started)
    pipeline.measure(going)
    # Nobody asks it any more. What it did stays done; what it did not is missing, and says why.
    assert len(asked["h02"].started) == started == done
    found = handoff.records(session)[units[1]]
    expected = (UnitState.DONE, "") if done else (UnitState.LEFT_OUT, "not in lab.txt any more")
    assert (found.state, found.cause) == expected
    assert [spec.unit for spec in handoff.plan(session).units] == units
    results = load.load(session)
    assert " of 2 hosts, " in results.headline
    assert "h02" in {system.host for system in results.missing_hosts}
