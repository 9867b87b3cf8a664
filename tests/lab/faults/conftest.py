"""The lab that is broken on purpose, and an outing in it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from tests.conftest import WHEELHOUSE
from tests.lab.faults import rows
from tests.lab.faults.outing import Outing
from tests.lab.hosts import Lab

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

HOSTS = ("h01", "h02", "h03")


_PASSED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note whether the test itself passed, for the fixture that ends after it."""
    report = yield
    if call.when == "call":
        item.stash[_PASSED] = report.passed
    return report


class MakeOuting(Protocol):
    """Prepares an outing of these hosts, in the shared lab unless another is given; `changes` go to fleet.yml."""

    def __call__(self, hosts: Sequence[str] = HOSTS, lab: Lab | None = None, **changes: Any) -> Outing: ...


@pytest.fixture(scope="session")
def fault_lab(lab_possible: None, wheelhouse: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:  # noqa: ARG001
    """Three hosts with disks of a size, made ready once for units that compute nothing."""
    disks = dict.fromkeys(HOSTS, 6144)
    with Lab(mounts={wheelhouse: WHEELHOUSE}, disk_mb=disks) as lab:
        ready = Outing(lab, tmp_path_factory.mktemp("ready"), [], hosts=HOSTS)
        ready.start("provision")
        assert ready.end(600) == 0, ready.text
        yield lab


@pytest.fixture
def outing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeOuting]:
    """A factory of outings, at most one a test; afterwards everything is mended and the row of its fault is saved."""
    kept: list[rows.Row] = []
    with ExitStack() as closing:

        def make(hosts: Sequence[str] = HOSTS, lab: Lab | None = None, **changes: Any) -> Outing:
            place = request.getfixturevalue("fault_lab") if lab is None else lab
            made = Outing(place, tmp_path, kept, hosts=hosts, **changes)
            closing.callback(made.close)
            return made

        yield make
    if request.node.stash.get(_PASSED, False):
        rows.save(kept)
