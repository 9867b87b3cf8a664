"""What several lab tests start from."""

import pytest

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
