"""The controller is killed at a write, whichever: the session always ends as if nothing had happened.

Run, collect and results over hosts that run the harness's own queue and packing in this process. Every rename in the
session's folder is a point where the controller may die: before it, with half of the file written, or right after it.
"""

import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleet import collect, handoff, poll, run
from fleet.handoff import Readiness, ReadinessFile
from fleet.harness.contract import UnitState
from fleet.inventory import reach
from fleet.inventory.hosts import Host
from fleet.results import export, load
from fleet.terms import HostState
from fleet.watch import Silent
from tests.unit.crashing import AFTER, BEFORE, TORN, Crash, HostInProcess, Life, Line, settle
from tests.unit.fakes import MINIMAL, Scene, scene

TEXT = MINIMAL.replace("[{name: h01, kind: server}]", "[{name: h01, kind: server}, {name: h02, kind: server}]").replace(
    "name: tiny-bert", "name: tiny-bert, scenarios: [Offline]"
)
LOCK = {"fleet": "0" * 16, "environment": "1" * 16}


@dataclass
class Rig:
    """A session, its hosts, and the controllers that live and die over it."""

    base: Path
    made: Scene = field(init=False)
    hosts: dict[str, HostInProcess] = field(init=False)

    def __post_init__(self) -> None:
        self.made = scene(self.base, TEXT)
        self.hosts = {name: HostInProcess(self.base / name / "work") for name in ("h01", "h02")}
        rows = []
        for name, host in self.hosts.items():
            host.work.mkdir(parents=True)
            rows.append(Readiness(host=name, state=HostState.READY, work_dir=str(host.work), lock=LOCK))
        session = self.made.session
        session.write(session.provision / "readiness.json", ReadinessFile(hosts=tuple(rows)))

    def live(self, at: int | None = None, how: str = BEFORE) -> Life:
        """One controller from run to results; it dies at rename `at`."""
        life = Life(root=self.made.session.root, at=at, how=how)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"USUAL_S": 0.01, "SETTLED_USUAL_S": 0.05, "ROUND_S": 0.02}.items():
                patch.setattr(poll, name, value)
            patch.setattr(reach, "connect", lambda host: self._connect(host, life))
            HostInProcess.install(patch, {host.work: host for host in self.hosts.values()})
            life.install(patch)
            try:
                self._stages()
            except Crash:
                assert life.dead
            settle()
        return life

    def _connect(self, host: Host, life: Life) -> Line:
        if life.dead:
            raise reach.Unreachable(HostState.UNREACHABLE, "its controller is dead")
        return Line(self.hosts[host.name], life)

    def _stages(self) -> None:
        session, campaign = self.made.session, self.made.campaign
        run.run(
            session, campaign, Silent(), quick=True,
            bringer=lambda planned: collect.Collector(session, planned).bring,
        )  # fmt: skip
        collect.collect(session, Silent())
        export.export(session, load.load(session))

    def final(self) -> dict[str, Any]:
        """Everything that must not depend on how often a controller died: no times, no names of this session."""
        session = self.made.session
        home = handoff.collected(session)
        files = {
            path.relative_to(session.collect).as_posix(): path.read_bytes()
            for path in sorted(session.collect.glob("h0*/*/*"))
            if path.name.startswith("mlperf_log")
        }
        token = session.token
        return {
            "units": {
                unit: (record.state, record.cause, record.reason, len(record.attempts))
                for unit, record in handoff.records(session).items()
            },
            "plan": [
                (spec.unit, spec.attempt, spec.lock, spec.user_conf, spec.quick) for spec in handoff.plan(session).units
            ],
            "home": {unit: (item.folder, item.complete, item.cause) for unit, item in home.items()},
            "files": files,
            "ran": {name: Counter(host.ran) for name, host in self.hosts.items()},
            "results": (session.results / "results.csv").read_text(encoding="utf-8").replace(token, "").splitlines(),
            "left": sorted(path.name for path in session.root.rglob("*.tar")),
            "earlier": (session.collect / ".earlier").exists(),
        }


@dataclass(frozen=True)
class Undisturbed:
    """A session that nobody died over."""

    renames: int
    final: dict[str, Any]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    rig = Rig(tmp_path_factory.mktemp("undisturbed"))
    life = rig.live()
    return Undisturbed(life.renames, rig.final())


def test_an_undisturbed_session_is_complete(undisturbed: Undisturbed) -> None:
    assert [unit[0] for unit in undisturbed.final["units"].values()] == [UnitState.DONE] * 4
    assert all(complete for _, complete, _ in undisturbed.final["home"].values())
    assert {sum(ran.values()) for ran in undisturbed.final["ran"].values()} == {2}
    # Records of four units, the plan, archives that were unpacked, results: many places to die at.
    assert undisturbed.renames > 20
    assert len(undisturbed.final["results"]) == 5


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    deaths=st.lists(st.tuples(st.integers(0, 10**4), st.sampled_from([BEFORE, TORN, AFTER])), min_size=1, max_size=3)
)
def test_a_session_ends_the_same_wherever_its_controllers_died(
    undisturbed: Undisturbed, deaths: list[tuple[int, str]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(Path(folder))
        for at, how in deaths:
            rig.live(at % undisturbed.renames, how)
        assert not rig.live().dead
        assert rig.final() == undisturbed.final
