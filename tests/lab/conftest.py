"""What several lab tests start from."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import WHEELHOUSE
from tests.lab.hosts import Lab
from tests.lab.outing import Fleet, said


@pytest.fixture(scope="session")
def benched(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """A finished quick bench of tiny-bert on all three hosts, by an ordinary user."""
    fleet = Fleet(lab, tmp_path_factory.mktemp("bench"))
    done = fleet("bench", "--quick", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    said(done, "3 of 3 hosts, 12 of 12 units", "demo model", "not submittable")
    return fleet


@pytest.fixture(scope="session")
def large_lab(lab_possible: None, wheelhouse: Path) -> Iterator[Lab]:  # noqa: ARG001 - it skips
    """Forty-eight hosts, h01 to h48, for all tests of scale; what a test does to them is undone after it."""
    with Lab(48, mounts={wheelhouse: WHEELHOUSE}) as started:
        yield started


@pytest.fixture(autouse=True)
def _healed_large_lab(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "large_lab" in request.fixturenames:
        request.getfixturevalue("large_lab").heal()
