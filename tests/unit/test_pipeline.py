"""Provision and run at once: who is ready measures, whoever else is not; and what ends one ends the other."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fleet import pipeline, provision, run
from fleet.errors import PlayError
from fleet.handoff import Readiness
from fleet.pipeline import Outing
from fleet.terms import HostState
from tests.unit.fakes import FakePlays, RecordingWatch, scene

READY, AWAY = Readiness(host="h01", state=HostState.READY), Readiness(host="h02", state=HostState.UNREACHABLE)
Prepare = Callable[[provision.OnReady], None]


def outing(base: Path, stop: Callable[[], None] = lambda: None) -> Outing:
    made = scene(base)
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
