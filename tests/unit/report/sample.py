"""The session that the report's tests look at: seven of eight hosts, with most of what can go wrong."""

import dataclasses
from pathlib import Path

from fleet.handoff import Attempt
from fleet.session import Session
from fleet.terms import HostState, Mode, Reason, Scenario, UnitState
from tests.unit.results.session_files import ALL_FOUR, Host, Unit, build

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
STARTS = (
    Attempt(state=UnitState.INTERRUPTED, reason=Reason.INTERRUPTED, cause="the host was rebooted", ended_at=1.0),
    Attempt(state=UnitState.FAILED, reason=Reason.NO_SPACE, cause=EVIL, ended_at=2.0),
)


def at(scale: float) -> tuple[Unit, ...]:
    """All four units of a host that is so many times slower."""
    return tuple(dataclasses.replace(unit, scale=scale) for unit in ALL_FOUR)


def hosts() -> list[Host]:
    """Two laptops, GPU servers and cloud machines; one lost, one simulated, one INVALID, one not collected."""
    slow = at(2.1)
    return [
        Host(
            name="laptop-anna",
            warnings=(f"on battery; {EVIL}",),
            units=(
                dataclasses.replace(ALL_FOUR[0], conditions={"battery": 31.0, "thermal": 4.0}),
                dataclasses.replace(ALL_FOUR[1], attempts=STARTS),
                *ALL_FOUR[2:],
            ),
        ),
        Host(name="laptop-ben", facts="wsl2", units=(Unit(log="offline-invalid"), *slow[1:])),
        Host(name="epyc01.lab", kind="server", facts="epyc-2-sockets-8-gpus", units=at(0.07), usd_per_hour=2.5),
        Host(name="graviton-a", kind="ec2", facts="aws-graviton3", units=at(1.4), usd_per_hour=0.145),
        Host(
            name="g5-a",
            kind="ec2",
            facts="aws-g5-xlarge",
            usd_per_hour=1.006,
            units=tuple(dataclasses.replace(u, scale=0.3, labels=("random weights",)) for u in ALL_FOUR),
        ),
        Host(
            name="vm-quiet",
            kind="server",
            facts="container-on-kvm",
            units=tuple(dataclasses.replace(u, backend="null", labels=("simulated",)) for u in at(0.7)),
        ),
        Host(
            name="vm-lossy",
            kind="server",
            facts="container-on-kvm",
            units=(Unit(collected=False, collect_cause="mlperf_log_detail.txt: sha256 differs"), *at(1.2)[1:]),
        ),
        Host(
            name="laptop-eve",
            state=HostState.UNREACHABLE,
            cause=f"no answer within 15 s; last words: {EVIL}",
            hint="ssh laptop-eve",
            units=tuple(dataclasses.replace(u, state=UnitState.UNREACHABLE, cause=EVIL) for u in ALL_FOUR),
        ),
    ]


def sample(base: Path) -> Session:
    """The folder of `hosts`."""
    return build(base, hosts())


def quick(base: Path) -> Session:
    """One host, a quick run."""
    units = (
        Unit(log="offline-quick"),
        Unit(log="singlestream-quick", scenario=Scenario.SINGLE_STREAM),
        Unit(log="offline-accuracy", mode=Mode.ACCURACY),
    )
    return build(base, [Host(name="laptop-anna", units=units)], quick=True)
