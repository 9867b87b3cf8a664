"""Whatever the controller dies at, no instance outlives its lease, and the session can go on."""

from pathlib import Path

import pytest

from fleet.cloud import down
from tests.cloud.launching import hasten
from tests.cloud.sweep import Row, swept, table

PROCESSES = 2
_TABLE = Path(__file__).resolve().parents[2] / "build" / "crash-sweep.txt"


@pytest.fixture(
    scope="module", params=[pytest.param(4, id="some"), pytest.param(1, id="all", marks=pytest.mark.thorough)]
)
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Deaths at every fourth point and at all around instances; at every point in `make test-thorough`."""
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch)
        patch.setattr(down, "UNSEEN_S", 0.1)
        patch.setattr(down, "LOOK_S", 0.1)
        return swept(tmp_path_factory.mktemp("sweep"), PROCESSES, request.param)


def test_no_death_leaves_anything(rows: list[Row]) -> None:
    text = table(rows)
    _TABLE.parent.mkdir(exist_ok=True)
    _TABLE.write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    assert [f"{row.verb} {row.at} ({row.point}): {problem}" for row in rows for problem in row.problems] == []


def test_instances_without_an_answer_on_disk_are_among_them(rows: list[Row]) -> None:
    # With either kind of client token: the hardest of all.
    for idempotent in (True, False):
        assert any(row.point == "after RunInstances" and row.idempotent is idempotent for row in rows)
        assert any(row.intended and row.then["instances"] == 3 and row.idempotent is idempotent for row in rows)
    assert {row.ended_by for row in rows} == {"", "reap", "timer, reap"}


@pytest.mark.thorough
@pytest.mark.parametrize("rows", [1], indirect=True, ids=["all"], scope="module")
def test_points_are_many_and_of_every_sort(rows: list[Row]) -> None:
    points = {(row.verb, row.at): row.point for row in rows}
    assert len(points) >= 60
    for verb, sorts in {
        "up": ("before RunInstances", "after RunInstances", "rename s1/cloud/leases", "after ImportKeyPair"),
        "down": ("before TerminateInstances", "after TerminateInstances", "after DeleteSecurityGroup", "rename ."),
    }.items():
        for sort in sorts:
            assert any(point.startswith(sort) for (of, _), point in points.items() if of == verb), sort
