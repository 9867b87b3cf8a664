"""Forty-eight hosts that compute: with two cores for all of them, sixteen at a time. `make test-scale`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lab import converged
from tests.lab.hosts import Lab
from tests.lab.outing import Fleet, rows, said

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.lab, pytest.mark.scale, pytest.mark.timeout(1800)]
HOSTS = 48
PARTS = ("h[01-16]", "h[17-32]", "h[33-48]")
TINY_BERT = [
    # One thread each: sixteen hosts share two cores, and OpenMP's threads wait for each other by spinning.
    {"name": "tiny-bert", "backend_options": {"threads": 1}, "scenarios": ["Offline"], "modes": ["accuracy"]}
]


@pytest.fixture(scope="module")
def many(lab_possible: None, wheelhouse: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:  # noqa: ARG001 - it skips
    """The hosts, provisioned already, with PyTorch."""
    layer = converged.layer(wheelhouse, tmp_path_factory.mktemp("one"), TINY_BERT)
    with Lab(HOSTS, mounts={wheelhouse: converged.WHEELHOUSE}, extra_layers=[layer]) as lab:
        yield lab


def test_part_after_part_every_host_is_in_one_session(many: Lab, tmp_path: Path) -> None:
    fleet = Fleet(many, tmp_path, hosts=converged.entry(HOSTS), benchmarks=TINY_BERT)
    for number, part in enumerate(PARTS, 1):
        done = fleet("bench", "--quick", "--limit", part, timeout=900)
        home = 16 * number
        said(done, f"{home} of {HOSTS} hosts, {home} of {HOSTS} units")
        # Sixteen at a time: the others are named as left out, and nothing that was measured is measured again.
        rows(fleet, ["done"] * home + ["left-out"] * (HOSTS - home))
        assert "again:" not in done.stderr
        assert len(list((tmp_path / "sessions").glob("*/session.json"))) == 1
    # A quick run without performance: nothing to submit, which is said; no host is missing any more.
    assert done.returncode == 5, done.stdout + done.stderr
    scores = {row["accuracy"]["F1"] for row in fleet.read("results", "results.json")["units"]}
    assert len(scores) == 1
